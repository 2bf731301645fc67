"""A mixture hands each part its own stream, state and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from support.mixtures import LABELS, MixtureCase
from support.tiny_models import build
from torch import Tensor

from distft.checkpoint.manifest import Progress
from distft.collectives import SingleProcess
from distft.data.batch import AnyBatch, Batch, MixedBatch
from distft.data.dataset import Labels
from distft.errors import ConfigError
from distft.model.heads import Heads
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import Model, Objective, ObjectiveContext, only_batch
from distft.objective.mixture import Mixture, MixturePart
from distft.topology import BatchPlan
from distft.train.early_stopping import EarlyStopping
from distft.train.progress import LatestTerms, ProgressCounter
from distft.train.step import StepResult
from distft.train.transfers import DeferredRead


class Counting(Objective):
    """Remembers how many rows it has prepared, and returns each row's number."""

    type: Literal["counting"] = "counting"
    offset: float = 0.0

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        return {}

    def check_model(self, model: TransformerConfig) -> None:
        raise ConfigError(f"no {model.d_model}")

    def term_weights(self, step: int) -> Mapping[str, float]:
        return {"rows": 2.0 + step, "ones": 1.0}

    def initial_state(self, heads: Heads) -> Mapping[str, Sequence[float]]:  # noqa: ARG002
        return {"num_rows": [self.offset, 0.0]}

    def prepare_step(
        self, model: Model, micro_batches: Sequence[AnyBatch], context: ObjectiveContext
    ) -> Sequence[AnyBatch]:
        assert model is not None
        batches = [only_batch(batch) for batch in micro_batches]
        context.state["num_rows"][1] += sum(len(batch.input_ids) for batch in batches)
        return [replace(batch, num_targets={"rows": 10 + i, "ones": 1}) for i, batch in enumerate(batches)]

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return only_batch(batch).num_targets

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        total = only_batch(batch).input_ids.sum().float()
        return {"rows": total + context.state["num_rows"][0], "ones": total}

    @property
    def per_row(self) -> frozenset[str]:
        return frozenset({"numbers"})

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        ids = only_batch(batch).input_ids
        return {"numbers": ids[:, 0], "sum": ids.sum()}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": float(sums["sum"]), "first": float(sums["numbers"][0])}


MIXTURE = Mixture.model_construct(
    parts={
        "a": MixturePart.model_construct(objective=Counting(offset=5.0), weight=1.0),
        "b": MixturePart.model_construct(objective=Counting(), weight=((0, 0.0), (4, 2.0))),
    }
)


def batch(*numbers: int) -> Batch:
    return Batch(
        input_ids=torch.tensor(numbers)[:, None], targets={}, num_targets={"rows": len(numbers), "ones": 1}
    )


def context() -> ObjectiveContext:
    state = {name: torch.tensor(values) for name, values in MIXTURE.initial_state({}).items()}
    return ObjectiveContext(9, SingleProcess(), state=state)


def model(**_: Any) -> Mapping[str, Tensor]:
    return {}


def test_weights_are_those_of_terms_times_those_of_parts_in_each_step() -> None:
    assert MIXTURE.term_weights(2) == {"a/rows": 4.0, "a/ones": 1.0, "b/rows": 4.0, "b/ones": 1.0}
    assert MIXTURE.term_weights(9)["b/rows"] == 22.0


def test_each_part_prepares_its_own_batches_and_keeps_its_own_state() -> None:
    own = context()
    batches = [MixedBatch({"a": batch(1, 2), "b": batch(3)}), MixedBatch({"b": batch(4)})]
    first, second = (b for b in MIXTURE.prepare_step(model, batches, own) if isinstance(b, MixedBatch))
    assert {name: values.tolist() for name, values in own.state.items()} == {
        "a/num_rows": [5.0, 2.0],
        "b/num_rows": [0.0, 2.0],
    }
    assert MIXTURE.num_targets(first) == {"a/rows": 10, "a/ones": 1, "b/rows": 10, "b/ones": 1}
    assert MIXTURE.num_targets(second) == {"b/rows": 11, "b/ones": 1}
    sums = MIXTURE.loss_sums(model, second, own)
    assert {name: float(value) for name, value in sums.items()} == {
        "a/rows": 0.0,
        "a/ones": 0.0,
        "b/rows": 4.0,
        "b/ones": 4.0,
    }
    assert float(MIXTURE.loss_sums(model, first, own)["a/rows"]) == 8.0


def test_evaluation_keeps_outputs_apart_and_weighs_losses_as_at_the_end() -> None:
    assert MIXTURE.per_row == {"a/numbers", "b/numbers"}
    sums = MIXTURE.evaluate(model, MixedBatch({"a": batch(1, 2), "b": batch(7)}), context())
    assert MIXTURE.metrics(sums) == {"loss": 3 + 2 * 7, "a/loss": 3, "a/first": 1, "b/loss": 7, "b/first": 7}
    only_b = MIXTURE.evaluate(model, MixedBatch({"b": batch(7)}), context())
    assert MIXTURE.metrics(only_b) == {"loss": 14, "b/loss": 7, "b/first": 7}


def test_the_problems_of_all_parts_are_told_by_name() -> None:
    with pytest.raises(ConfigError, match=r"objective\.parts\.a: no 8\nobjective\.parts\.b: no 8"):
        MIXTURE.check_model(TransformerConfig(max_seq_len=4, d_model=8, num_layers=1, num_heads=1))


def test_heads_have_the_names_of_parts_and_the_model_computes_each_alone() -> None:
    case = MixtureCase()
    assert list(case.heads) == ["lm_head", "topic"]
    assert case.objective.heads_of_part("topic", LABELS) == ["topic"]
    transformer = build(case.scenario.model, case.heads)
    calls: list[list[str]] = []

    def recording(**inputs: Any) -> Mapping[str, Tensor]:
        calls.append(list(inputs["heads"]))
        return transformer(**inputs)

    mixed = case.feed().batch(0, 6)
    case.objective.loss_sums(recording, mixed, ObjectiveContext(53, SingleProcess()))
    assert calls == [["lm_head"], ["topic"]]


def test_what_an_objective_remembers_survives_a_save() -> None:
    own = context()
    own.state["b/num_rows"] += 0.1
    plan = BatchPlan(global_batch_size=1, micro_batch_size=1, seq_len=1, dp_world_size=1)
    progress = ProgressCounter(Progress(step=3), torch.device("cpu")).to_progress(
        plan, own, None, EarlyStopping(Progress())
    )
    read = Progress.model_validate_json(progress.model_dump_json())
    for name, values in own.state.items():
        assert torch.equal(torch.tensor(read.objective_state[name]), values)


def result(terms: list[float], is_measured: list[bool]) -> StepResult:
    zero = torch.zeros(())
    signals = DeferredRead(torch.zeros(0, dtype=torch.int64))
    counts = torch.tensor(is_measured).long()
    return StepResult(
        loss=zero,
        terms=torch.tensor(terms),
        is_measured=torch.tensor(is_measured),
        num_targets=counts,
        num_tokens=counts.sum(),
        sums=torch.zeros(0),
        grad_norm=zero,
        is_skipped=zero,
        signals=signals,
    )


def test_a_term_is_logged_as_of_the_last_step_that_measured_it() -> None:
    terms = LatestTerms()
    assert terms.read(["a", "b"]) == {}
    terms.add_step(result([1.0, 0.0], [True, False]))
    assert terms.read(["a", "b"]) == {"a": 1.0}
    terms.add_step(result([0.0, 2.0], [False, True]))
    assert terms.read(["a", "b"]) == {"a": 1.0, "b": 2.0}
    terms.add_step(result([3.0, float("nan")], [True, True]))  # a loss that is no number is no secret
    assert str(terms.read(["a", "b"])) == "{'a': 3.0, 'b': nan}"


def test_views_of_a_sequence_draw_other_numbers_and_the_first_those_of_a_single_row() -> None:
    numbers = torch.arange(4)
    single = replace(batch(1, 2, 3, 4), sequence_numbers=numbers)
    repeated = replace(batch(*range(12)), sequence_numbers=numbers.repeat_interleave(3), rows_per_sequence=3)
    keys = repeated.row_keys(5)
    assert len(keys.unique()) == 12
    assert torch.equal(keys[::3], single.row_keys(5))
    part = replace(batch(1, 2, 3), sequence_numbers=numbers[2:3].repeat(3), rows_per_sequence=3)
    assert torch.equal(part.row_keys(5), keys[6:9])
