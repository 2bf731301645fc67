"""Rows of one text and of two, with the ids that BERT has around them, and which text a token is of."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.token_rows import data_context, documents, feed, padded

from distft.config import parse
from distft.data.batch import Batch, RaggedArray, merge_batches
from distft.data.dataset import DataContext, TextTemplate
from distft.data.labelled import LabelledConfig
from distft.data.labelled_rows import LabelledRows, RowTargets
from distft.data.pairs import PairsConfig
from distft.data.targets import ROW
from distft.data.token_dropout import TextViews, TokenDropout, rows_of_view
from distft.errors import ConfigError
from distft.objective.settings import ObjectiveConfig

CLS, SEP = 1, 2
CONTEXT = DataContext(
    seq_len=9,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text],
    tokenizer_fingerprint="letters",
    eos_id=SEP,
    template=TextTemplate(before=(CLS,), between=(SEP,), behind=(SEP,)),
    has_segments=True,
)
A, B, C = map(ord, "abc")


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_pair_stands_between_its_marks_and_the_second_text_with_its_mark_is_segment_1(
    tmp_path: Path,
) -> None:
    rows = [{"a": "aa", "b": "b"}, {"a": "a", "b": "bbbb"}, {"a": "aaaaaaaaa", "b": "bb"}]
    config = LabelledConfig(path=write(tmp_path / "a.jsonl", *rows), text="a", text_pair="b", label=None)
    batch = config.build_for_evaluation(CONTEXT).batch(0, 3)
    assert batch.segment_ids is not None
    assert batch.input_ids.tolist() == [
        [CLS, A, A, SEP, B, SEP, 0, 0, 0],
        [CLS, A, SEP, B, B, B, B, SEP, 0],
        [CLS, A, A, A, A, SEP, B, B, SEP],
    ]
    assert batch.segment_ids.tolist() == [
        [0, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert batch.model_inputs["segment_ids"] is batch.segment_ids
    for context in (replace(CONTEXT, has_segments=False), replace(CONTEXT, template=None)):
        other = config.build_for_evaluation(context).batch(0, 3)
        assert (other.segment_ids is None) == (not context.has_segments)
    assert other.segment_ids is not None
    assert other.input_ids[0, :4].tolist() == [A, A, SEP, B]
    assert other.segment_ids[0, :4].tolist() == [0, 0, 0, 1]


def test_a_single_text_stands_between_its_marks_and_has_no_segments(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "aaaaaaaaaa"}, {"text": "b"})
    batch = LabelledConfig(path=path, label=None).build_for_evaluation(CONTEXT).batch(0, 2)
    assert batch.segment_ids is None
    assert batch.input_ids.tolist() == [[CLS, *[A] * 7, SEP], [CLS, B, SEP, *[0] * 6]]
    texts = PairsConfig(path=path, positive=None).build_for_evaluation(CONTEXT).batch(0, 2)
    assert torch.equal(texts.input_ids, batch.input_ids)


def test_marks_need_room_beside_a_text(tmp_path: Path) -> None:
    config = LabelledConfig(path=write(tmp_path / "a.jsonl", {"text": "a"}), label=None)
    with pytest.raises(ConfigError, match=r"seq_len=2 has no room for 'text' and the tokens around.* 3 or"):
        config.build(replace(CONTEXT, seq_len=2))
    assert config.build(replace(CONTEXT, seq_len=3)).batch(0, 1).input_ids.tolist() == [[CLS, A, SEP]]


def labelled_pairs(lengths: list[tuple[int, int]]) -> LabelledRows:
    """Rows whose first texts consist of ids 10 to 19 and whose second ones of 20 to 29."""
    rows = [[10 + i % 10 for i in range(a)] + [20 + i % 10 for i in range(b)] for a, b in lengths]
    starts = np.array([a for a, _ in lengths])
    targets = RowTargets(ROW, np.zeros(len(rows), np.int64))
    return LabelledRows(RaggedArray(rows), targets, second_starts=starts)


def expected_segments(batch: Batch) -> torch.Tensor:
    return (batch.input_ids >= 20).long()


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=5)


@given(LENGTHS, st.booleans())
def test_merging_keeps_segments_and_rows_without_any_are_segment_0(
    lengths: list[tuple[int, int]], is_other_first: bool
) -> None:
    own = labelled_pairs(lengths).batch(np.arange(len(lengths)))
    other = replace(labelled_pairs([(9, 1)]).batch(np.zeros(1, np.int64)), segment_ids=None)
    batches = [other, own] if is_other_first else [own, other]
    positions = np.split(np.arange(len(lengths) + 1), [len(batches[0].input_ids)])
    merged = merge_batches(batches, positions)
    assert merged.segment_ids is not None
    expected = expected_segments(merged)
    expected[0 if is_other_first else -1] = 0
    assert torch.equal(merged.segment_ids, expected)


@given(LENGTHS, st.sampled_from([None, [15], [25]]))
def test_views_with_dropped_tokens_keep_each_tokens_segment(
    lengths: list[tuple[int, int]], replacements: list[int] | None
) -> None:
    numbers = torch.arange(len(lengths))
    batch = replace(labelled_pairs(lengths).batch(np.arange(len(lengths))), sequence_numbers=numbers)
    dropout = TokenDropout(
        rate=0.4,
        is_special=np.zeros(40, np.bool_),
        starts_word=None,
        replacements=None if replacements is None else np.array(replacements),
    )
    views = TextViews(dropouts=[replace(dropout, rate=0.0), dropout], seed=3)(batch)
    width = views.input_ids.shape[1]
    for view in (0, 1):
        rows = rows_of_view(views, view)
        assert rows.segment_ids is not None
        if view == 0 or replacements is None:
            assert torch.equal(rows.segment_ids, expected_segments(rows))
        else:
            assert torch.equal(rows.segment_ids, expected_segments(batch)[:, :width])
    without = TextViews(dropouts=[dropout], seed=3)(replace(batch, segment_ids=None))
    assert without.segment_ids is None


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_the_pairs_of_an_objective_have_segments_for_a_model_that_tells_them_apart(kind: str) -> None:
    objective = parse(ObjectiveConfig, {"type": kind})
    rows = padded(documents([9, 14, 30]))
    for has_segments in (True, False):
        context = data_context(24, has_segments=has_segments)
        batch = objective.transform_feed(feed(rows), context, 0).batch(0, 3)
        assert (batch.segment_ids is not None) == has_segments
        if batch.segment_ids is None:
            continue
        for ids, segments, length in zip(batch.input_ids, batch.segment_ids, batch.lengths, strict=True):
            cut = ids.tolist().index(context.eos_id) + 1
            assert segments.tolist() == [0] * cut + [1] * (length - cut) + [0] * (len(ids) - length)
