"""Runs whose checkpoints the tests of the tools use."""

import shutil
from pathlib import Path

import pytest
from support.checkpoint_cli import FROZEN, SavedTraining
from support.engine_scenarios import run_alone
from support.small_runs import make_text_data, pretraining, run

from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.topology import Topology


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedTraining:
    store = CheckpointStore(str(tmp_path_factory.mktemp("saved") / "checkpoints"), SingleProcess())
    training = run_alone(FROZEN, 2)
    store.save(training.take_snapshot())
    training.run(3)
    return SavedTraining(training, Path(store.save(training.take_snapshot())))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer, saved at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    raw = pretraining(make_text_data(folder), folder / "run", train={"max_steps": 4})
    run(Topology(), {**raw, "checkpoint": {"every_steps": 2}})
    return folder / "run"


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"
