"""Labels of rows and words, and numbers: one step on any engine and ranks is that of a loop over rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.engine_scenarios import SEQ_LEN, VOCAB_SIZE, Scenario
from support.first_step import Outcome, first_step, untrained_model
from support.mixtures import labelled_rows
from support.rank_pool import run_ranks
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, huber_loss

from distft.data.batch import Batch, RaggedArray
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.labelled_rows import LabelledRows, RowTargets
from distft.data.targets import IGNORE_INDEX, LABEL, LABELS, NUMBER, TOKEN_LABEL
from distft.data.token_label_rows import TokenLabelRows
from distft.model.transformer_config import TransformerConfig
from distft.objective.classification import Classification
from distft.objective.multi_label import MultiLabel
from distft.objective.regression import Regression
from distft.objective.row_objective import RowObjective
from distft.objective.token_classification import TokenClassification
from distft.topology import Topology

NAMES = ("B-A", "I-A", "O")
NUM_SEQUENCES = 7
DATA = DataContext(
    seq_len=SEQ_LEN,
    vocab_size=VOCAB_SIZE,
    encode=lambda _: [],
    tokenizer_fingerprint="none",
    label_names=NAMES,
)
OBJECTIVES: dict[str, RowObjective | TokenClassification] = {
    "r_drop": Classification(r_drop=1.5, pooling="mean"),
    "words": TokenClassification(labels=NAMES, label_smoothing=0.1),
    "packed_words": TokenClassification(labels=NAMES),
    "several_labels": MultiLabel(pooling="mean"),
    "numbers": Regression(pooling="mean", loss="huber", huber_delta=0.7, offset=0.5, scale=2.0),
}


class PackedWords:
    """Rows of two documents, some of whose tokens are a word's first."""

    summary = fingerprint = "packed"
    num_sequences = NUM_SEQUENCES

    def batch(self, indices: np.ndarray) -> Batch:  # type: ignore[type-arg]
        if not len(indices):
            return self.batch(np.zeros(1, np.int64)).without_targets()
        generator = torch.Generator().manual_seed(6)
        ids, labels = (
            torch.randint(0, n, (NUM_SEQUENCES, SEQ_LEN), generator=generator) for n in (VOCAB_SIZE, 3)
        )
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = IGNORE_INDEX
        labels, columns = labels[indices], torch.arange(SEQ_LEN).expand(len(indices), -1)
        return Batch(
            input_ids=ids[indices],
            targets={TOKEN_LABEL: labels},
            num_targets={TOKEN_LABEL: int((labels != IGNORE_INDEX).sum())},
            position_ids=columns % 7,
            document_ids=columns // 7,
        )


def word_rows() -> TokenLabelRows:
    source = np.random.default_rng(4)
    rows = []
    for _ in range(NUM_SEQUENCES):
        length = int(source.integers(2, SEQ_LEN))
        labels = np.where(source.random(length) < 0.4, IGNORE_INDEX, source.integers(0, 3, length))
        rows.append([*source.integers(0, VOCAB_SIZE, length).tolist(), *labels.tolist()])
    return TokenLabelRows(RaggedArray(rows))


def rows_with(kind: str) -> LabelledRows:
    """Rows of no, one or several labels; or of numbers, one of which is the mark of no label."""
    source = np.random.default_rng(5)
    lengths = source.integers(1, SEQ_LEN, NUM_SEQUENCES)
    texts = RaggedArray([source.integers(0, VOCAB_SIZE, length).tolist() for length in lengths])
    if kind == NUMBER:
        numbers = np.array([0.25, -1.5, float(IGNORE_INDEX), 3.0, 0.5, -0.25, 2.0])
        return LabelledRows(texts, RowTargets(NUMBER, numbers.view(np.int64)))
    sets = [[], [0], [1, 2], [0, 1, 2]]
    return LabelledRows(texts, RowTargets.of_sets(np.arange(NUM_SEQUENCES) % 4, sets, len(NAMES)))


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    stage: int | None = None
    micro_batch_size: int = 2

    @property
    def scenario(self) -> Scenario:
        model = TransformerConfig(
            vocab_size=VOCAB_SIZE,
            max_seq_len=SEQ_LEN,
            d_model=18,
            num_layers=2,
            num_heads=3,
            d_ff=29,
            dropout=0.3,
            neftune_alpha=5.0,
            attention="bidirectional",
        )
        return Scenario(
            stage=self.stage,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=NUM_SEQUENCES,
            max_grad_norm=None,
            other_model=model,
        )

    def feed(self) -> Feed:
        kinds = {
            "r_drop": labelled_rows,
            "words": word_rows,
            "packed_words": PackedWords,
            "several_labels": lambda: rows_with(LABELS),
            "numbers": lambda: rows_with(NUMBER),
        }
        feed = Feed.for_training(kinds[self.name](), seed=0, shuffle=False, label_names=NAMES)
        transformed = OBJECTIVES[self.name].transform_feed(feed, DATA, seed=1)
        assert isinstance(transformed, Feed)
        return transformed


def step_by_engine(topology: Topology, cases: Sequence[Case]) -> list[Outcome]:
    objectives = [OBJECTIVES[case.name] for case in cases]
    return [
        first_step(case.scenario, objective, objective.heads(NAMES), case.feed(), topology, 9)
        for case, objective in zip(cases, objectives, strict=True)
    ]


def step_plainly(case: Case) -> Outcome:
    """A row at a time without padding; of a packed row the documents one after another."""
    objective, batch = OBJECTIVES[case.name], case.feed().batch(0, NUM_SEQUENCES).for_step(9)
    model = untrained_model(case.scenario, objective.heads(NAMES))
    outputs = []
    for row in range(len(batch.input_ids)):
        length = SEQ_LEN if batch.lengths is None else int(batch.lengths[row])
        given = {} if batch.document_ids is None else {"document_ids": batch.document_ids[row : row + 1]}
        if batch.position_ids is not None:
            given["position_ids"] = batch.position_ids[row : row + 1]
        assert batch.dropout_keys is not None
        keys = batch.dropout_keys[row : row + 1]
        outputs.append(model(batch.input_ids[row : row + 1, :length], dropout_keys=keys, **given))
    if case.name in {"several_labels", "numbers"}:
        loss = _of_rows([output["classifier"][0] for output in outputs], batch)
    else:
        loss = _r_drop(outputs, batch) if case.name == "r_drop" else _words(objective, outputs, batch)
    loss.backward()
    named = model.named_parameters()
    gradient = {name: param.grad.flatten().clone() for name, param in named if param.grad is not None}
    return Outcome(float(loss.detach()), gradient)


def _r_drop(outputs: Sequence[Mapping[str, Tensor]], batch: Batch) -> Tensor:
    losses = []
    for row in range(0, len(outputs), 2):
        p, q = (outputs[row + i]["classifier"][0] for i in range(2))
        label = batch.targets[LABEL][row]
        nll = (cross_entropy(p, label) + cross_entropy(q, label)) / 2
        p, q = p.softmax(0), q.softmax(0)
        losses.append(nll + 1.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2)
    return torch.stack(losses).mean()


def _of_rows(outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    losses = [
        binary_cross_entropy_with_logits(output, batch.targets[LABELS][row].float())
        if LABELS in batch.targets
        else huber_loss(output[0], (batch.targets[NUMBER][row].float() - 0.5) / 2.0, delta=0.7)
        for row, output in enumerate(outputs)
    ]
    return torch.stack(losses).mean()


def _words(objective: object, outputs: Sequence[Mapping[str, Tensor]], batch: Batch) -> Tensor:
    smoothing = getattr(objective, "label_smoothing", 0.0)
    losses = [
        cross_entropy(logits, label, label_smoothing=smoothing)
        for row, output in enumerate(outputs)
        for logits, label in zip(output["token_classifier"][0], batch.targets[TOKEN_LABEL][row], strict=False)
        if label != IGNORE_INDEX
    ]
    return torch.stack(losses).mean()


def require_equal(found: Outcome, expected: Outcome) -> None:
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found.gradient.keys() == expected.gradient.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.gradient.values()) > 1e-3
    for name, gradient in expected.gradient.items():
        assert float((found.gradient[name] - gradient).abs().max()) <= 1e-6, name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_is_that_of_a_loop_over_rows(name: str) -> None:
    (found,) = step_by_engine(Topology(), [Case(name=name)])
    require_equal(found, step_plainly(Case(name=name)))


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "stages"), [(2, (0, 1, 2)), (4, (3,))])
def test_ranks_take_the_step_of_one_process(world_size: int, stages: tuple[int, ...]) -> None:
    expected = [step_plainly(Case(name=name)) for name in OBJECTIVES] * len(stages)
    # Of four ranks one runs a micro-batch without a row.
    size = 1 if world_size == 4 else 2
    cases = [Case(name=name, stage=stage, micro_batch_size=size) for stage in stages for name in OBJECTIVES]
    for outcomes in run_ranks(step_by_engine, world_size, cases, timeout_s=240):
        for found, plain in zip(outcomes, expected, strict=True):
            require_equal(found, plain)
