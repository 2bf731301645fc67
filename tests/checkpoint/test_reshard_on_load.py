"""Training continues from a checkpoint of any engine, world size and ZeRO stage under any other."""

from pathlib import Path

import pytest
import torch
from support.engine_scenarios import Scenario, Training, collectives_for, run_alone
from support.rank_pool import run_ranks

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.store import CheckpointStore
from distft.topology import Topology

SAVE_STEP, NUM_STEPS = 3, 7
FROZEN = ("blocks.1.*", "norm.weight")


def _scenarios(trainable: tuple[str, ...]) -> dict[str, Scenario]:
    engines = {f"zero{stage}": Scenario(stage=stage, trainable=trainable) for stage in (0, 1, 2, 3)}
    return {"local": Scenario(trainable=trainable), **engines}


def _write(topology: Topology, root: str, names: list[str], trainable: tuple[str, ...]) -> None:
    for name in names:
        scenario = _scenarios(trainable)[name]
        training = Training(scenario, topology, collectives_for(scenario, topology))
        training.run(SAVE_STEP)
        training.save(f"{root}/{name}_{topology.world_size}")
        training.engine.close()


def _resume_and_train(
    topology: Topology, root: str, sources: list[str], name: str, trainable: tuple[str, ...]
) -> dict[str, list[float]]:
    losses = {}
    for source in sources:
        scenario = _scenarios(trainable)[name]
        collectives = collectives_for(scenario, topology)
        found = CheckpointStore(f"{root}/{source}", collectives).find_latest_valid()
        assert found.checkpoint is not None
        assert not found.damage
        training = Training(scenario, topology, collectives, found.checkpoint)
        losses[source] = training.run(NUM_STEPS)
        training.engine.close()
    return losses


@pytest.mark.ranks
@pytest.mark.parametrize("trainable", [("*",), FROZEN], ids=["all", "partial"])
def test_any_engine_resumes_from_any_other_engines_checkpoint(
    tmp_path: Path, trainable: tuple[str, ...]
) -> None:
    root = str(tmp_path)
    expected = run_alone(_scenarios(trainable)["local"], NUM_STEPS).losses[SAVE_STEP:]
    _write(Topology(), root, ["local"], trainable)
    run_ranks(_write, 2, root, ["zero0", "zero1", "zero2", "zero3"], trainable)
    run_ranks(_write, 3, root, ["zero1", "zero3"], trainable)
    sources = sorted(path.name for path in tmp_path.iterdir())
    assert len(sources) == 7
    readers = [
        ("local", 1),
        ("zero1", 1),
        ("zero0", 2),
        ("zero2", 2),
        ("zero3", 2),
        ("zero1", 4),
        ("zero3", 4),
    ]
    for name, world_size in readers:
        if name == "local":
            by_rank = [_resume_and_train(Topology(), root, sources, name, trainable)]
        else:
            by_rank = run_ranks(_resume_and_train, world_size, root, sources, name, trainable)
        for losses in by_rank:
            for source, found in losses.items():
                assert found == pytest.approx(expected, abs=2e-6), f"{source} read by {name} on {world_size}"


def test_a_local_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    uninterrupted = run_alone(Scenario(), NUM_STEPS)
    first = run_alone(Scenario(), SAVE_STEP)
    checkpoint = Checkpoint.open(first.save(str(tmp_path)))
    resumed = Training(Scenario(), Topology(), collectives_for(Scenario(), Topology()), checkpoint)
    assert first.losses + resumed.run(NUM_STEPS) == uninterrupted.losses
    found, wanted = resumed.whole_state(), uninterrupted.whole_state()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_runs_keep_fp32_master_weights_over_a_resume(tmp_path: Path, precision: str) -> None:
    scenario = Scenario(precision=precision)
    uninterrupted = run_alone(scenario, NUM_STEPS)
    checkpoint = Checkpoint.open(run_alone(scenario, SAVE_STEP).save(str(tmp_path)))
    assert checkpoint.manifest.parameters["embed.weight"].states["weight"].dtype == "float32"
    resumed = Training(scenario, Topology(), collectives_for(scenario, Topology()), checkpoint)
    assert resumed.run(NUM_STEPS) == uninterrupted.losses[SAVE_STEP:]
