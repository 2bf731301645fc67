"""Checks that a worker makes on its node before it trains."""

from pathlib import Path

import pytest
from support.small_runs import pretraining

from distft.cluster.worker import WorkerTask, run_worker
from distft.config import parse
from distft.errors import ConfigError, StorageError
from distft.run.config import RunConfig
from distft.run.train import run_training


class SingleRank:
    """Ray Train's context of a worker that is the only one."""

    def get_world_rank(self) -> int:
        return 0

    get_local_rank = get_world_rank

    def get_world_size(self) -> int:
        return 1


def test_a_node_without_the_shared_directories_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.train.get_context", SingleRank)
    monkeypatch.setattr("distft.cluster.worker._has_ever_started", lambda _mailbox: False)
    config: RunConfig = parse(RunConfig, pretraining(tmp_path, tmp_path))
    task = WorkerTask(
        config=config,
        train=run_training,
        mailbox=None,
        working_dir=tmp_path / "not here",
        storage_marker=tmp_path / "not seen",
    )
    with pytest.raises(ConfigError) as raised:
        run_worker(task)
    first, second = str(raised.value).splitlines()  # both problems at once
    assert "not here" in first
    assert str(tmp_path) in second


def test_losing_shared_storage_during_a_run_is_retryable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike the mistake above."""
    monkeypatch.setattr("ray.train.get_context", SingleRank)
    monkeypatch.setattr("distft.cluster.worker._has_ever_started", lambda _mailbox: True)
    config: RunConfig = parse(RunConfig, pretraining(tmp_path, tmp_path))
    task = WorkerTask(
        config=config, train=run_training, mailbox=None, working_dir=None, storage_marker=tmp_path / "gone"
    )
    with pytest.raises(StorageError, match="no longer the driver's") as raised:
        run_worker(task)
    assert raised.value.exit_code == 1
