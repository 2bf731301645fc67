"""Starts a local Ray with a token, and clients with the right token, a wrong one and none.

Prints as a line of JSON which clients were refused, and where the token can be seen.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import ray

from distft.cluster.tokens import ensure_token

CLIENT = """
import sys, ray
try:
    ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
except (ConnectionError, ray.exceptions.AuthenticationError) as error:
    print("refused:", type(error).__name__)
else:
    print("accepted")
"""


def connect(address: str, **authentication: str) -> str:
    """The output of a client with this authentication and no other Ray setting."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "RAY_NUM_REDIS_GET_RETRIES": "1", **authentication}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, address], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def find_token(token: str) -> tuple[list[str], int]:
    """Where the token can be seen, and how many processes of the cluster were searched."""
    processes = psutil.Process().children(recursive=True)
    seen = []
    for process in processes:
        if token in " ".join(process.cmdline()):
            seen.append(f"command line of {process.name()}")
        if token in str(process.environ()):
            seen.append(f"environment of {process.name()}")
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for path in logs.rglob("*") if path.is_file()]
    seen += [str(path) for path in files if token in path.read_text(errors="replace")]
    return seen, len(processes)


def main() -> None:
    path = ensure_token(os.environ)
    assert path is not None
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    ray.init(address="local", num_cpus=1, object_store_memory=80_000_000, **quiet)
    address = ray.get_runtime_context().gcs_address
    by_path = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    result: dict[str, Any] = {
        "right": connect(address, **by_path),
        "wrong": connect(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
        "none": connect(address, HOME="/nonexistent"),
    }
    result["seen_in"], result["num_processes"] = find_token(path.read_text())
    ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
