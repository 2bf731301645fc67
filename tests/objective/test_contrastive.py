"""The contrastive objective against a plain computation in loops, on one rank and several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_scenarios import SEQ_LEN, VOCAB_SIZE, Scenario
from support.first_step import Outcome, first_step, untrained_model
from support.rank_pool import run_ranks
from torch import Tensor
from torch.nn.functional import relu

from distft.config import parse
from distft.data.batch import Batch, RaggedArray
from distft.data.dataset import DataContext, TransformContext
from distft.data.feed import Feed
from distft.data.labelled_rows import LabelledRows
from distft.data.pairs_rows import PairRows
from distft.errors import ConfigError
from distft.objective.contrastive import Contrastive
from distft.objective.settings import ObjectiveConfig
from distft.topology import Topology

NUM_SEQUENCES = 7
DATA = DataContext(
    seq_len=SEQ_LEN,
    vocab_size=VOCAB_SIZE,
    encode=lambda _: [],
    tokenizer_fingerprint="none",
    global_batch_size=NUM_SEQUENCES,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and by which engine."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    num_texts: int = 2
    stage: int | None = None
    micro_batch_size: int = 2
    dropout: float = 0.0

    @property
    def scenario(self) -> Scenario:
        return Scenario(
            stage=self.stage,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=NUM_SEQUENCES,
            attention="bidirectional",
            max_grad_norm=None,
            dropout=self.dropout,
        )

    @property
    def objective(self) -> Contrastive:
        usual = {"temperature": 0.5} if self.settings.get("loss", "infonce") == "infonce" else {}
        raw = {"type": "contrastive", **usual, **self.settings}
        objective: Contrastive = parse(ObjectiveConfig, raw)
        return objective

    @property
    def dropout_seed(self) -> int | None:
        return 9 if self.dropout else None

    def feed(self) -> Feed:
        """Texts of different lengths, of which some occur twice: as texts, as positives, and as both."""
        texts = [texts[: self.num_texts] for texts in _texts(max(self.num_texts, 2))]
        rows = PairRows(RaggedArray([row for texts_ in texts for row in texts_]), self.num_texts)
        feed = Feed.for_evaluation(rows)
        own = TransformContext(data=DATA, seed=4, num_sequences=NUM_SEQUENCES, rows=feed.rows)
        return feed.with_transforms(*self.objective.transforms(own))


def _texts(num_texts: int) -> list[list[list[int]]]:
    source = np.random.default_rng(3)
    texts = [
        [source.integers(0, VOCAB_SIZE, source.integers(1, SEQ_LEN + 1)).tolist() for _ in range(num_texts)]
        for _ in range(NUM_SEQUENCES)
    ]
    texts[3][0] = texts[0][0]  # equal texts, whose positives belong to both
    texts[5][1] = texts[2][1]  # equal positives
    texts[6][1] = texts[1][0]  # a positive that is another's text
    if num_texts > 2:
        texts[4][2] = texts[2][1]  # a hard negative that is another's positive
    return texts


def step_by_engine(topology: Topology, cases: Sequence[Case]) -> list[Outcome]:
    return [
        first_step(
            case.scenario,
            case.objective,
            case.objective.heads(None),
            case.feed(),
            topology,
            case.dropout_seed,
        )
        for case in cases
    ]


def step_plainly(case: Case) -> Outcome:
    """A row at a time without padding, and the losses by loops over the texts."""
    objective, feed = case.objective, case.feed()
    model = untrained_model(case.scenario, objective.heads(None))
    batch = feed.batch(0, NUM_SEQUENCES).for_step(case.dropout_seed)
    vectors, texts = [], []
    for row in range(len(batch.input_ids)):
        ids = batch.input_ids[row : row + 1, : int(batch.lengths[row])]
        keys = None if batch.dropout_keys is None else batch.dropout_keys[row : row + 1]
        vectors.append(model(ids, dropout_keys=keys)["embedding"][0])
        texts.append(tuple(ids[0].tolist()))
    per_sequence = batch.rows_per_sequence
    grouped = [vectors[i : i + per_sequence] for i in range(0, len(vectors), per_sequence)]
    of_texts = [texts[i : i + per_sequence] for i in range(0, len(texts), per_sequence)]
    if case.num_texts == 1:  # views are of equal texts if their documents are
        of_texts = [[tuple(document), tuple(document)] for document, _ in _texts(2)]
    loss = plain_losses(objective, grouped, of_texts).mean()
    loss.backward()
    gradient = {name: _gradient(param) for name, param in model.named_parameters()}
    return Outcome(float(loss.detach()), gradient)


def _gradient(param: Tensor) -> Tensor:
    return torch.zeros(param.numel()) if param.grad is None else param.grad.flatten().clone()


Texts = Sequence[Sequence[tuple[int, ...]]]


def plain_losses(objective: Contrastive, vectors: Sequence[Sequence[Tensor]], texts: Texts) -> Tensor:
    """The loss of each sequence; `vectors` have the temperature in them."""
    losses = []
    for i in range(len(texts)):
        positives = {positive[1] for text, *positive in [(t[0], *t) for t in texts] if text == texts[i][0]}
        known = {*positives, texts[i][0]}
        negatives = [
            vectors[j][column]
            for j in range(len(texts))
            for column in range(1, len(texts[j]))
            if texts[j][column] not in known and (objective.negatives == "batch" or (j == i and column > 1))
        ]
        loss = _plain_loss(objective, vectors[i][0], vectors[i][1], negatives)
        if objective.symmetric:
            known = {t[0] for t in texts if t[1] == texts[i][1]} | {texts[i][1]}
            negatives = [vectors[j][0] for j in range(len(texts)) if texts[j][0] not in known]
            loss = (loss + _plain_loss(objective, vectors[i][1], vectors[i][0], negatives)) / 2
        losses.append(loss)
    return torch.stack(losses)


def _plain_loss(objective: Contrastive, query: Tensor, positive: Tensor, negatives: list[Tensor]) -> Tensor:
    if objective.loss == "infonce":
        similarities = torch.stack([query @ other for other in [positive, *negatives]])
        return torch.logsumexp(similarities, 0) - similarities[0]
    near = (query - positive).norm()
    margin = objective.margin or 0.5
    far = torch.stack([(query - other).norm() for other in negatives])
    if objective.loss == "triplet":
        return relu(near - far + margin).mean()
    return near**2 + (relu(margin - far) ** 2).mean()


COLUMNS: list[Mapping[str, Any]] = [
    {},
    {"symmetric": True, "learns_temperature": True, "temperature": 0.2},
    {"loss": "triplet", "pooling": "last", "margin": 1.0},
    {"loss": "margin", "pooling": "first", "symmetric": True},
    {"normalize": False, "temperature": 2.0},
]
CASES = [Case(settings=settings) for settings in COLUMNS] + [
    Case(settings={"learns_temperature": True}, num_texts=3),
    Case(settings={"negatives": "own", "loss": "triplet"}, num_texts=4),
    Case(settings={"negatives": "own"}, num_texts=3),
]


def require_equal(found: Outcome, expected: Outcome, tolerance: float = 1e-6) -> None:
    assert found.loss == pytest.approx(expected.loss, abs=tolerance, rel=tolerance)
    assert found.gradient.keys() == expected.gradient.keys()
    size = max(float(gradient.abs().max()) for gradient in expected.gradient.values())
    assert size > 1e-3
    for name, gradient in expected.gradient.items():
        difference = float((found.gradient[name] - gradient).abs().max())
        assert difference <= tolerance * max(size, 1.0), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{dict(case.settings)}-{case.num_texts}")
def test_loss_and_gradient_equal_those_of_loops_over_all_texts(case: Case) -> None:
    (found,) = step_by_engine(Topology(), [case])
    require_equal(found, step_plainly(case))


DEFAULT = {"temperature": None}
# fp32 keeps 7 digits of a similarity, which the default temperature of 0.05 multiplies by 20; that of `usual`
# by 2.
DEFAULT_TOLERANCE = 1e-5


@pytest.mark.parametrize("num_texts", [2, 3])
def test_the_default_temperature_divides_similarities_by_a_twentieth(num_texts: int) -> None:
    case = Case(settings=DEFAULT, num_texts=num_texts)
    (found,) = step_by_engine(Topology(), [case])
    require_equal(found, step_plainly(case), DEFAULT_TOLERANCE)
    assert case.objective.heads(None)["embedding"].temperature == 0.05


@pytest.mark.parametrize("micro_batch_size", [1, 3, NUM_SEQUENCES])
@pytest.mark.parametrize("views", ["dropout", "crops"])
def test_any_cut_into_micro_batches_gives_the_same_step(views: str, micro_batch_size: int) -> None:
    settings: dict[str, Any] = {"views": views}
    case = Case(settings=settings, num_texts=1, dropout=0.3, micro_batch_size=micro_batch_size)
    (found,) = step_by_engine(Topology(), [case])
    require_equal(found, step_plainly(case))


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "stages"), [(2, (0, 1, 2)), (4, (3,))])
def test_ranks_give_the_loss_and_gradient_of_one_rank_on_the_whole_batch(
    world_size: int, stages: tuple[int, ...]
) -> None:
    alone = [
        Case(num_texts=3, settings={"symmetric": True, "learns_temperature": True}),
        # Four ranks of two or one sequences, of which one runs a micro-batch without any.
        Case(num_texts=1, settings={"views": "dropout"}, dropout=0.3, micro_batch_size=1),
        Case(settings={"loss": "triplet", "margin": 1.0}),
        Case(settings=DEFAULT),
    ]
    expected = [step_plainly(case) for case in alone] * len(stages)
    cases = [replace(case, stage=stage) for stage in stages for case in alone]
    for outcomes in run_ranks(step_by_engine, world_size, cases, timeout_s=240):
        for case, found, plain in zip(cases, outcomes, expected, strict=True):
            require_equal(found, plain, DEFAULT_TOLERANCE if case.settings == DEFAULT else 1e-6)


def test_infonce_is_the_cross_entropy_of_the_similarities_if_all_texts_differ() -> None:
    from distft.objective.contrastive_loss import ContrastiveLoss

    vectors, hashes = torch.randn(5, 2, 4), torch.arange(10).view(5, 2)
    everyone = torch.arange(5)
    logits = vectors[:, 0] @ vectors[:, 1].T
    found = ContrastiveLoss(kind="infonce", margin=0.5).of(vectors, hashes, everyone)
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, everyone, reduction="none"))
    both = ContrastiveLoss(kind="infonce", margin=0.5, is_symmetric=True).of(vectors, hashes, everyone)
    back = torch.nn.functional.cross_entropy(logits.T, everyone, reduction="none")
    assert both == pytest.approx((found + back) / 2)


def test_triplet_is_that_of_torch() -> None:
    from distft.objective.contrastive_loss import ContrastiveLoss

    vectors, hashes = torch.randn(5, 3, 4), torch.arange(15).view(5, 3)
    loss = ContrastiveLoss(kind="triplet", margin=2.0, own_negatives=True)
    expected = torch.nn.functional.triplet_margin_loss(
        *vectors.unbind(1), margin=2.0, eps=0.0, reduction="none"
    )
    torch.testing.assert_close(loss.of(vectors, hashes, torch.arange(5)), expected)


def context_of(feed: Feed, *, global_batch_size: int = 8, num_sequences: int = 9) -> TransformContext:
    data = replace(DATA, global_batch_size=global_batch_size)
    return TransformContext(data=data, seed=4, num_sequences=num_sequences, rows=feed.rows)


def single_rows(rows: Sequence[Sequence[int]]) -> Feed:
    return Feed.for_evaluation(LabelledRows(RaggedArray(rows), np.zeros(len(rows), np.int64)))


def test_dropout_views_are_the_row_twice_with_other_keys() -> None:
    feed = single_rows([[1, 2, 3], [4, 5]])
    (transform,) = Contrastive(views="dropout").transforms(context_of(feed))
    batch = feed.with_transforms(transform).batch(0, 2).for_step(3)
    assert batch.rows_per_sequence == 2
    assert batch.input_ids.tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 0], [4, 5, 0]]
    assert batch.lengths.tolist() == [3, 3, 2, 2]
    assert batch.sequence_numbers.tolist() == [0, 0, 1, 1]
    assert len(set(batch.dropout_keys.tolist())) == 4


def test_crops_are_spans_of_the_longest_document_and_depend_on_seed_and_sequence_alone() -> None:
    rows = [list(range(100 * i, 100 * i + 10 + i)) for i in range(6)]
    feed = single_rows(rows)
    objective = Contrastive(views="crops", crop_share=(0.2, 0.6))
    cropped = feed.with_transforms(*objective.transforms(context_of(feed)))
    whole = cropped.batch(0, 6)
    spans = [row[:n].tolist() for row, n in zip(whole.input_ids, whole.lengths, strict=True)]
    for index, span in enumerate(spans):
        row = rows[index // 2]
        assert span == row[span[0] - row[0] : span[0] - row[0] + len(span)]
        assert 0.2 * len(row) - 0.5 <= len(span) <= 0.6 * len(row) + 0.5
    assert len({tuple(span) for span in spans}) == 12
    parts = [cropped.batch(0, 1), cropped.batch(1, 4), cropped.batch(4, 6)]
    cut = [row[:n].tolist() for part in parts for row, n in zip(part.input_ids, part.lengths, strict=True)]
    assert cut == spans
    packed = Batch(
        input_ids=torch.tensor([[1, 1, 2, 2, 2, 2, 3, 3]]),
        document_ids=torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]]),
        targets={},
        num_targets={"next_token": 8},
        sequence_numbers=torch.tensor([5]),
    )
    (crop,) = Contrastive(views="crops", crop_share=(0.5, 1.0)).transforms(context_of(feed))
    assert set(crop(packed).input_ids[crop(packed).input_ids > 0].tolist()) == {2}


def test_a_batch_or_data_without_negatives_is_refused_before_training() -> None:
    pairs = Case().feed()
    with pytest.raises(ConfigError, match="global_batch_size=1 leaves a text without negatives"):
        Contrastive().transforms(context_of(pairs, global_batch_size=1))
    with pytest.raises(ConfigError, match="one row alone"):
        Contrastive().transforms(context_of(pairs, num_sequences=1))
    with pytest.raises(ConfigError, match="needs hard negatives"):
        Contrastive(negatives="own").transforms(context_of(pairs))
    with pytest.raises(ConfigError, match="views=columns needs two texts"):
        Contrastive().transforms(context_of(single_rows([[1], [2]])))


@pytest.mark.parametrize("views", ["dropout", "crops"])
def test_training_pairs_are_refused_for_views_of_one_text_and_validation_pairs_are_not(views: Any) -> None:
    rows = PairRows(RaggedArray([[1, 2], [3], [4], [5]]), 2)
    objective = Contrastive(views=views)
    with pytest.raises(
        ConfigError, match=rf"views={views} makes views of rows with one text, and these have 2"
    ):
        objective.transform_feed(Feed.for_training(rows, seed=1, shuffle=False), DATA, 4)
    feed = objective.transform_feed(Feed.for_evaluation(rows), DATA, 4)
    assert feed.batch(0, 2).num_targets == {"contrastive": 2}


def test_a_stream_whose_steps_have_one_row_is_refused() -> None:
    feed = Case().feed()
    context = context_of(feed, global_batch_size=8)
    with pytest.raises(ConfigError, match=r"this stream has 1\.6 on average"):
        Contrastive().transforms(replace(context, step_share=0.2))
    Contrastive().transforms(replace(context, step_share=0.25))


def test_the_size_of_a_step_plays_no_part_in_evaluation() -> None:
    rows = PairRows(RaggedArray([[1, 2], [3]]), 2)
    data = replace(DATA, global_batch_size=1)
    objective = Contrastive()
    feed = objective.transform_feed(Feed.for_evaluation(rows), data, 4)
    assert feed.batch(0, 1).num_targets == {"contrastive": 1}
    with pytest.raises(ConfigError, match="global_batch_size=1"):
        objective.transform_feed(Feed.for_training(rows, seed=1, shuffle=False), data, 4)
    vectors = torch.eye(2).view(1, 2, 2)
    sums = {"embedding": vectors, "text_hash": torch.tensor([[1, 2]])}
    assert objective.metrics(sums)["loss"] == 0.0


def test_crops_of_one_token_are_refused_and_the_lengths_of_others_told() -> None:
    context = context_of(single_rows([[1, 2, 3], [4, 5]]))
    with pytest.raises(ConfigError, match="no crop would have more than one token"):
        Contrastive(views="crops", crop_share=(1e-9, 1e-9)).transforms(context)
    crops = Contrastive(views="crops", crop_share=(1e-9, 0.5))
    crops.transforms(context)
    assert crops.notes(context) == (
        f"crops of a text of seq_len={SEQ_LEN} have 1 to {round(SEQ_LEN / 2)} tokens",
    )
    assert not crops.notes(context_of(Case().feed()))
