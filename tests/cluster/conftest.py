"""A project directory as users submit it, and a real cluster of two nodes, made once per test file."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from support.ports import free_port
from support.small_runs import make_text_data, pretraining
from support.two_nodes import two_nodes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with launch/, data/, and a configuration with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    make_text_data(folder / "data")
    engine = {"type": "zero", "zero_stage": 1}
    raw = pretraining(Path("data"), Path("runs/small"), engine=engine, cluster={"workers": 2})
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that tests start: an empty home, this Python, and no cluster's address."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTFT_"))}
    return {
        **kept,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture(scope="module")
def cluster(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a driver on a cluster of two nodes; its entry `dashboard` is the dashboard's URL."""
    port = free_port()
    with two_nodes(environment, port) as (address, _):
        yield {**environment, "RAY_ADDRESS": address, "dashboard": f"http://127.0.0.1:{port}"}
