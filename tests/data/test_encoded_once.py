"""Encoded rows that one of several processes makes for all: the same rows, encoded once."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.data.completion import CompletionConfig
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.labelled import LabelledConfig
from distft.errors import DataError

KINDS: dict[str, Callable[[str], Any]] = {
    "labelled": lambda path: LabelledConfig(path=path),
    "completion": lambda path: CompletionConfig(path=path, prompt="text", completion="label"),
}


class Encoder:
    """Counts the texts that it encodes, over all threads that stand for ranks."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.texts.append(text)
        return list(text.encode())


def context(encoder: Encoder, cache_dir: Path | None, **changes: Any) -> DataContext:
    whole = DataContext(
        seq_len=6,
        vocab_size=256,
        encode=encoder,
        tokenizer_fingerprint="bytes",
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    return replace(whole, **changes)


def write(path: Path, num_rows: int = 40) -> str:
    rows = [{"text": f"text {i % 9}", "label": f"label {i % 3}"} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(feed: Feed) -> list[Any]:
    batch = feed.batch(0, feed.num_sequences)
    return [
        batch.input_ids.tolist(),
        [t.tolist() for t in batch.targets.values()],
        feed.label_names,
        feed.summary,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_a_directory_get_the_rows_of_a_rank_alone_and_encode_them_once(
    tmp_path: Path, kind: str
) -> None:
    config = KINDS[kind](write(tmp_path / "rows.jsonl"))
    alone, shared = Encoder(), Encoder()
    expected = config.build_for_evaluation(context(alone, None))

    def rank(_: int) -> Feed:
        return config.build_for_evaluation(context(shared, tmp_path / "run"))  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as ranks:
        feeds = list(ranks.map(rank, range(4)))
    assert [rows_of(feed) for feed in feeds] == [rows_of(expected)] * 4
    assert {feed.fingerprint for feed in feeds} == {expected.fingerprint}
    assert len(shared.texts) == len(alone.texts) == 80 // (1 if kind == "completion" else 2)


@pytest.mark.parametrize(
    "change", [{"seq_len": 5}, {"tokenizer_fingerprint": "others"}, {"eos_id": 3}, {"vocab_size": 300}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_another_tokenizer_or_size_or_content_is_encoded_anew(
    tmp_path: Path, kind: str, change: dict[str, Any]
) -> None:
    config, encoder = KINDS[kind](write(tmp_path / "rows.jsonl")), Encoder()
    config.open(context(encoder, tmp_path / "run"))
    once = len(encoder.texts)
    config.open(context(encoder, tmp_path / "run"))
    assert len(encoder.texts) == once
    config.open(context(encoder, tmp_path / "run", **change))
    assert len(encoder.texts) == 2 * once
    write(tmp_path / "rows.jsonl", 41)
    config.open(context(encoder, tmp_path / "run"))
    assert len(encoder.texts) > 3 * once


def test_every_rank_raises_the_errors_of_the_rows_which_are_encoded_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "", "label": "y"}\n')
    encoder = Encoder()
    for _ in range(3):
        with pytest.raises(DataError, match=r"rows\.jsonl:2: 'text'"):
            LabelledConfig(path=str(path)).open(context(encoder, tmp_path / "run"))
    assert len(encoder.texts) <= 2
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    assert LabelledConfig(path=str(path)).open(context(encoder, tmp_path / "run"))[0].num_sequences == 2


@pytest.mark.parametrize("damage", ["cut", "dtype", "offsets", "facts"])
def test_damaged_rows_are_encoded_again(tmp_path: Path, damage: str) -> None:
    config, encoder = LabelledConfig(path=write(tmp_path / "rows.jsonl")), Encoder()
    expected = rows_of(config.build_for_evaluation(context(encoder, tmp_path / "run")))
    (entry,) = [path for path in (tmp_path / "run").iterdir() if path.is_dir()]
    if damage == "cut":
        (entry / "values.npy").write_bytes((entry / "values.npy").read_bytes()[:-4])
    elif damage == "dtype":
        np.save(entry / "values.npy", np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    elif damage == "offsets":
        np.save(entry / "offsets.npy", np.array([0, 10**9]))
    else:
        (entry / "facts.json").write_text("{")
    assert rows_of(config.build_for_evaluation(context(encoder, tmp_path / "run"))) == expected


def test_where_nothing_can_be_written_each_rank_encodes_for_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config, encoder = LabelledConfig(path=write(tmp_path / "rows.jsonl")), Encoder()
    for _ in range(2):
        assert config.open(context(encoder, tmp_path / "file" / "run"))[0].num_sequences == 40
    assert len(encoder.texts) == 80
