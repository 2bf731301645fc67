"""distft reads what DeepSpeed's ds_to_universal wrote, and DeepSpeed loads what distft wrote."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_deepspeed import Script, train
from support.rank_pool import run_ranks

from distft.checkpoint.formats.deepspeed.reader import DeepSpeedCheckpoint
from distft.checkpoint.formats.deepspeed.universal import UniversalCheckpoint, write_universal
from distft.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.ranks
MIDDLE, END = 3, 6
UNIVERSAL: dict[str, Any] = {"checkpoint": {"load_universal": True}}
SCRIPTS = {
    "stage 1, bf16": (Script(stage=1, dtype="bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}), 2),
    "stage 2, frozen": (Script(stage=2, frozen=True), 2),
    "stage 3, frozen": (
        Script(stage=3, frozen=True, config={"zero_optimization": {"sub_group_size": 20}}),
        2,
    ),
}


def convert(_topology: Any, source: str, target: str) -> None:
    """Run DeepSpeed's own converter."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=source,
            output_folder=target,
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


@pytest.fixture(scope="module", params=list(SCRIPTS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Result of a script's training, the script, and the directory that it saved to."""
    script, world_size = SCRIPTS[request.param]
    root = tmp_path_factory.mktemp("plain")
    [result, *_] = run_ranks(train, world_size, script, (0, END), None, str(root))
    return result, script, root


def _read(checkpoint: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (name, state): checkpoint.read(name, state, 0, torch.Size(record.shape).numel()).reshape(record.shape)
        for name, record in checkpoint.manifest.parameters.items()
        for state in record.states
    }


def test_checkpoints_of_deepspeeds_converter_are_read_with_frozen_parameters(saved: Any) -> None:
    result, _, root = saved
    run_ranks(convert, 1, str(root / f"global_step{MIDDLE}"), str(root / "converted"))
    checkpoint = UniversalCheckpoint.open(str(root))
    read = _read(checkpoint)
    assert read.keys() == result["saved"].keys()
    for key, expected in result["saved"].items():
        assert torch.equal(read[key], expected), key
    plain = DeepSpeedCheckpoint.open(str(root)).manifest
    manifest = checkpoint.manifest
    assert manifest.groups == plain.groups
    assert manifest.tied == plain.tied
    assert manifest.progress == plain.progress
    assert manifest.parameters == plain.parameters
    counts = [{checkpoint.updates(name) for name in group.parameters} for group in manifest.groups]
    assert counts == [{count} for count in result["updates"]]
    assert checkpoint.find_damage() == []


def test_a_written_checkpoint_is_read_back_with_equal_states(saved: Any, tmp_path: Path) -> None:
    _, _, root = saved
    source = DeepSpeedCheckpoint.open(str(root))
    num_bytes: list[int] = []
    write_universal(source, str(tmp_path), on_progress=num_bytes.append)
    checkpoint = UniversalCheckpoint.open(str(tmp_path))
    written, expected = _read(checkpoint), _read(source)
    assert all(torch.equal(written[key], values) for key, values in expected.items())
    assert checkpoint.manifest.parameters == source.manifest.parameters
    assert checkpoint.manifest.groups == source.manifest.groups
    assert checkpoint.manifest.tied == source.manifest.tied
    assert sum(num_bytes) > sum(values.nbytes for values in expected.values()) / 2
    with pytest.raises(ConfigError, match="is not empty"):
        write_universal(source, str(tmp_path))


def test_missing_and_damaged_files_are_reported(saved: Any, tmp_path: Path) -> None:
    _, _, root = saved
    write_universal(DeepSpeedCheckpoint.open(str(root)), str(tmp_path))
    checkpoint = UniversalCheckpoint.open(str(tmp_path))
    folder = tmp_path / "global_step3_universal" / "zero"
    moment = folder / "first.weight" / "exp_avg_sq.pt"
    moment.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"first\.weight lacks exp_avg_sq\.pt"):
        UniversalCheckpoint.open(str(tmp_path))
    (tmp_path / "away").rename(moment)
    (folder / "embed.weight" / "fp32.pt").unlink()
    damaged = folder / "first.weight" / "exp_avg.pt"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert len(checkpoint.find_damage()) == 2
    with pytest.raises(CheckpointError) as failure:
        UniversalCheckpoint.open(str(tmp_path))
    assert "lacks fp32.pt, the weight of 'embed.weight'" in str(failure.value)
    assert "exp_avg.pt is damaged" in str(failure.value)


@pytest.mark.parametrize(
    ("written", "loaded", "world_size"),
    [
        (Script(stage=3), Script(stage=1, config=UNIVERSAL, seed=1), 2),
        (Script(stage=0, groups="one"), Script(stage=3, groups="one", config=UNIVERSAL, seed=1), 2),
        (Script(stage=1, frozen=True), Script(stage=2, frozen=True, config=UNIVERSAL, seed=1), 1),
    ],
    ids=["3 to 1", "0 to 3", "1 to 2, frozen"],
)
def test_deepspeed_resumes_from_a_written_universal_checkpoint_with_equal_losses(
    tmp_path: Path, written: Script, loaded: Script, world_size: int
) -> None:
    # DeepSpeed loads neither frozen weights nor buffers from a universal checkpoint, so both scripts use the
    # same seed for them. It does load the trained weights: they were saved after three steps.
    [result, *_] = run_ranks(train, 1, written, (0, END), None, str(tmp_path / "plain"))
    write_universal(DeepSpeedCheckpoint.open(str(tmp_path / "plain")), str(tmp_path / "universal"))
    [resumed, *_] = run_ranks(train, world_size, loaded, (MIDDLE, END), str(tmp_path / "universal"))
    for key, expected in result["saved"].items():
        assert torch.equal(resumed["loaded"][key], expected), key
    assert resumed["losses"] == pytest.approx(result["losses"][MIDDLE:], abs=2e-6, rel=0)


def test_a_directory_of_another_format_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"has no zero/optimizer_state\.pt"):
        UniversalCheckpoint.open(str(tmp_path))
