"""Pruning keeps the newest valid checkpoints, also where a damaged one is newer."""

from pathlib import Path

import pytest
from support.engine_scenarios import Scenario, Training, run_alone

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.store import CheckpointStore
from distft.cli.main import main
from distft.collectives import SingleProcess
from distft.topology import Topology

ALL = Scenario(micro_batch_size=8)
KEEP_ONE = CheckpointConfig(keep_last=1)


def _with_a_damaged_commit(root: Path) -> CheckpointStore:
    """Commits of steps 2 and 4, of which the newer one is damaged."""
    store = CheckpointStore(str(root), SingleProcess())
    training = run_alone(ALL, 0)
    for step in (2, 4):
        training.run(step)
        store.save(training.take_snapshot())
    Path(store.path(4), "rank_00000.safetensors").write_bytes(b"")
    return store


def test_a_damaged_commit_does_not_count_among_those_to_keep(tmp_path: Path) -> None:
    store = _with_a_damaged_commit(tmp_path)
    found = store.find_latest_valid()
    store.resume_from(found)
    training = Training(ALL, Topology(), SingleProcess(), found.checkpoint)
    for step, pruned, left in ((3, [2], {3, 4}), (5, [3], {5})):
        training.run(step)
        store.save(training.take_snapshot())
        assert store.prune(KEEP_ONE) == pruned
        assert {int(path.name[-1]) for path in tmp_path.iterdir()} == left
        newest = CheckpointStore(str(tmp_path), SingleProcess()).find_latest_valid().checkpoint
        assert newest is not None
        assert newest.step == step


@pytest.mark.parametrize(
    ("options", "summary"),
    [
        ([], "deleted no step; kept step 2."),
        (["--dry-run"], "would delete no step; would keep step 2."),
    ],
)
def test_the_command_prune_keeps_the_newest_valid_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], summary: str
) -> None:
    _with_a_damaged_commit(tmp_path)
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1", *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}: {summary}\n"
    assert "step 4: " in printed.err
    assert Checkpoint.open(str(tmp_path / "step_00000002")).find_damage() == []
