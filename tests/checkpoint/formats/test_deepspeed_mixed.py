"""Files of different tags, ranks or runs in one directory are found; whole checkpoints are read."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_cli import cli
from support.plain_deepspeed import Script, save_after_steps, start, whole_state
from support.rank_pool import run_ranks

from distft.checkpoint.formats.deepspeed.reader import DeepSpeedCheckpoint
from distft.checkpoint.formats.deepspeed.universal import UniversalCheckpoint, write_universal
from distft.checkpoint.formats.deepspeed.writer import write_deepspeed
from distft.checkpoint.formats.detect import open_source
from distft.errors import CheckpointError

pytestmark = pytest.mark.ranks
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
SCRIPTS = {
    "stage 1": Script(stage=1),
    "stage 1, bf16": Script(stage=1, dtype="bf16", config=FP32_ACCUMULATION),
    "stage 2, frozen": Script(stage=2, frozen=True),
    "stage 3, frozen": Script(stage=3, frozen=True, with_scheduler=True),
}
RANKS = 2
OF_OTHER_TAG = {  # which files of step 4 replace those of step 2
    "an optimizer file": "*rank_1_*optim_states.pt",
    "all optimizer files": "*optim_states.pt",
    "all model files": "*model_states.pt",
}


@pytest.fixture(scope="module", params=list(SCRIPTS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which a script saved after steps 2 and 4."""
    root = tmp_path_factory.mktemp("plain") / request.param
    run_ranks(save_after_steps, RANKS, SCRIPTS[request.param], str(root), (2, 4))
    return root


@pytest.fixture
def tag(saved: Path, tmp_path: Path) -> Path:
    """A copy of the tag of step 2, for tests that mix files into it."""
    return Path(shutil.copytree(saved / "global_step2", tmp_path / "global_step2"))


def copy_from_rank(tag: Path, kind: str, source: int, target: int) -> None:
    [path] = tag.glob(f"*zero_pp_rank_{source}_*{kind}_states.pt")
    shutil.copy(path, str(path).replace(f"rank_{source}_", f"rank_{target}_"))


def test_whole_checkpoints_are_opened_and_say_what_was_not_compared(saved: Path) -> None:
    for name in ("global_step2", "global_step4"):
        notes = DeepSpeedCheckpoint.open(str(saved / name)).notes
        assert len(notes) == ("stage 3" in saved.name)
        assert all("files name neither their rank nor their run" in note for note in notes)


@pytest.mark.parametrize("which", OF_OTHER_TAG)
def test_files_of_another_tag_are_refused(saved: Path, tag: Path, which: str, tmp_path: Path) -> None:
    for path in tag.glob(OF_OTHER_TAG[which]):
        shutil.copy(saved / "global_step4" / path.name, path)
    with pytest.raises(CheckpointError, match="of different tags"):
        DeepSpeedCheckpoint.open(str(tag))
    assert cli("verify", tag) == 1
    assert cli("convert", tag, tmp_path / "out", "--to", "distft") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_a_copy_of_another_ranks_file_is_refused(tag: Path, source: int, target: int) -> None:
    copy_from_rank(tag, "optim", source, target)
    with pytest.raises(CheckpointError, match=r"of another rank or another run|is a copy in place of"):
        DeepSpeedCheckpoint.open(str(tag))


def test_files_of_another_run_with_equal_counts_are_refused(saved: Path, tag: Path, tmp_path: Path) -> None:
    if "stage 3" in saved.name:
        pytest.skip("at stage 3 nothing in the files tells: the notes say so")
    other = replace(SCRIPTS[saved.name], seed=5)
    run_ranks(save_after_steps, RANKS, other, str(tmp_path / "other"), (2,))
    for path in tag.glob("*rank_1_*optim_states.pt"):
        shutil.copy(tmp_path / "other" / "global_step2" / path.name, path)
    with pytest.raises(CheckpointError, match=r"different tags or runs: the weights in .*rank_1_"):
        DeepSpeedCheckpoint.open(str(tag))


@pytest.fixture(scope="module")
def stage3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stage3")
    run_ranks(save_after_steps, RANKS, SCRIPTS["stage 3, frozen"], str(root), (2, 4))
    return root


def test_mixed_model_files_of_stage_3_are_refused(stage3: Path, tmp_path: Path) -> None:
    tag = Path(shutil.copytree(stage3 / "global_step2", tmp_path / "one"))
    name = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    shutil.copy(stage3 / "global_step4" / name, tag / name)
    with pytest.raises(CheckpointError, match=r"mixes files.*global_steps is 2 and 4"):
        DeepSpeedCheckpoint.open(str(tag))
    tag = Path(shutil.copytree(stage3 / "global_step2", tmp_path / "two"))
    copy_from_rank(tag, "model", 0, 1)
    with pytest.raises(CheckpointError, match="same partitions of frozen weights"):
        DeepSpeedCheckpoint.open(str(tag))


def test_files_that_distft_wrote_for_different_steps_are_refused(stage3: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        source = DeepSpeedCheckpoint.open(str(stage3 / f"global_step{step}"))
        options: dict[str, Any] = {"zero_stage": 3, "world_size": 2, "param_dtype": "fp32"}
        write_deepspeed(source, str(tmp_path / str(step)), tag="x", **options)
    DeepSpeedCheckpoint.open(str(tmp_path / "2"))
    for path in (tmp_path / "4" / "x").glob("*optim*"):
        shutil.copy(path, tmp_path / "2" / "x" / path.name)
    with pytest.raises(CheckpointError, match=r"ds_config\.distft\.step is 2 and 4"):
        DeepSpeedCheckpoint.open(str(tmp_path / "2"))


def test_a_universal_checkpoint_with_a_parameter_of_another_step_is_refused(
    stage3: Path, tmp_path: Path
) -> None:
    for step in (2, 4):
        write_universal(
            DeepSpeedCheckpoint.open(str(stage3 / f"global_step{step}")), str(tmp_path / str(step))
        )
    later, earlier = (tmp_path / str(n) / f"global_step{n}_universal" / "zero" for n in (4, 2))
    shutil.copytree(later / "embed.weight", earlier / "embed.weight", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"'embed\.weight' has had 4 updates, 'first\.weight' has"):
        UniversalCheckpoint.open(str(tmp_path / "2"))


def test_without_latest_the_tags_are_named_and_each_can_be_chosen(
    stage3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(stage3, tmp_path / "plain"))
    (root / "latest").unlink()
    assert cli("verify", root) == 1
    message = capsys.readouterr().out
    assert f"It has the tags global_step2, global_step4: name the directory of one, such as {root}" in message
    assert cli("convert", root, tmp_path / "out", "--to", "distft") == 2
    assert cli("verify", root / "global_step2") == 0
    assert open_source(str(root / "global_step2")).manifest.progress.step == 2


def load_trained_weights(topology: Any, script: Script, path: str) -> dict[tuple[str, str], torch.Tensor]:
    engine = start(script, topology.world_size, 7)
    engine.load_checkpoint(path, load_module_strict=False)
    return whole_state(engine, script)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_loads_what_was_converted_from_files_without_frozen_weights(
    stage: int, tmp_path: Path
) -> None:
    script = Script(stage=5 - stage, frozen=True)
    run_ranks(save_after_steps, 1, script, str(tmp_path / "plain"), (2,), True)
    source = DeepSpeedCheckpoint.open(str(tmp_path / "plain"))
    assert "second.weight" not in source.manifest.parameters
    options: dict[str, Any] = {"zero_stage": stage, "world_size": 2, "param_dtype": "fp32", "tag": "x"}
    write_deepspeed(source, str(tmp_path / "moved"), **options)
    other = Script(stage=stage, frozen=True)
    [loaded, *_] = run_ranks(load_trained_weights, 2, other, str(tmp_path / "moved"))
    trained = [name for name, record in source.manifest.parameters.items() if record.trainable]
    assert len(trained) == 5
    for name in trained:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            expected = loaded[name, state]
            assert torch.equal(source.read(name, state, 0, expected.numel()).view_as(expected), expected)


def test_the_groups_of_stage_0_are_named_by_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(stage=0, groups="one", frozen=True)
    root, out = tmp_path / "plain", tmp_path / "out"
    run_ranks(save_after_steps, 1, script, str(root), (2,))
    assert cli("convert", root, out, "--to", "deepspeed") == 2
    assert "--parameter-groups FILE, YAML with `groups`" in capsys.readouterr().err
    names = tmp_path / "names.yaml"
    names.write_text("groups: [[embed.weight, first.weight, first.bias, norm.weight, second.bias]]")
    for command in (("verify", root), ("convert", root, out, "--to", "deepspeed")):
        assert cli(*command, "--parameter-groups", names) == 0
    assert DeepSpeedCheckpoint.open(str(out)).manifest.groups[0].settings["weight_decay"] == 0.01
    # Weights alone need no names.
    source = open_source(str(root), weights_only=True)
    assert source.has("second.weight", "weight")
    assert not source.has("first.bias", "exp_avg")


def test_a_conversion_to_universal_says_what_deepspeed_will_not_load(
    stage3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", stage3, tmp_path / "out", "--to", "universal") == 0
    notes = capsys.readouterr().err
    assert "3 frozen weights and buffers, such as" in notes
    assert "Of the 2 parameter groups, DeepSpeed at stage 3 loads the settings" in notes
