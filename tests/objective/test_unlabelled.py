"""Objectives for unlabelled rows, each against a plain computation row by row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import SIZES
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch, RaggedArray
from distft.data.feed import Feed, StreamFeed
from distft.data.labelled_rows import LabelledRows
from distft.data.mixture import Interleaving
from distft.data.targets import IGNORE_INDEX, ROW
from distft.errors import ConfigError
from distft.model.heads import ClassificationHead
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.mixture import Mixture, SingleObjective
from distft.objective.pseudo_label import PSEUDO_LABEL, class_factors
from distft.objective.settings import ObjectiveConfig
from distft.objective.unlabelled import SOFT_LABEL, UnlabelledObjective

NUM_CLASSES = 4
HEADS = {"topic": ClassificationHead(num_labels=NUM_CLASSES)}
LOGITS = torch.randn(40, NUM_CLASSES, generator=torch.Generator().manual_seed(3)) * 2


def model(**inputs: Any) -> dict[str, Tensor]:
    """A row's logits depend on its only token."""
    return {"topic": LOGITS[inputs["input_ids"][:, 0]]}


def batch_of(tokens: Sequence[int], num_views: int = 2, *, counts: bool = True) -> Batch:
    """Views of `len(tokens) / num_views` sequences, each one token."""
    row = torch.full((len(tokens),), IGNORE_INDEX)
    row[::num_views] = 0 if counts else IGNORE_INDEX
    return Batch(
        input_ids=torch.tensor(tokens)[:, None],
        targets={ROW: row},
        num_targets={ROW: len(tokens) // num_views if counts else 0},
        rows_per_sequence=num_views,
    )


def objective_of(**settings: Any) -> UnlabelledObjective:
    if settings.get("align"):
        settings = {"class_shares": None, **settings}
    raw = {
        "topic": {"objective": {"type": "classification"}},
        "rows": {"objective": settings | {"head": "topic"}},
    }
    mixture: Mixture = parse(ObjectiveConfig, {"type": "mixture", "parts": raw})
    part = mixture.part("rows")
    assert isinstance(part, UnlabelledObjective)
    return part


def context_of(objective: UnlabelledObjective, step: int = 0, **changes: Any) -> ObjectiveContext:
    state = {name: torch.tensor(values) for name, values in objective.initial_state(HEADS).items()}
    return ObjectiveContext(61, SingleProcess(), state=state, step=step, **changes)


def prepared(
    objective: UnlabelledObjective, batches: Sequence[Batch], context: ObjectiveContext
) -> list[Batch]:
    return list(objective.prepare_step(model, batches, context))  # type: ignore[arg-type]


def loss(objective: UnlabelledObjective, batch: Batch, context: ObjectiveContext) -> float:
    return float(objective.loss_sums(model, batch, context)[ROW])


BATCH = batch_of(range(24))
WEAK, STRONG = LOGITS[0:24:2], LOGITS[1:24:2]


@pytest.mark.parametrize("step", [0, 5, 50])
def test_a_pseudo_label_is_the_class_of_a_confident_prediction_on_the_weak_view(step: int) -> None:
    objective = objective_of(type="pseudo_label", threshold=[[0, 0.9], [10, 0.5]])
    context = context_of(objective, step)
    (found,) = prepared(objective, [BATCH], context)
    threshold = {0: 0.9, 5: 0.7, 50: 0.5}[step]
    expected, num_confident = 0.0, 0
    for weak, strong in zip(WEAK, STRONG, strict=True):
        p = [math.exp(x) / sum(math.exp(y) for y in weak.tolist()) for x in weak.tolist()]
        if max(p) >= threshold:
            expected += float(cross_entropy(strong, torch.tensor(p.index(max(p)))))
            num_confident += 1
    assert 0 < num_confident < 12
    assert loss(objective, found, context) == pytest.approx(expected, abs=1e-5)
    assert objective.num_targets(found) == {ROW: 12}  # also the rows that are left out, as in FixMatch


def test_thresholds_by_class_follow_the_counts_of_confident_predictions() -> None:
    """FlexMatch's equations, with an average over steps in place of each row's last prediction."""
    objective = objective_of(type="pseudo_label", threshold=0.8, per_class=True, momentum=0.5)
    context = context_of(objective)
    share = [0.0] * NUM_CLASSES
    for _ in range(3):
        (found,) = prepared(objective, [BATCH], context)
        labels, hits = [], [0.0] * NUM_CLASSES
        for weak in WEAK:
            confidence, label = (value.item() for value in weak.softmax(0).max(0))
            beta = share[int(label)] / max(*share, 1 - sum(share))
            labels.append(int(label) if confidence >= 0.8 * beta / (2 - beta) else IGNORE_INDEX)
            hits[int(label)] += (confidence >= 0.8) / len(WEAK)
        assert found.targets[PSEUDO_LABEL].tolist() == labels
        share = [0.5 * old + 0.5 * new for old, new in zip(share, hits, strict=True)]
        assert context.state["confident_share"].tolist() == pytest.approx(share, abs=1e-6)


def test_factors_grow_from_0_to_1_with_the_confident_share() -> None:
    assert class_factors(torch.zeros(3)).tolist() == [0, 0, 0]
    assert class_factors(torch.tensor([0.5, 0.25, 0.25])).tolist() == pytest.approx([1, 1 / 3, 1 / 3])
    factors = class_factors(torch.tensor([0.2, 0.1, 0.0]))
    assert factors[0] > factors[1] > factors[2] == 0


def test_alignment_divides_by_the_running_mean_prediction() -> None:
    shares = (0.4, 0.3, 0.2, 0.1)
    objective = objective_of(
        type="pseudo_label", threshold=0.5, align=True, class_shares=shares, momentum=0.5
    )
    context = context_of(objective)
    (found,) = prepared(objective, [BATCH], context)
    p = WEAK.double().softmax(1)
    mean = 0.5 * torch.full((NUM_CLASSES,), 0.25) + 0.5 * p.mean(0)
    aligned = p * torch.tensor(shares) / mean
    confidence, label = (aligned / aligned.sum(1, keepdim=True)).max(1)
    assert found.targets[PSEUDO_LABEL].tolist() == label.where(confidence >= 0.5, IGNORE_INDEX).tolist()
    assert context.state["mean_prediction"].tolist() == pytest.approx(mean.tolist(), abs=1e-6)


def labelled(*labels: int) -> Feed:
    rows = LabelledRows(RaggedArray([[1]] * len(labels)), np.array(labels))
    names = tuple("abcd"[:NUM_CLASSES])
    return Feed.for_training(rows, seed=0, shuffle=True, label_names=names, label_counts=rows.label_counts)


def test_class_shares_are_those_of_all_rows_whose_labels_train_the_head() -> None:
    """A class without a row, here the last two, counts as if it had one."""
    head = {"type": "classification", "head": "both"}
    part = {"type": "pseudo_label", "head": "both", "align": True}
    objectives = {"one": head, "two": head, "other": {"type": "classification"}, "rows": part}
    raw = {name: {"objective": objective} for name, objective in objectives.items()}
    mixture: Mixture = parse(ObjectiveConfig, {"type": "mixture", "parts": raw})
    streams = {
        "one": labelled(0, 1, 0),
        "two": labelled(1, 0),
        "other": labelled(2, 2, 2),
        "rows": labelled(3),
    }
    feed = StreamFeed(streams, Interleaving((1.0,) * 4))
    resolved = mixture.resolved(TransformerConfig(**SIZES), feed).part("rows")
    assert resolved.model_dump()["class_shares"] == (3 / 7, 2 / 7, 1 / 7, 1 / 7)
    for settings, expected in (({"align": False}, None), ({"class_shares": None}, None)):
        raw["rows"] = {"objective": part | settings}
        mixture = parse(ObjectiveConfig, {"type": "mixture", "parts": raw})
        resolved = mixture.resolved(TransformerConfig(**SIZES), feed).part("rows")
        assert resolved.model_dump()["class_shares"] is expected


@pytest.mark.parametrize(
    "settings", [{"per_class": True}, {"align": True}, {"per_class": True, "align": True}]
)
def test_pseudo_labels_do_not_depend_on_how_the_step_is_cut(settings: dict[str, bool]) -> None:
    objective = objective_of(type="pseudo_label", threshold=0.7, **settings)
    whole, cut = context_of(objective), context_of(objective)
    for _ in range(3):
        (expected,) = prepared(objective, [BATCH], whole)
        parts = [batch_of(range(6)), batch_of([3, 4], counts=False), batch_of(range(6, 24))]
        found = prepared(objective, parts, cut)
        labels = [found[index].targets[PSEUDO_LABEL] for index in (0, 2)]
        assert torch.cat(labels).tolist() == expected.targets[PSEUDO_LABEL].tolist()
        assert found[1].targets[PSEUDO_LABEL].tolist() == [IGNORE_INDEX]
    for name, values in whole.state.items():
        torch.testing.assert_close(cut.state[name], values)


def test_a_step_without_unlabelled_rows_changes_no_running_mean() -> None:
    objective = objective_of(type="pseudo_label", per_class=True, align=True)
    context = context_of(objective)
    before = {name: values.clone() for name, values in context.state.items()}
    (found,) = prepared(objective, [batch_of([3, 4], counts=False)], context)
    assert all(torch.equal(context.state[name], values) for name, values in before.items())
    assert loss(objective, found, context) == 0


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_consistency_is_the_distance_from_a_sharpened_confident_prediction(kind: str) -> None:
    objective = objective_of(type="consistency", loss=kind, min_confidence=0.6, temperature=0.5)
    context = context_of(objective)
    (found,) = prepared(objective, [BATCH], context)
    target = (WEAK / 0.5).softmax(1)[WEAK.softmax(1).amax(1) >= 0.6]
    student = STRONG[WEAK.softmax(1).amax(1) >= 0.6]
    assert 0 < len(target) < 12
    expected = (
        mse_loss(student.softmax(1), target, reduction="sum") / NUM_CLASSES
        if kind == "mse"
        else kl_div(student.log_softmax(1), target, reduction="sum")
    )
    assert loss(objective, found, context) == pytest.approx(float(expected), abs=1e-5)


def test_the_mean_teacher_predicts_with_the_averaged_weights() -> None:
    entered: list[bool] = []

    class Averaged:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: object) -> None:
            entered.append(False)

    def teacher_or_student(**inputs: Any) -> dict[str, Tensor]:
        logits = model(**inputs)["topic"]
        return {"topic": -logits if entered == [True] else logits}

    objective = objective_of(type="mean_teacher")
    context = context_of(objective, averaged_weights=Averaged)
    (found,) = objective.prepare_step(teacher_or_student, [BATCH], context)
    torch.testing.assert_close(found.targets[SOFT_LABEL], (-WEAK).softmax(1))  # type: ignore[union-attr]
    assert entered == [True, False]
    expected = mse_loss(STRONG.softmax(1), (-WEAK).softmax(1), reduction="sum") / NUM_CLASSES
    got = objective.loss_sums(teacher_or_student, found, context)[ROW]
    assert float(got) == pytest.approx(float(expected), abs=1e-5)


def test_entropy_is_that_of_the_prediction() -> None:
    objective = objective_of(type="entropy")
    batch = batch_of(range(5), num_views=1)
    expected = torch.distributions.Categorical(logits=LOGITS[:5]).entropy()
    assert loss(objective, batch, context_of(objective)) == pytest.approx(float(expected.sum()), abs=1e-5)
    metrics = objective.metrics(objective.evaluate(model, batch, context_of(objective)))
    assert metrics["loss"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert metrics["confidence"] == pytest.approx(float(LOGITS[:5].softmax(1).amax(1).mean()), abs=1e-6)


def mixture_with(head: str, topic: Mapping[str, Any], **settings: Any) -> Mixture:
    rows = {"type": "pseudo_label", "head": head, **settings}
    parts = {"topic": {"objective": topic}, "rows": {"objective": rows}}
    mixture: Mixture = parse(ObjectiveConfig, {"type": "mixture", "parts": parts})
    return mixture


def test_the_head_of_an_unlabelled_part_must_be_a_classifier_of_another_part() -> None:
    names = {"topic": ("a", "b", "c")}
    assert list(mixture_with("topic", {"type": "classification"}).heads(names)) == ["topic"]
    with pytest.raises(ConfigError, match=r"objective\.parts\.rows: head='topics' is not there.*topic"):
        mixture_with("topics", {"type": "classification"}).heads(names)
    with pytest.raises(ConfigError, match="head='topic' is not a classifier with one label a row"):
        mixture_with("topic", {"type": "multi_label"}).heads(names)
    with pytest.raises(ConfigError, match="class_shares has 2 numbers, but head 'topic' has 3 classes"):
        objective_of(type="pseudo_label", align=True, class_shares=[0.5, 0.5]).require_classes(3)


def test_a_mixture_knows_which_of_its_parts_are_supervised() -> None:
    assert mixture_with("topic", {"type": "classification"}).supervised_parts == ["topic"]
    only = {"type": "mixture", "parts": {"topic": {"objective": {"type": "classification"}}}}
    assert parse(ObjectiveConfig, only).supervised_parts is None


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "consistency", "head": "topic", "temperature": 1e-300},
        {"type": "consistency", "head": "topic", "temperature": float("inf")},
        {"type": "regression", "scale": 1e-300},
    ],
)
def test_a_divisor_beyond_float32_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"temperature|scale"):
        parse(SingleObjective, settings)
