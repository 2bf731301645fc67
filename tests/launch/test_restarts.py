"""Under torchrun and DeepSpeed's launcher a run that dies resumes from its last checkpoint."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.ports import free_port
from support.small_runs import events, logged, make_text_data, pretraining, run

from distft.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 40
LAUNCHER_GRACE_S = 30.0  # from SIGTERM to SIGKILL, of torchrun
STARTUP_TIMEOUT_S = 300.0  # only for a run that would never start or end


def _torchrun(num_ranks: int, max_restarts: int) -> list[str]:
    launcher = "torch.distributed.run --standalone"
    return f"{launcher} --nproc-per-node {num_ranks} --max-restarts {max_restarts} -m distft train".split()


def _deepspeed(num_ranks: int) -> list[str]:
    launcher = f"deepspeed.launcher.runner --num_gpus {num_ranks} --master_port {free_port()}"
    return [*launcher.split(), str(ROOT / "launch" / "deepspeed_train.py")]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("launch")
    return pretraining(
        make_text_data(folder / "data"),
        folder / "undisturbed",
        train={"max_steps": NUM_STEPS, "log_every_steps": 1},
        checkpoint={"every_steps": 5},
        heartbeat_s=0.2,
        hang_timeout_s=2.0,
    )


@pytest.fixture(scope="module")
def undisturbed(raw: dict[str, Any]) -> dict[int, float]:
    run(Topology(), raw)
    return logged(Path(raw["run_dir"]))


@contextlib.contextmanager
def _started(raw: dict[str, Any], run_dir: Path, launcher: list[str]) -> Iterator["_Launch"]:
    """A launcher training the run on ZeRO 1. At the end of the block all its processes are killed."""
    run_dir.mkdir(exist_ok=True)
    config = run_dir / "given.yaml"
    settings = {**raw, "run_dir": str(run_dir), "engine": {"type": "zero", "zero_stage": 1}}
    config.write_text(json.dumps(settings))  # JSON is YAML
    with (run_dir / "output.txt").open("ab") as output:
        process = psutil.Popen(
            [sys.executable, "-m", *launcher, str(config)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        launch = _Launch(process, run_dir)
        try:
            yield launch
        finally:
            for started in [*launch.processes(), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
            process.wait()


class _Launch:
    """A running launcher: its processes, and the events of its run."""

    def __init__(self, process: Any, run_dir: Path) -> None:
        self._process = process
        self._run_dir = run_dir

    def processes(self) -> list[Any]:
        try:
            return self._process.children(recursive=True)  # type: ignore[no-any-return]
        except psutil.NoSuchProcess:
            return []

    def send_signal_after_commit(self, rank: int, number: signal.Signals) -> None:
        """Wait until ranks have started anew and saved, then send `number` to `rank`."""
        num_starts = len(self._events("start", "resume"))
        self._wait_until(lambda: len(self._events("start", "resume")) > num_starts)
        num_saves = len(self._events("save"))
        self._wait_until(lambda: len(self._events("save")) > num_saves)
        (process,) = (process for process in self.processes() if process.environ().get("RANK") == str(rank))
        process.send_signal(number)

    def stop_after_commit(self, number: signal.Signals) -> float:
        """Wait until ranks have saved, then send `number` to the launcher; the time until all have ended."""
        self._wait_until(lambda: bool(self._events("save")))
        ranks = self.processes()
        began = time.monotonic()
        self._process.send_signal(number)
        self._wait_until(lambda: not any(process.is_running() for process in ranks))
        self._wait_until(lambda: self._process.poll() is not None)
        return time.monotonic() - began

    def wait(self) -> int:
        """The launcher's exit code."""
        self._wait_until(lambda: self._process.poll() is not None)
        return int(self._process.returncode)

    def _events(self, *kinds: str) -> list[dict[str, Any]]:
        if not (self._run_dir / "events.jsonl").exists():
            return []
        return [event for event in events(self._run_dir) if event["kind"] in kinds]

    def _wait_until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while not is_true():
            assert time.monotonic() < deadline, (self._run_dir / "output.txt").read_text()[-4000:]
            time.sleep(0.01)


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_torchrun_a_run_that_never_logs_saves_and_ends_within_the_launchers_grace(
    raw: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    endless = {**raw, "train": {"max_steps": 10**6, "log_every_steps": 10**6}, "validation": None}
    with _started({**endless, "checkpoint": {"every_steps": 97}}, tmp_path, _torchrun(2, 0)) as launch:
        stop_s = launch.stop_after_commit(number)
    saved = [event["step"] for event in events(tmp_path) if event["kind"] == "save"]
    assert saved[-1] > saved[0]
    assert saved[-1] % 97
    assert logged(tmp_path) == {}
    assert stop_s < LAUNCHER_GRACE_S / 2, stop_s
    output = (tmp_path / "output.txt").read_text()
    assert f"Stopped at step {saved[-1]} as asked" in output
    assert "distft/run/train.py" not in output  # no traceback of a rank; torchrun prints its own


@pytest.mark.ranks
@pytest.mark.slow
def test_torchrun_restarts_a_run_after_a_killed_and_after_a_hung_rank(
    raw: dict[str, Any], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with _started(raw, tmp_path, _torchrun(2, max_restarts=2)) as launch:
        launch.send_signal_after_commit(1, signal.SIGKILL)
        launch.send_signal_after_commit(0, signal.SIGSTOP)
        assert launch.wait() == 0, (tmp_path / "output.txt").read_text()
    assert logged(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
    kinds = [event["kind"] for event in events(tmp_path)]
    # A busy machine may also make a rank slow for a while, which ends nothing.
    expected_kinds = {"data", "save", "ledger", "finish", "straggler"}
    starts_and_hangs = [kind for kind in kinds if kind not in expected_kinds]
    assert starts_and_hangs == ["start", "resume", "hang", "resume"]


@pytest.mark.ranks
@pytest.mark.slow
def test_deepspeed_ends_a_run_with_a_killed_rank_and_a_new_start_resumes_it_with_fewer_ranks(
    raw: dict[str, Any], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with _started(raw, tmp_path, _deepspeed(2)) as launch:
        launch.send_signal_after_commit(1, signal.SIGKILL)
        assert launch.wait() != 0
    with _started(raw, tmp_path, _deepspeed(1)) as launch:
        assert launch.wait() == 0, (tmp_path / "output.txt").read_text()
    assert logged(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
    assert [e["world_size"] for e in events(tmp_path) if e["kind"] in {"start", "resume"}] == [2, 1]
