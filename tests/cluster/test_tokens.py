"""The token file that distft makes is readable for its owner only, and a cluster accepts no other token."""

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

CLIENTS = Path(__file__).with_name("token_clients.py")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_file_is_readable_for_its_owner_only(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    path = ensure_token(environ)
    assert path == tmp_path / ".ray/auth_token"  # where the ray command looks
    assert environ == {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    assert (_mode(path), _mode(path.parent)) == (0o600, 0o700)
    assert len(path.read_text()) == 64
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_a_token_file_is_at_no_time_readable_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    os_open = os.open

    def recording_open(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = os_open(path, flags, mode)
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", recording_open)
    before = os.umask(0)
    try:
        ensure_token({"HOME": str(tmp_path)})
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_an_existing_token_stays_and_loses_the_permissions_of_others(tmp_path: Path) -> None:
    path = tmp_path / ".ray/auth_token"
    path.parent.mkdir()
    path.write_text("made by Ray")
    path.chmod(0o644)
    assert ensure_token({"HOME": str(tmp_path)}) == path
    assert (path.read_text(), _mode(path)) == ("made by Ray", 0o600)


def test_concurrent_callers_get_the_same_token(tmp_path: Path) -> None:
    seen: list[str] = []

    def get_token() -> None:
        path = ensure_token({"HOME": str(tmp_path)})
        assert path is not None
        seen.append(path.read_text())

    threads = [threading.Thread(target=get_token) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 16
    assert len(set(seen)) == 1


@pytest.mark.parametrize("chosen", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "t" * 64}])
def test_the_users_own_settings_stay(chosen: Mapping[str, str], tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), **chosen}
    assert ensure_token(environ) is None
    assert environ.items() >= chosen.items()
    assert "RAY_AUTH_TOKEN_PATH" not in environ
    assert list(tmp_path.iterdir()) == []


def test_the_token_is_made_in_the_file_that_the_user_named(tmp_path: Path) -> None:
    chosen = tmp_path / "shared/token"
    assert ensure_token({"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(chosen)}) == chosen
    assert (_mode(chosen), _mode(chosen.parent)) == (0o600, 0o700)


def test_an_unusable_token_file_is_reported(tmp_path: Path) -> None:
    empty, below_a_file = tmp_path / "empty", tmp_path / "empty/token"
    empty.touch()
    for path, message in ((empty, "is empty"), (below_a_file, "cannot be used")):
        with pytest.raises(ConfigError, match=message):
            ensure_token({"RAY_AUTH_TOKEN_PATH": str(path)})


def test_the_command_prints_the_path_and_not_the_token(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cluster.tokens"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    path = tmp_path / ".ray/auth_token"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    assert path.read_text() not in done.stdout


@pytest.mark.ray
def test_a_cluster_accepts_the_right_token_only(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(CLIENTS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    token = (tmp_path / ".ray/auth_token").read_text()

    assert result["right"] == "accepted"
    assert "refused" in result["wrong"]
    assert "refused" in result["none"]
    assert _mode(tmp_path / ".ray/auth_token") == 0o600
    assert token not in done.stdout + done.stderr
    assert result["seen_in"] == []  # command lines, environments and logs of the cluster's processes
    assert result["num_processes"] >= 3
