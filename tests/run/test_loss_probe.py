"""The loss saved with a checkpoint is reproduced when it is loaded, or the load is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damage import rank_file
from support.rank_pool import run_ranks
from support.small_runs import events, logged, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import Checkpoint, find_checkpoint
from distft.checkpoint.manifest import MANIFEST, ProbeRecord
from distft.engine import local
from distft.errors import CheckpointError, DistftError
from distft.topology import Topology
from distft.train.loss_probe import losses_agree

LONGER = {"max_steps": 14, "log_every_steps": 1}


def _probe(path: Path) -> ProbeRecord:
    probe = find_checkpoint(str(path)).manifest.probe
    assert probe is not None
    return probe


def test_the_probe_is_the_loss_of_the_saved_weights(pretrained: Path) -> None:
    probe = _probe(pretrained)
    assert probe.num_sequences == 2  # a micro-batch
    assert probe.loss == pytest.approx(logged(pretrained)[12], abs=0.3)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_every_engine_measures_the_same_loss(
    data: Path, pretrained: Path, tmp_path: Path, stage: int
) -> None:
    run_ranks(run, 2, pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": stage}))
    assert _probe(tmp_path).loss == pytest.approx(_probe(pretrained).loss, abs=1e-5)


def _run_with_a_wrong_load(topology: Topology, raw: dict[str, Any], wrong_rank: int) -> str:
    """Run; one rank loads wrong values into one parameter. Returns this rank's error message."""
    engine_type = raw["engine"]["type"]
    if engine_type == "zero":
        from distft.engine import zero as module
    else:
        module = local  # type: ignore[assignment]
    read_state = module.read_state

    def misread(source: Any, parameter: str, state: str, out: Any, start: int) -> None:
        read_state(source, parameter, state, out, start)
        if topology.rank == wrong_rank and parameter == "blocks.1.mlp.down.weight":
            out += 0.5

    module.read_state = misread  # type: ignore[attr-defined]
    try:
        run(topology, raw)
    except DistftError as error:
        return str(error)
    finally:
        module.read_state = read_state  # type: ignore[attr-defined]
    return "no error"


def test_a_wrong_load_is_refused_and_the_wrong_tensors_are_named(data: Path, tmp_path: Path) -> None:
    raw = {**pretraining(data, tmp_path), "engine": {"type": "local"}}
    run_until_power_cut(raw, 6)
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    message = _run_with_a_wrong_load(Topology(), raw, 0)
    assert "step_00000004 was saved with a loss of" in message
    assert "weight of blocks.1.mlp.down.weight" in message
    assert "embed.weight" not in message
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


@pytest.mark.ranks
def test_a_wrong_load_on_one_rank_stops_all_ranks(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path)
    run_until_power_cut(raw, 6)
    raw = {**raw, "engine": {"type": "zero", "zero_stage": 3}}  # where each rank reads weights of its own
    messages = run_ranks(_run_with_a_wrong_load, 2, raw, 1)
    assert all("step_00000004 was saved with a loss of" in message for message in messages), messages
    assert max(logged(tmp_path)) == 4


def test_a_resume_with_changed_training_data_is_refused(data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_bytes((data / "train.jsonl").read_bytes())
    raw = pretraining(
        data,
        tmp_path / "run",
        tokenizer=str(data / "tokenizer.model"),
        data={"type": "labelled", "path": str(rows)},
        validation=None,
        objective={"type": "classification"},
    )
    run_until_power_cut(raw, 6)
    changed = [{**json.loads(line), "text": "mat mat mat river"} for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(CheckpointError, match="has a file of the training data changed"):
        run(Topology(), raw)


def test_a_checkpoint_in_the_directory_of_another_step_is_not_resumed(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path)
    run_until_power_cut(raw, 10)
    root = tmp_path / "checkpoints"
    for name in (MANIFEST, rank_file(root / "step_00000004").name):
        (root / "step_00000008" / name).write_bytes((root / "step_00000004" / name).read_bytes())
    run(Topology(), raw)
    [damage] = (event for event in events(tmp_path) if event["kind"] == "damaged_checkpoint")
    assert "contains the checkpoint of step 4" in damage["reason"]


def test_a_manifest_with_a_changed_digit_is_refused(pretrained: Path, tmp_path: Path) -> None:
    text = Path(find_checkpoint(str(pretrained)).path, MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace('"tokens_seen": ', '"tokens_seen": 1'))
    with pytest.raises(CheckpointError, match="is damaged: its content does not match its checksum"):
        Checkpoint.open(str(tmp_path))


@given(loss=st.floats(0, 20), param_dtype=st.sampled_from(["fp32", "bf16", "fp16"]))
def test_losses_agree_within_a_tolerance_of_their_dtypes(loss: float, param_dtype: str) -> None:
    saved = ProbeRecord(loss=loss, num_sequences=1, param_dtype="fp32")
    tolerance = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}[param_dtype] * max(1.0, loss)
    near = ProbeRecord(loss=loss + 0.99 * tolerance, num_sequences=1, param_dtype=param_dtype)
    far = ProbeRecord(loss=loss + 1.01 * tolerance, num_sequences=1, param_dtype=param_dtype)
    assert losses_agree(saved, near)
    assert not losses_agree(saved, far)
    assert not losses_agree(saved, ProbeRecord(loss=float("nan"), num_sequences=1, param_dtype=param_dtype))
