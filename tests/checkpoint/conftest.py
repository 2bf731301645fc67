"""Runs whose checkpoints the tools are tried on."""

import shutil
from pathlib import Path

import pytest
from engine_scenarios import Training, run_alone
from small_runs import make_text_data, pretraining, run
from tool_calls import FROZEN

from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.topology import Topology


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Three steps with a frozen part, saved at steps 2 and 3."""
    store = CheckpointStore(str(tmp_path_factory.mktemp("saved") / "checkpoints"), SingleProcess())
    training = run_alone(FROZEN, 2)
    store.save(training.draft())
    training.run(3)
    training.path = store.save(training.draft())  # type: ignore[attr-defined]
    return training


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer, saved at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    raw = pretraining(make_text_data(folder), folder / "run", train={"max_steps": 4})
    run(Topology(), {**raw, "checkpoint": {"every_steps": 2}})
    return folder / "run"


@pytest.fixture
def copied_run(whole_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"
