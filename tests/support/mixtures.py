"""A mixture of two objectives over two streams: trained by any engine, and by a plain torch loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distft.checkpoint.committed import Checkpoint
from distft.collectives import Collectives
from distft.config import parse
from distft.data.batch import Batch, RaggedArray
from distft.data.feed import Feed, StreamFeed
from distft.data.labelled_rows import LabelledRows
from distft.data.mixture import Interleaving
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, LABEL, NEXT_TOKEN
from distft.model.heads import Heads
from distft.model.transformer import Transformer
from distft.objective.interface import ObjectiveContext
from distft.objective.mixture import Mixture
from distft.objective.settings import ObjectiveConfig
from distft.optim.groups import parameter_groups
from distft.topology import Topology
from distft.train.step import StepResult, train_step
from support.engine_scenarios import SEQ_LEN, VOCAB_SIZE, Scenario, Training, collectives_for, fresh_source

LABELS = {"topic": ("a", "b", "c")}
LR = 3e-3


class TokenRows:
    """Packed rows of two documents; every third row has no target in its first half."""

    summary = "tokens"
    fingerprint = "tokens"

    def __init__(self, num_rows: int = 23) -> None:
        self.num_sequences = num_rows
        generator = torch.Generator().manual_seed(2)
        self._rows = torch.randint(0, VOCAB_SIZE, (num_rows, SEQ_LEN + 1), generator=generator)

    def batch(self, indices: Indices) -> Batch:
        rows = indices if len(indices) else np.zeros(1, np.int64)
        labels = self._rows[rows, 1:].clone()
        labels[torch.from_numpy(rows % 3 == 0), : SEQ_LEN // 2] = IGNORE_INDEX
        if not len(indices):
            labels[:] = IGNORE_INDEX
        columns = torch.arange(SEQ_LEN).expand(len(rows), -1)
        return Batch(
            input_ids=self._rows[rows, :-1],
            targets={NEXT_TOKEN: labels},
            num_targets={NEXT_TOKEN: int((labels != IGNORE_INDEX).sum())},
            position_ids=columns % 7,
            document_ids=columns // 7,
        )


def labelled_rows(num_rows: int = 11) -> LabelledRows:
    source = np.random.default_rng(3)
    texts = [source.integers(0, VOCAB_SIZE, source.integers(1, SEQ_LEN)).tolist() for _ in range(num_rows)]
    return LabelledRows(RaggedArray(texts), source.integers(0, 3, num_rows))


@dataclass(frozen=True, kw_only=True)
class MixtureCase:
    """What is mixed, and by which engine."""

    stage: int | None = None
    alternate: bool = False
    shares: tuple[float, float] = (2.0, 1.0)
    weights: tuple[Any, Any] = (1.0, 0.5)  # of text and topic
    global_batch_size: int = 7
    micro_batch_size: int = 2
    dropout: float = 0.0
    offload: bool = False

    @property
    def scenario(self) -> Scenario:
        return Scenario(
            stage=self.stage,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            max_grad_norm=None,
            dropout=self.dropout,
            zero={"offload_optimizer": "cpu"} if self.offload else {},
        )

    @property
    def objective(self) -> Mixture:
        text, topic = self.weights
        raw = {
            "type": "mixture",
            "parts": {
                "text": {"objective": {"type": "causal_lm"}, "weight": text},
                "topic": {"objective": {"type": "classification", "pooling": "mean"}, "weight": topic},
            },
        }
        objective: Mixture = parse(ObjectiveConfig, raw)
        return objective

    @property
    def heads(self) -> Heads:
        return self.objective.heads(LABELS)

    def feed(self) -> StreamFeed:
        streams = {
            "text": Feed.for_training(TokenRows(), seed=5, shuffle=True),
            "topic": Feed.for_training(labelled_rows(), seed=6, shuffle=True, label_names=LABELS["topic"]),
        }
        size = self.global_batch_size if self.alternate else 1
        order = Interleaving(self.shares, block_size=size)
        return StreamFeed(streams, order, steps_of=size if self.alternate else None)


class MixtureTraining(Training):
    """An engine with the mixture's model, and its feed."""

    def __init__(
        self,
        case: MixtureCase,
        topology: Topology,
        collectives: Collectives,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        super().__init__(case.scenario, topology, collectives, checkpoint, heads=case.heads)
        self.objective, self.feed = case.objective, case.feed()
        self.context = ObjectiveContext(VOCAB_SIZE, collectives)
        self.dropout_seed = 9 if case.dropout else None

    def train(self, to_step: int) -> list[StepResult]:
        results = []
        while self.step < to_step:
            batches = [
                self.feed.batch(micro.start, micro.stop).for_step(self.dropout_seed)
                for micro in self._micro_batches()
            ]
            result = train_step(
                self.engine,
                self.objective.prepare_step(self.engine.model, batches, self.context),
                loss_sums=lambda model, batch: self.objective.loss_sums(model, batch, self.context),
                num_targets=self.objective.num_targets,
                training_sums=self.objective.training_sums,
                sum_names=self.objective.training_sum_names,
                weights=self.objective.term_weights(self.step),
                group_lr=lambda group: LR * group.lr_scale,
            )
            self.step += 1
            results.append(result)
        return results


@dataclass(frozen=True)
class Outcome:
    """Losses of the steps, their terms, the first step's gradient, and the weights after the last."""

    losses: list[float]
    terms: list[list[float]]
    gradient: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


def train_by_engine(topology: Topology, cases: list[MixtureCase], num_steps: int) -> list[Outcome]:
    """One after another on these ranks."""
    outcomes = []
    for case in cases:
        training = MixtureTraining(case, topology, collectives_for(case.scenario, topology))
        results = training.train(1)
        state = training.whole_state()
        # The first moment after one step is (1 - beta1) times the gradient.
        gradient = {
            name: values / (1 - case.scenario.optim.betas[0])
            for (name, kind), values in state.items()
            if kind == "exp_avg"
        }
        results += training.train(num_steps)
        weights = {name: v for (name, kind), v in training.whole_state().items() if kind == "weight"}
        losses, terms = [float(r.loss) for r in results], [r.terms.tolist() for r in results]
        outcomes.append(Outcome(losses, terms, gradient, weights))
        training.engine.close()
    return outcomes


def train_alone(case: MixtureCase, num_steps: int) -> Outcome:
    (outcome,) = train_by_engine(Topology(), [case], num_steps)
    return outcome


def train_plainly(case: MixtureCase, weights: list[tuple[float, float]]) -> Outcome:
    """A row at a time without padding, torch's own AdamW; `weights` of text and topic in each step."""
    scenario = case.scenario
    model = Transformer(scenario.model, case.heads)
    named = dict(model.named_parameters())
    source = fresh_source({name: tuple(param.shape) for name, param in named.items()})
    for name, param in named.items():
        param.data.copy_(source.read(name, "weight", 0, param.numel()).view_as(param))
    groups = parameter_groups({n: tuple(p.shape) for n, p in named.items()}, set(named), scenario.optim, {})
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [named[name] for name in group.names],
                "lr": LR * group.lr_scale,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=scenario.optim.betas,
        eps=scenario.optim.eps,
    )
    feed, gradient, losses, terms = case.feed(), {}, [], []
    for step, (text, topic) in enumerate(weights):
        begin = step * case.global_batch_size
        sums, counts = _plain_sums(model, feed, begin, begin + case.global_batch_size)
        means = [sums[name] / max(counts[name], 1) for name in ("text", "topic")]
        loss = text * means[0] + topic * means[1]
        for param in named.values():
            param.grad = torch.zeros_like(param)  # absent from a step: no gradient, but AdamW's step
        loss.backward()
        if step == 0:
            gradient = {name: _copy(param.grad) for name, param in named.items()}
        optimizer.step()
        losses.append(float(loss.detach()))
        terms.append([float(mean.detach()) for mean in means])
    return Outcome(losses, terms, gradient, {name: _copy(param) for name, param in named.items()})


def _copy(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.detach().flatten().clone()


def _plain_sums(
    model: Transformer, feed: StreamFeed, start: int, stop: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    sums = {name: torch.zeros(()) for name in feed.streams}
    counts = dict.fromkeys(feed.streams, 0)
    datasets, rows = feed.lookup(start, stop)
    for dataset, row in zip(datasets.tolist(), rows.tolist(), strict=True):
        index = np.array([row])
        if dataset == 0:
            batch = TokenRows().batch(index)
            labels = batch.targets[NEXT_TOKEN][0]
            for first, last in ((0, 7), (7, SEQ_LEN)):  # each document by itself
                logits = model(batch.input_ids[:, first:last], heads=("lm_head",))["lm_head"]
                sums["text"] = sums["text"] + cross_entropy(logits[0], labels[first:last], reduction="sum")
            counts["text"] += int((labels != IGNORE_INDEX).sum())
        else:
            batch = labelled_rows().batch(index)
            logits = model(batch.input_ids, heads=("topic",))["topic"]
            sums["topic"] = sums["topic"] + cross_entropy(logits, batch.targets[LABEL], reduction="sum")
            counts["topic"] += 1
    return sums, counts


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
