"""A run that resumes with another optimizer: refused, unless its states are to start anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.rank_pool import run_ranks
from support.small_runs import pretraining, run

from distft.checkpoint.committed import find_checkpoint
from distft.errors import ConfigError
from distft.topology import Topology

LION = {"type": "lion", "peak_lr": 0.002, "schedule": {"type": "constant"}}


def _config(data: Path, run_dir: Path, steps: int, **changes: Any) -> dict[str, Any]:
    return pretraining(data, run_dir, train={"max_steps": steps, "log_every_steps": 1}, **changes)


def _run(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


@pytest.mark.ranks
def test_other_states_are_refused_by_name_unless_they_may_start_anew(data: Path, tmp_path: Path) -> None:
    run(Topology(), _config(data, tmp_path, 4))
    lion = _config(data, tmp_path, 6, optim=LION)
    with pytest.raises(ConfigError) as raised:
        run(Topology(), lion)
    for part in ("such as embed.weight", "keeps exp_avg,", "exp_avg, exp_avg_sq", "allow_other_optimizer"):
        assert part in str(raised.value)
    run(Topology(), {**lion, "checkpoint": {"allow_other_optimizer": True}})
    manifest = find_checkpoint(str(tmp_path)).manifest
    for record in manifest.parameters.values():
        assert set(record.states) == {"weight", "exp_avg"}
        assert record.updates == 2
    # Now that the checkpoint is Lion's, nothing needs to be allowed, on other ranks as on one.
    zero = {"type": "zero", "zero_stage": 2}
    run_ranks(_run, 2, {**_config(data, tmp_path, 8, optim=LION), "engine": zero})
    found = find_checkpoint(str(tmp_path))
    assert {record.updates for record in found.manifest.parameters.values()} == {4}
    alone = tmp_path / "alone"
    run(Topology(), _config(data, alone, 4))
    run(Topology(), {**_config(data, alone, 8, optim=LION), "checkpoint": {"allow_other_optimizer": True}})
    expected = find_checkpoint(str(alone))
    for name, record in found.manifest.parameters.items():
        numel = torch.Size(record.shape).numel()
        ours, theirs = (one.read(name, "weight", 0, numel) for one in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
