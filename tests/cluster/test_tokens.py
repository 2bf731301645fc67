"""Whoever starts a cluster has a token that nobody else can read, and the cluster takes no other."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from distft.cluster.tokens import ensure_token
from distft.errors import ConfigError

GUARDED = Path(__file__).with_name("guarded.py")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_owner_only(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    path = ensure_token(environ)
    assert path == tmp_path / ".ray/auth_token"  # where the ray command looks
    assert environ == {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    assert (_mode(path), _mode(path.parent)) == (0o600, 0o700)
    assert len(path.read_text()) == 64
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_a_token_is_at_no_moment_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    opened = os.open

    def watched(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        ensure_token({"HOME": str(tmp_path)})
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_token_stays_and_one_that_ray_made_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / ".ray/auth_token"
    path.parent.mkdir()
    path.write_text("made by Ray")
    path.chmod(0o644)
    assert ensure_token({"HOME": str(tmp_path)}) == path
    assert (path.read_text(), _mode(path)) == ("made by Ray", 0o600)


def test_all_who_come_at_once_have_the_same_token(tmp_path: Path) -> None:
    seen: list[str] = []

    def come() -> None:
        path = ensure_token({"HOME": str(tmp_path)})
        assert path is not None
        seen.append(path.read_text())

    threads = [threading.Thread(target=come) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 16
    assert len(set(seen)) == 1


@pytest.mark.parametrize("chosen", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "t" * 64}])
def test_what_the_user_chose_stands(chosen: Mapping[str, str], tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), **chosen}
    assert ensure_token(environ) is None
    assert environ.items() >= chosen.items()
    assert "RAY_AUTH_TOKEN_PATH" not in environ
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_user_named_is_made_there(tmp_path: Path) -> None:
    chosen = tmp_path / "shared/token"
    assert ensure_token({"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(chosen)}) == chosen
    assert (_mode(chosen), _mode(chosen.parent)) == (0o600, 0o700)


def test_a_file_that_cannot_hold_a_token_is_told(tmp_path: Path) -> None:
    empty, below_a_file = tmp_path / "empty", tmp_path / "empty/token"
    empty.touch()
    for path, told in ((empty, "is empty"), (below_a_file, "cannot be used")):
        with pytest.raises(ConfigError, match=told):
            ensure_token({"RAY_AUTH_TOKEN_PATH": str(path)})


def test_the_command_prints_the_file_and_not_the_token(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cluster.tokens"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    path = tmp_path / ".ray/auth_token"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    assert path.read_text() not in done.stdout


@pytest.mark.ray
def test_a_cluster_of_ours_takes_the_right_token_only(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(GUARDED)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    token = (tmp_path / ".ray/auth_token").read_text()

    assert told["right"] == "taken"
    assert "refused" in told["wrong"]
    assert "refused" in told["none"]
    assert _mode(tmp_path / ".ray/auth_token") == 0o600
    assert token not in done.stdout + done.stderr
    assert told["seen_in"] == []  # command lines, environments and logs of the cluster's processes
    assert told["num_processes"] >= 3
