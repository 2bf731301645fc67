"""A reshard's plan, estimate and result to the last byte, for states of several dtypes, without an engine."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from distft.checkpoint import reshard
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import Progress, TokenizerRecord
from distft.checkpoint.reshard import (
    ReshardPlan,
    contiguous_layout,
    estimate_seconds,
    plan_reshard,
    write_distft,
)
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.errors import CheckpointError
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, train_tokenizer
from distft.tokenizer.files import SENTENCEPIECE_FILE as TOKENIZER_FILE

SHAPES = {"a": (3, 5), "empty": (0, 4), "b": (2,), "c": (11,)}
STATES: Mapping[str, Mapping[str, torch.dtype]] = {
    "a": {WEIGHT: torch.bfloat16, "exp_avg": torch.float32},
    "empty": {WEIGHT: torch.float32},
    "b": {WEIGHT: torch.float32},
    "c": {WEIGHT: torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float64},
}
NUM_BYTES = 15 * (2 + 4) + 2 * 4 + 11 * (4 + 4 + 8)


def values_of(name: str, state: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(state) * 100 + ord(name[0]))
    return torch.randn(prod(SHAPES[name]), generator=generator, dtype=torch.float64).to(STATES[name][state])


def save(root: Path, attachments: Mapping[str, bytes] | None = None, **metadata: Any) -> Checkpoint:
    snapshot = CheckpointSnapshot(
        progress=Progress(step=3),
        fragments=[Fragment(n, s, 0, values_of(n, s)) for n, states in STATES.items() for s in states],
        parameters={name: ParameterInfo(shape, True, 3) for name, shape in SHAPES.items()},
        metadata=RunMetadata(run_id="test", config={"x": 1}, written_by={}, **metadata),
        attachments=attachments or {},
    )
    return Checkpoint.open(CheckpointStore(str(root), SingleProcess()).save(snapshot))


class CountedReads(Checkpoint):
    """A checkpoint that lists the intervals that are read from it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path, checkpoint.manifest)
        self.reads: list[tuple[str, str, int, int]] = []

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        self.reads.append((parameter, state, start, stop))
        return super().read(parameter, state, start, stop)


def test_an_empty_parameter_lies_with_the_rank_that_the_next_element_goes_to() -> None:
    assert contiguous_layout({"a": 4, "empty": 0, "b": 2}, 3) == [
        {"a": (0, 2)},
        {"a": (2, 4), "empty": (0, 0)},
        {"b": (0, 2)},
    ]
    assert contiguous_layout({"empty": 0}, 2) == [{"empty": (0, 0)}, {}]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_plan_counts_the_bytes_that_the_files_will_have(tmp_path: Path, world_size: int) -> None:
    source = save(tmp_path / "run")
    plan = plan_reshard(source, world_size)
    assert plan.num_source_bytes == sum(plan.num_bytes) == NUM_BYTES
    manifest = write_distft(source, str(tmp_path / "out"), world_size=world_size)
    assert [dict(file.intervals) for file in manifest.files] == [dict(part) for part in plan.layout]
    for file, num_bytes in zip(manifest.files, plan.num_bytes, strict=True):
        with safe_open(tmp_path / "out" / file.name, "pt") as tensors:
            found = [tensors.get_tensor(key) for key in tensors.keys()]  # noqa: SIM118 - not a dict
        assert sum(tensor.nbytes for tensor in found) == num_bytes


def test_every_byte_is_kept_and_told_in_chunks_and_by_default_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard, "_CHUNK_NUMEL", 4)
    source = CountedReads(save(tmp_path / "run", label_names=["x", "y"]))
    told: list[int] = []
    manifest = write_distft(source, str(tmp_path / "out"), on_progress=told.append)
    assert [file.name for file in manifest.files] == ["rank_00000.safetensors"]
    assert sum(told) == NUM_BYTES
    assert max(stop - start for _, _, start, stop in source.reads) == 4
    parts = [(start, stop) for name, state, start, stop in source.reads if (name, state) == ("c", WEIGHT)]
    assert parts == [(0, 4), (4, 8), (8, 11)]
    written = Checkpoint.open(str(tmp_path / "out"))
    assert written.manifest == manifest
    assert manifest == source.manifest.model_copy(update={"files": manifest.files})
    for name, states in STATES.items():
        for state, dtype in states.items():
            found = written.read(name, state, 0, prod(SHAPES[name]))
            assert found.dtype == dtype
            assert torch.equal(found, values_of(name, state))


@pytest.mark.parametrize("world_size", [1, 3])
def test_fingerprints_that_the_source_lacks_are_computed_and_the_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(reshard, "_CHUNK_NUMEL", 4)
    source = save(tmp_path / "run")
    expected = source.manifest.parameters
    foreign = {}
    for name, record in expected.items():
        # As in a foreign format: only "b" has them, one that is not looked at.
        fingerprint = "0123456789abcdef" if name == "b" else None
        states = {s: r.model_copy(update={"fingerprint": fingerprint}) for s, r in record.states.items()}
        foreign[name] = record.model_copy(update={"states": states})
    source = Checkpoint(source.path, source.manifest.model_copy(update={"parameters": foreign}))
    written = write_distft(source, str(tmp_path / "out"), world_size=world_size).parameters
    assert written["b"] == foreign["b"]
    assert {n: r for n, r in written.items() if n != "b"} == {n: r for n, r in expected.items() if n != "b"}


def test_a_damaged_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save(tmp_path / "run")
    file = Path(source.file_path(0))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="The checkpoint is damaged"):
        write_distft(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_copied_as_the_one_that_the_manifest_names(tmp_path: Path) -> None:
    train_tokenizer(["a cat sat"] * 9, TokenizerTrainConfig(algorithm="char"), tmp_path / "t.model")
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    record = TokenizerRecord(fingerprint=tokenizer.fingerprint, file=TOKENIZER_FILE)
    source = save(tmp_path / "run", {TOKENIZER_FILE: tokenizer.to_bytes()}, tokenizer=record)
    write_distft(source, str(tmp_path / "out"))
    assert (tmp_path / "out" / TOKENIZER_FILE).read_bytes() == tokenizer.to_bytes()
    assert Checkpoint.open(str(tmp_path / "out")).find_damage() == []


def test_a_run_of_token_shards_has_no_tokenizer_to_copy(tmp_path: Path) -> None:
    source = save(tmp_path / "run", tokenizer=TokenizerRecord(fingerprint="0123"))
    assert write_distft(source, str(tmp_path / "out")).tokenizer == source.manifest.tokenizer
    assert not (tmp_path / "out" / TOKENIZER_FILE).exists()


class Clock:
    """Seconds that advance by two at each look."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


@pytest.mark.parametrize(("num_files", "passes"), [(1, 2.0), (2, 1.0), (64, 0.5)])  # 4 threads
def test_an_estimate_is_the_time_of_a_sample_for_all_bytes_and_both_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int, passes: float
) -> None:
    monkeypatch.setattr(reshard.time, "perf_counter", Clock())
    monkeypatch.setattr(reshard, "_THREADS", 4)
    source = CountedReads(save(tmp_path / "run"))
    plan = plan_reshard(source, num_files)
    assert estimate_seconds(source, plan) == 2 * passes  # two seconds for all of it
    assert estimate_seconds(source, replace(plan, num_source_bytes=10 * NUM_BYTES)) == 20 * passes
    monkeypatch.setattr(reshard, "_SAMPLE_NUMEL", 6)
    source.reads.clear()
    # Six elements of each state of "a" are more than the limit of 24 bytes: the sample ends there.
    assert estimate_seconds(source, plan) == pytest.approx(2 * passes / (6 * (2 + 4)) * NUM_BYTES)
    assert source.reads == [("a", WEIGHT, 0, 6), ("a", "exp_avg", 0, 6)]
    # 90 bytes of "a" are more than 80 and not more than 120.
    for sample, read in ((20, {"a"}), (30, set(SHAPES))):
        monkeypatch.setattr(reshard, "_SAMPLE_NUMEL", sample)
        source.reads.clear()
        estimate_seconds(source, plan)
        assert {name for name, *_ in source.reads} == read


def test_a_checkpoint_without_states_takes_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reshard.time, "perf_counter", Clock())
    source = save(tmp_path / "run")
    nothing = Checkpoint(source.path, source.manifest.model_copy(update={"parameters": {}}))
    assert estimate_seconds(nothing, ReshardPlan([{}], [0], 0)) == 0


def test_ranks_of_a_layout_follow_one_another() -> None:
    layout = contiguous_layout({"a": 10, "b": 7}, 4)
    sizes = [sum(stop - start for start, stop in part.values()) for part in layout]
    assert sizes == [4, 4, 4, 5]
    ends = [part["a"] for part in layout if "a" in part]
    assert all(first[1] == second[0] for first, second in pairwise(ends))
