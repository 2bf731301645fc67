"""The peak memory that a run logs is that of the rank that takes most."""

from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import logged, pretraining, run

from distft.topology import Topology


def _run(topology: Topology, raw: dict[str, Any]) -> None:
    """Each rank takes as much as its number says, in GiB."""
    peak = (topology.rank + 1) * 2**30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distft.train.loop.peak_memory_bytes", lambda _device: peak)
        run(topology, raw)


@pytest.mark.ranks
def test_the_peak_is_that_of_the_rank_with_most(data: Path, tmp_path: Path) -> None:
    """Rank 0 writes it, and a search's constraint of "at most 1 GiB a rank" has to hold for rank 1."""
    raw = pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": 1, "compile": False})
    raw |= {"train": {"max_steps": 2, "log_every_steps": 2}, "checkpoint": {}}
    run_ranks(_run, 2, raw, timeout_s=120)
    assert logged(tmp_path, "peak_memory_bytes") == {2: 2 * 2**30}
