"""A small run that has ended, and another one with other settings."""

from pathlib import Path

import pytest
from support.small_runs import make_text_data, pretraining, run

from distft.topology import Topology


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `first` and `deeper/second`, whose rates differ."""
    folder = tmp_path_factory.mktemp("report")
    data = make_text_data(folder / "data")
    for name, rate in (("first", 0.01), ("deeper/second", 0.02)):
        optim = {"peak_lr": rate, "schedule": {"type": "cosine", "warmup_steps": 2}}
        run(Topology(), pretraining(data, folder / "runs" / name, optim=optim, evaluation={"every_steps": 6}))
    return folder / "runs"
