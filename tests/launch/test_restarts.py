"""Under the plain launchers a run that dies goes on from its last commit, at whatever world size."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_runs import events, logged, make_text_data, pretraining, run

from distft.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 40
START_S = 90.0  # for ranks to import everything on a busy machine


def _torchrun(num_ranks: int, max_restarts: int) -> list[str]:
    launcher = "torch.distributed.run --standalone"
    return f"{launcher} --nproc-per-node {num_ranks} --max-restarts {max_restarts} -m distft train".split()


def _deepspeed(num_ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = f"deepspeed.launcher.runner --num_gpus {num_ranks} --master_port {port}"
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
    """A launcher at work on the run; none of its processes is left afterwards."""
    run_dir.mkdir(exist_ok=True)
    config = run_dir / "given.yaml"
    # JSON is YAML.
    config.write_text(
        json.dumps({**raw, "run_dir": str(run_dir), "engine": {"type": "zero", "zero_stage": 1}})
    )
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
            for one in [*launch.processes(), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


class _Launch:
    def __init__(self, process: Any, run_dir: Path) -> None:
        self._process = process
        self._run_dir = run_dir

    def processes(self) -> list[Any]:
        try:
            return self._process.children(recursive=True)  # type: ignore[no-any-return]
        except psutil.NoSuchProcess:
            return []

    def strike(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to `rank`, once the present attempt has committed."""
        num_attempts = len(self._events("start", "resume"))
        self._wait(lambda: len(self._events("start", "resume")) > num_attempts)
        num_saves = len(self._events("save"))
        self._wait(lambda: len(self._events("save")) > num_saves)
        (struck,) = (one for one in self.processes() if one.environ().get("RANK") == str(rank))
        struck.send_signal(number)

    def wait(self) -> int:
        self._wait(lambda: self._process.poll() is not None)
        return int(self._process.returncode)

    def _events(self, *kinds: str) -> list[dict[str, Any]]:
        if not (self._run_dir / "events.jsonl").exists():
            return []
        return [event for event in events(self._run_dir) if event["kind"] in kinds]

    def _wait(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not is_true():
            assert time.monotonic() < deadline, (self._run_dir / "output.txt").read_text()[-4000:]
            time.sleep(0.01)


@pytest.mark.ranks
@pytest.mark.slow
def test_torchrun_starts_a_run_again_after_a_rank_is_killed_and_after_one_is_stopped(
    raw: dict[str, Any], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with _started(raw, tmp_path, _torchrun(2, max_restarts=2)) as launch:
        launch.strike(1, signal.SIGKILL)
        launch.strike(0, signal.SIGSTOP)
        assert launch.wait() == 0, (tmp_path / "output.txt").read_text()
    assert logged(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
    story = [event["kind"] for event in events(tmp_path) if event["kind"] not in {"save", "ledger"}]
    assert [kind for kind in story if kind != "finish"] == ["start", "resume", "hang", "resume"]


@pytest.mark.ranks
@pytest.mark.slow
def test_deepspeed_ends_a_run_whose_rank_is_killed_and_goes_on_at_another_world_size(
    raw: dict[str, Any], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with _started(raw, tmp_path, _deepspeed(2)) as launch:
        launch.strike(1, signal.SIGKILL)
        assert launch.wait() != 0
    with _started(raw, tmp_path, _deepspeed(1)) as launch:
        assert launch.wait() == 0, (tmp_path / "output.txt").read_text()
    assert logged(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
    assert [e["world_size"] for e in events(tmp_path) if e["kind"] in {"start", "resume"}] == [2, 1]
