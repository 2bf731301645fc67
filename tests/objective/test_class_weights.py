"""Weights of classes and the focal loss, for labels of which some are rare."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from support.small_runs import fine_tuning, logged, make_text_data, pretraining, run
from torch import Tensor, nn

from distft.checkpoint.committed import find_checkpoint
from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, LABEL
from distft.errors import ConfigError
from distft.objective.classification import Classification
from distft.objective.interface import ObjectiveContext
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.topology import Topology

CONTEXT = ObjectiveContext(2, SingleProcess())
LABELS = torch.tensor([0, 2, 1, IGNORE_INDEX, 2])


def _loss_and_gradient(objective: Classification, logits: Tensor) -> tuple[Tensor, Tensor]:
    batch = Batch(
        input_ids=torch.zeros(5, 1, dtype=torch.int64), targets={LABEL: LABELS}, num_targets={LABEL: 4}
    )
    leaf = logits.clone().requires_grad_()
    model: Any = lambda *, heads, **_: {heads[0]: leaf}  # noqa: E731
    (loss,) = objective.loss_sums(model, batch, CONTEXT).values()
    torch.autograd.backward(loss)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_weights_are_those_of_torch() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    weights = (0.5, 2.0, 1.5)
    for smoothing in (0.0, 0.1):
        found = _loss_and_gradient(Classification(class_weights=weights, label_smoothing=smoothing), logits)
        leaf = logits.clone().requires_grad_()
        plain = nn.CrossEntropyLoss(torch.tensor(weights), reduction="sum", label_smoothing=smoothing)
        expected = plain(leaf, LABELS.where(LABELS >= 0, -100))
        torch.testing.assert_close(found[0], expected.detach())
        torch.testing.assert_close(found[1], torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_is_that_of_the_paper(gamma: float) -> None:
    """-(1 - p)^gamma log p (Lin et al. 2017, equation 4); rows without a label have no gradient."""
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    loss, gradient = _loss_and_gradient(Classification(focal_gamma=gamma), logits)
    leaf = logits.clone().requires_grad_()
    p = leaf.softmax(1)[torch.arange(5), LABELS.clamp_min(0)]
    terms = -((1 - p) ** gamma) * p.log()
    expected = terms[LABELS >= 0].sum()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])
    certain = torch.full((5, 3), -60.0)
    certain[torch.arange(5), LABELS.clamp_min(0)] = 60.0  # p is 1 to the last bit
    assert _loss_and_gradient(Classification(focal_gamma=gamma), certain)[1].isfinite().all()


def test_balanced_weights_are_scikit_learns_and_saved_as_numbers(tmp_path: Path) -> None:
    data = make_text_data(tmp_path / "data")
    run(Topology(), pretraining(data, tmp_path / "base", train={"max_steps": 2}))
    objective = {"type": "classification", "pooling": "mean", "class_weights": "balanced"}
    raw = fine_tuning(data, tmp_path / "run", tmp_path / "base", objective=objective, train={"max_steps": 3})
    inputs = read_inputs(parse(RunConfig, raw))
    rows = inputs.train.batch(0, 48)
    labels = rows.targets[LABEL].numpy()  # type: ignore[union-attr]
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    run(Topology(), raw)
    saved = find_checkpoint(str(tmp_path / "run")).manifest.config["objective"]["class_weights"]
    assert saved == pytest.approx(expected.tolist())
    run(Topology(), {**raw, "train": {"max_steps": 5, "log_every_steps": 1}})  # resumes: nothing changed
    assert max(logged(tmp_path / "run")) == 5
    for weights, problem in (
        ({"cat": 2.0, "brid": 1.0}, r"no label of the data is 'brid'.* Did you mean 'bird'"),
        ([1.0, 2.0], r"class_weights has 2 numbers, and the data 3 labels"),
    ):
        objective = {"type": "classification", "class_weights": weights}
        with pytest.raises(ConfigError, match=problem):
            read_inputs(parse(RunConfig, {**raw, "objective": objective}))
    named = Classification(class_weights={"dog": 3.0}).resolved(inputs.model, inputs.train)
    assert named.class_weights == (1.0, 1.0, 3.0)


def test_focal_loss_with_label_smoothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not go together"):
        parse(Classification, {"focal_gamma": 2.0, "label_smoothing": 0.1})
