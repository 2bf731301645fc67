"""A run whose rank is killed at any moment resumes on another number of ranks with the same losses."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import RanksError, run_ranks, start_ranks
from support.small_runs import events, logged, pretraining, run

from distft.run.audit import audit_run
from distft.topology import Topology

NUM_STEPS = 16


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    run(Topology(), _config(data, run_dir, None))
    return logged(run_dir)


def _config(data: Path, run_dir: Path, stage: int | None) -> dict[str, Any]:
    engine = {"type": "local"} if stage is None else {"type": "zero", "zero_stage": stage}
    return pretraining(
        data,
        run_dir,
        engine=engine,
        train={"max_steps": NUM_STEPS, "log_every_steps": 1},
        checkpoint={"every_steps": 3},
    )


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "first", "second"), [(2, 2, 1), (3, 2, 3)])
def test_after_a_rank_is_killed_the_run_resumes_with_the_same_losses_and_sequences(
    data: Path,
    tmp_path: Path,
    undisturbed: dict[int, float],
    random_seed: int,
    stage: int,
    first: int,
    second: int,
) -> None:
    raw, source = _config(data, tmp_path, stage), random.Random(random_seed)
    kill_step, killed_rank = source.randrange(4, NUM_STEPS - 3), source.randrange(first)
    with start_ranks(run, first, raw) as ranks:
        while _last_step(tmp_path) < kill_step:
            time.sleep(0.01)
        ranks.kill(killed_rank, signal.SIGKILL)
        with pytest.raises(RanksError, match="SIGKILL"):
            ranks.wait(timeout_s=300)
    run_ranks(run, second, raw)
    assert logged(tmp_path) == pytest.approx(undisturbed, abs=1e-5), f"killed at step {kill_step}"
    assert [event["kind"] for event in events(tmp_path)].count("resume") == 1
    audit, _ = audit_run(str(tmp_path))
    assert audit.is_exact
    assert audit.world_sizes == (first, second)


def _last_step(run_dir: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(logged(run_dir), default=0)
    return 0


def _train_and_die_in_save(topology: Topology, raw: dict[str, Any], where: str) -> None:
    """Train; rank 1 (rank 0 for the manifest) kills itself during the second save."""
    from distft import storage
    from distft.checkpoint import store

    seen = {"saves": 0}
    write, commit = store.write_rank_file, storage.commit_unless_changed

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_rank_file(path: str, fragments: Any, **options: Any) -> Any:
        seen["saves"] += 1
        dies_here = seen["saves"] == 2 and topology.rank == 1
        if dies_here and where == "before the file":
            die()
        if dies_here and where == "in the file":
            Path(path).write_bytes(b"half a header")
            die()
        written = write(path, fragments, **options)
        if dies_here and where == "after the file":
            die()
        return written

    def commit_unless_changed(path: Any, data: bytes, **options: Any) -> bool:
        if seen["saves"] == 2 and str(path).endswith("manifest.json") and where == "before the manifest":
            die()
        return commit(path, data, **options)

    store.write_rank_file = write_rank_file
    storage.commit_unless_changed = commit_unless_changed
    run(topology, raw)


@pytest.mark.ranks
@pytest.mark.parametrize("where", ["before the file", "in the file", "after the file", "before the manifest"])
def test_a_rank_killed_during_a_save_leaves_the_previous_checkpoint_intact(
    data: Path, tmp_path: Path, undisturbed: dict[int, float], where: str
) -> None:
    raw = _config(data, tmp_path, 1)
    with pytest.raises(RanksError, match="SIGKILL"):
        run_ranks(_train_and_die_in_save, 2, raw, where, timeout_s=300)
    assert [event["path"][-1] for event in events(tmp_path) if event["kind"] == "save"] == ["3"]
    run(Topology(), {**raw, "engine": {"type": "local"}})
    resumed = [event["step"] for event in events(tmp_path) if event["kind"] == "resume"]
    assert resumed == [3]
    assert logged(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
