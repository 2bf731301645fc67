"""What a worker sees to before it trains."""

from pathlib import Path

import pytest
from small_runs import pretraining

from distft.cluster.worker import Assignment, work
from distft.config import parse
from distft.errors import ConfigError, StorageError
from distft.run.config import RunConfig
from distft.run.train import run_training


class _Rank:
    def get_world_rank(self) -> int:
        return 0

    get_local_rank = get_world_rank

    def get_world_size(self) -> int:
        return 1


def test_a_node_that_does_not_share_what_it_should_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.train.get_context", _Rank)
    monkeypatch.setattr("distft.cluster.worker._has_begun", lambda _mailbox: False)
    config: RunConfig = parse(RunConfig, pretraining(tmp_path, tmp_path))
    assignment = Assignment(
        config=config,
        train=run_training,
        mailbox=None,
        working_dir=tmp_path / "not here",
        witness=tmp_path / "not seen",
    )
    with pytest.raises(ConfigError) as told:
        work(assignment)
    first, second = str(told.value).splitlines()  # both faults at once
    assert "not here" in first
    assert str(tmp_path) in second


def test_shared_storage_that_went_away_in_a_run_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is worth another try, unlike the mistake above."""
    monkeypatch.setattr("ray.train.get_context", _Rank)
    monkeypatch.setattr("distft.cluster.worker._has_begun", lambda _mailbox: True)
    config: RunConfig = parse(RunConfig, pretraining(tmp_path, tmp_path))
    assignment = Assignment(
        config=config, train=run_training, mailbox=None, working_dir=None, witness=tmp_path / "gone"
    )
    with pytest.raises(StorageError, match="not what it was") as told:
        work(assignment)
    assert told.value.exit_code == 1
