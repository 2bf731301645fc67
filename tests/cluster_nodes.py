"""What tests need to start clusters and to call commands as users do."""

import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def free_port() -> int:
    """Below those that the system hands out by itself."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def call(
    *command: str | Path, env: Mapping[str, str], cwd: Path, timeout_s: float = 240
) -> "subprocess.CompletedProcess[str]":
    texts = [str(word) for word in command]
    return subprocess.run(
        texts, env=dict(env), cwd=cwd, timeout=timeout_s, capture_output=True, text=True, check=False
    )


def call_python(*arguments: str | Path, **rest: Any) -> "subprocess.CompletedProcess[str]":
    return call(sys.executable, *arguments, **rest)
