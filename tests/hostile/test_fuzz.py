"""Files with random damage are read, or end in one of distft's own errors. `tools/fuzz.py` runs longer."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile.fuzzing import EDITS, Edit, Subject, make_subjects
from hostile.guard import Guard

NAMES = (
    "checkpoint",
    "checkpoint to huggingface",
    "huggingface",
    "deepspeed",
    "universal",
    "token shards",
    "text",
    "jsonl",
    "labelled jsonl",
    "zstd",
    "parquet",
    "labelled parquet",
    "csv",
    "run.yaml",
    "tokenizer",
    "qwen tokenizer",
    "gpt2 tokenizer",
    "vocab.txt tokenizer",
)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {subject.name: subject for subject in make_subjects(tmp_path_factory.mktemp("fuzz"))}


def test_every_format_is_fuzzed(subjects: dict[str, Subject]) -> None:
    assert tuple(subjects) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused(
    name: str, subjects: dict[str, Subject], guard: Guard, tmp_path: Path
) -> None:
    subject = subjects[name]

    @settings(
        max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    )
    @given(file=st.sampled_from(subject.files()), edits=EDITS)
    def check(file: str, edits: list[Edit]) -> None:
        subject.check(guard, tmp_path / "scratch", file, edits)

    check()
