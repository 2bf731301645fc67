import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.config import parse
from distft.data.dataset import DataContext
from distft.data.pairs import PairsConfig
from distft.data.records import read_records
from distft.data.targets import IGNORE_INDEX, PAIR, SCORE
from distft.errors import ConfigError, DataError

CONTEXT = DataContext(
    seq_len=8,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text.strip()],
    tokenizer_fingerprint="letters",
)
ROWS: list[dict[str, Any]] = [
    {"text": "how far", "positive": "a mile", "hard": "a lot", "score": 4.5},
    {"text": "who", "positive": "everyone and more", "hard": "where", "score": "1"},
    {"text": "when", "positive": "now", "hard": "then", "score": 0},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_of(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


def test_a_sequence_has_a_row_for_each_column_cut_at_the_end(tmp_path: Path) -> None:
    config = PairsConfig(path=write(tmp_path / "a.jsonl", ROWS), negatives=("hard",), score="score")
    feed = config.build_for_evaluation(CONTEXT)
    batch = feed.batch(1, 3)
    assert (feed.num_sequences, batch.rows_per_sequence) == (3, 3)
    found = [text_of(ids[:n]) for ids, n in zip(batch.input_ids, batch.lengths, strict=True)]
    assert found == ["who", "everyone", "where", "when", "now", "then"]
    assert batch.sequence_numbers.tolist() == [1, 1, 1, 2, 2, 2]
    assert batch.targets[PAIR].tolist() == [0, IGNORE_INDEX, IGNORE_INDEX] * 2
    assert batch.targets[SCORE].tolist() == [1.0] * 3 + [0.0] * 3
    assert batch.num_targets == {PAIR: 2}
    assert "3 rows of 3 texts each" in feed.summary
    assert "'positive': median 6, 95 % at most 17, longest 17; 1 cut to seq_len=8" in feed.summary


def test_an_empty_range_is_one_sequence_without_targets(tmp_path: Path) -> None:
    feed = PairsConfig(path=write(tmp_path / "a.jsonl", ROWS)).build(CONTEXT)
    batch = feed.batch(5, 5)
    assert (len(batch.input_ids), batch.num_targets) == (2, {PAIR: 0})
    assert batch.targets[PAIR].tolist() == [IGNORE_INDEX] * 2


def test_texts_alone_are_sequences_of_one_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    batch = PairsConfig(path=path, positive=None).build_for_evaluation(CONTEXT).batch(0, 2)
    assert batch.rows_per_sequence == 1
    assert [text_of(ids) for ids in batch.input_ids] == ["one", "two"]


def test_pairs_of_a_low_score_are_left_out(tmp_path: Path) -> None:
    config = PairsConfig(path=write(tmp_path / "a.jsonl", ROWS), score="score", min_score=1)
    feed = config.build_for_evaluation(CONTEXT)
    assert feed.num_sequences == 2
    assert "1 of a low score left out" in feed.summary
    with pytest.raises(DataError, match="none of its 3 rows has a 'score' of 5 or more"):
        config.model_copy(update={"min_score": 5.0}).build(CONTEXT)


def test_ranks_read_what_one_of_them_encoded(tmp_path: Path) -> None:
    config = PairsConfig(path=write(tmp_path / "a.jsonl", ROWS), score="score", negatives=("hard",))
    shared = replace(CONTEXT, cache_dir=str(tmp_path / "cache"))
    rows = [config.open(context).batch(torch.tensor([2, 0]).numpy()) for context in (CONTEXT, shared, shared)]
    for other in rows[1:]:
        assert other.input_ids.equal(rows[0].input_ids)
        assert other.targets[SCORE].equal(rows[0].targets[SCORE])


@pytest.mark.parametrize(
    ("suffix", "content", "problem"),
    [
        (".jsonl", '{"text": "a", "positive": "b"}\n{"text": "c"}\n', r":2: has no column 'positive'"),
        (".jsonl", '{"text": "a", "positive": null}\n', r":1: 'positive' is null, but must be a string"),
        (".jsonl", '{"text": "a", "positive": "b"}\n{"text": "c", "positive": " "}\n', r":2: 'positive' enc"),
        (".csv", "text,positive\na,b\nc,\n", r":3: 'positive' encodes to no tokens"),
        (".csv", "text,other\na,b\n", r":1: has no column 'positive'"),
        (".tsv", "text\tpositive\na\tb\nc\n", r":3: has 1 columns, but the header has 2"),
    ],
)
def test_a_pair_without_its_second_text_is_an_error_with_file_and_line(
    tmp_path: Path, suffix: str, content: str, problem: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path}{problem}"):
        PairsConfig(path=str(path)).build(CONTEXT)


@pytest.mark.parametrize("score", [None, "high", float("nan"), True, [1]])
def test_a_score_that_is_no_number_is_an_error_with_file_and_line(tmp_path: Path, score: Any) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], "score": score}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'score' is .*, but must be a finite number"):
        PairsConfig(path=path, score="score").build(CONTEXT)


def test_training_data_without_texts_that_differ_is_refused_and_the_share_of_equal_ones_told(
    tmp_path: Path,
) -> None:
    def feed(*rows: tuple[str, ...], training: bool = True) -> str:
        names = ("text", "positive", "hard")[: len(rows[0])]
        path = write(tmp_path / "a.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
        config = PairsConfig(path=path, positive="positive" if len(names) > 1 else None, negatives=names[2:])
        return (config.build(CONTEXT) if training else config.build_for_evaluation(CONTEXT)).summary

    for rows, column in (
        ([("same",), ("same",)], "text"),
        ([("a", "b"), ("a", "c")], "text"),
        ([("a", "c"), ("b", "c")], "positive"),
        ([("a", "longtext1"), ("b", "longtext2")], "positive"),  # equal as cut to seq_len
        ([("a", "c", "c"), ("b", "c", "c")], "positive"),
    ):
        with pytest.raises(DataError, match=rf"a\.jsonl: all 2 texts of '{column}' are equal"):
            feed(*rows)
        feed(*rows, training=False)
    assert (
        "'text': median 1, 95 % at most 1, longest 1; 0 cut to seq_len=8; 50% equal an earlier one"
        in feed(("a", "c", "d"), ("a", "c", "e"))
    )
    assert "equal" not in feed(("a", "b"), ("c", "d"))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_scores_are_read_exactly(tmp_path_factory: pytest.TempPathFactory, score: float) -> None:
    path = write(tmp_path_factory.mktemp("scores") / "a.jsonl", [{"text": "a", "score": score}])
    (record,) = read_records(path, texts=["text"], numbers=["score"])
    assert float(record.values["score"]) == score


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"positive": None, "score": "score"}, "need pairs"),
        ({"positive": None, "negatives": ["hard"]}, "need pairs"),
        ({"positive": "text"}, "the column text is named more than once"),
        ({"min_score": 1}, "min_score needs the column of the scores"),
    ],
)
def test_columns_that_make_no_pairs_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(PairsConfig, {"path": "a.jsonl", **settings})
