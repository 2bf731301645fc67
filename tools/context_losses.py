"""What a language model gains from reading both sides: losses of the same tokens with and without it.

`python tools/context_losses.py RUN...` prints a line of JSON for each run of prefix_lm (its targets, with the
prefix read in both directions and causally) or of causal_lm with fim (middles behind prefix and suffix, in
both orders, and behind the text before them alone).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch
from distft.data.dataset import TransformContext
from distft.data.documents import documents
from distft.data.feed import Feed, Transform
from distft.data.fill_in_the_middle import MiddleMover
from distft.data.split import SplitConfig
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError, DistftError
from distft.objective.causal_lm import CausalLM
from distft.objective.interface import Objective, ObjectiveContext
from distft.objective.prefix_lm import PrefixLM
from distft.run.data_context import data_context
from distft.run.pretrained import TrainedModel, load_model, open_model, ranks_of
from distft.topology import Topology
from distft.train.evaluation import evaluate

Order = Literal["psm", "spm", "text_before_alone"]
ORDERS: tuple[Order, ...] = ("psm", "spm", "text_before_alone")
_Ids = NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", help="with validation data, of which as much as in training counts"
    )
    options = parser.parse_args(arguments)
    try:
        for run in options.runs:
            print(json.dumps({"run": run, **losses(open_model(run))}))
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def losses(trained: TrainedModel) -> dict[str, float]:
    """The loss of each reading. Raises `ConfigError` for a run of another objective or without such data."""
    config = trained.config
    assert config.model is not None
    if config.validation is None or isinstance(config.validation, SplitConfig):
        raise ConfigError(f"{trained.source.path}: the run has no validation data of its own.")
    if config.model.is_encoder_decoder:
        raise ConfigError(f"{trained.source.path}: an encoder cannot read a prefix causally.")
    context = data_context(trained.own_tokenizer, config.model, config)
    feed = config.validation.build_for_evaluation(context)
    if not isinstance(feed, Feed):
        raise ConfigError(f"{trained.source.path}: the run has several streams, and a part of one is needed.")
    feed = feed.first(config.evaluation.max_sequences or feed.num_sequences)
    own = TransformContext(
        data=context, seed=config.seed, num_sequences=feed.num_sequences, rows=feed.rows, step_share=None
    )
    found = {}
    with ranks_of(config, Topology()) as (collectives, device):
        module = load_model(trained, device)
        for name, (objective, transforms) in readings(config.objective, own).items():
            metrics = evaluate(
                module,
                module,
                objective,
                feed.with_transforms(*transforms),
                context=ObjectiveContext(config.model.vocabulary_size or 0, collectives),
                micro_batch_size=config.evaluation.micro_batch_size or config.batch.micro_batch_size,
                seq_len=config.batch.seq_len,
                device=device,
            )
            found[name] = round(metrics["loss"], 4)
    return found


def readings(
    objective: Objective, context: TransformContext
) -> Mapping[str, tuple[Objective, Sequence[Transform]]]:
    """By name, what makes the same targets of the rows in another order or with another attention."""
    if isinstance(objective, PrefixLM):
        own = list(objective.transforms(context))
        return {
            "prefix_in_both_directions": (objective, own),
            "prefix_read_causally": (objective, [*own, lambda batch: replace(batch, is_prefix=None)]),
        }
    if isinstance(objective, CausalLM) and objective.fim is not None:
        mover = objective.fim.mover(context, context.rows(np.zeros(1, np.int64)))
        return {
            f"middles_{order}": (CausalLM(), [MiddleTargets(mover=mover, order=order)]) for order in ORDERS
        }
    raise ConfigError("There is nothing to compare: name runs of prefix_lm, or of causal_lm with fim.")


@dataclass(frozen=True, kw_only=True)
class MiddleTargets:
    """A transform of batches: every text is in this order, and the tokens of its middle are the only targets.

    A middle's first token that nothing is before in the text is no target in any order.
    """

    mover: MiddleMover
    order: Order

    def __call__(self, batch: Batch) -> Batch:
        psm, spm = (replace(self.mover, rate=1.0, spm_rate=rate)(batch) for rate in (0.0, 1.0))
        moved = {"psm": psm, "spm": spm, "text_before_alone": batch}[self.order]
        labels = batch.targets[NEXT_TOKEN].numpy()
        found = np.full_like(labels, IGNORE_INDEX)
        for row, first, middle, stop in self._middles(batch, _tokens(psm)):
            size = stop - middle
            begin = {"psm": middle, "spm": middle, "text_before_alone": first}[self.order]
            for index in range(max(1 - first, 0), size):
                found[row, begin + index - 1] = labels[row, first + index - 1]
        return replace(
            moved,
            targets={NEXT_TOKEN: torch.from_numpy(found)},
            num_targets={NEXT_TOKEN: int(np.count_nonzero(found != IGNORE_INDEX))},
            num_target_bytes=0,
        )

    def _middles(self, batch: Batch, tokens: _Ids) -> Iterator[tuple[int, int, int, int]]:
        """Row; where a middle begins in the text; where it begins and stops in the moved text, as its end."""
        labels = batch.targets[NEXT_TOKEN].numpy()
        for row, start, stop in documents(batch):
            last = stop + (stop == labels.shape[1] and labels[row, -1] != IGNORE_INDEX)
            of_document = tokens[row, start:last]
            marks = (start + np.flatnonzero(of_document == mark) for mark in self.mover.marks)
            for _, suffix, middle in zip(*(mark.tolist() for mark in marks), strict=True):
                ends = np.flatnonzero(tokens[row, middle:last] == self.mover.eos_id)
                end = middle + int(ends[0]) if len(ends) else int(last)
                yield row, suffix - 1, middle + 1, end


def _tokens(batch: Batch) -> _Ids:
    """[B, T + 1]: the inputs, and the target of the last one."""
    last = np.maximum(batch.targets[NEXT_TOKEN].numpy()[:, -1:], 0)
    return np.concatenate([batch.input_ids.numpy(), last], axis=1)


if __name__ == "__main__":
    sys.exit(main())
