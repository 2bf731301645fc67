"""Runs a command in a subprocess, as a user would, and captures its output."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def call(
    *command: str | Path, env: Mapping[str, str], cwd: Path, timeout_s: float = 240
) -> "subprocess.CompletedProcess[str]":
    """Run `command`; the exit code is in the result, and a nonzero one does not raise."""
    texts = [str(word) for word in command]
    return subprocess.run(
        texts, env=dict(env), cwd=cwd, timeout=timeout_s, capture_output=True, text=True, check=False
    )


def call_python(*arguments: str | Path, **rest: Any) -> "subprocess.CompletedProcess[str]":
    return call(sys.executable, *arguments, **rest)
