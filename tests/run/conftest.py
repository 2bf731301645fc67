"""Data, and a pretrained run, shared by all tests of complete runs."""

from pathlib import Path

import pytest
from support.small_runs import make_text_data, pretraining, run

from distft.topology import Topology


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pretrained")
    run(Topology(), pretraining(data, run_dir))
    return run_dir
