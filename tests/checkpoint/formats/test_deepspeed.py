"""distft reads checkpoints that DeepSpeed wrote, and DeepSpeed resumes from those that distft wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import flip_bit
from support.engine_scenarios import Scenario, run_alone
from support.plain_deepspeed import Script, train
from support.rank_pool import run_ranks

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.deepspeed.contents import ExtraState
from distft.checkpoint.formats.deepspeed.reader import DeepSpeedCheckpoint
from distft.checkpoint.formats.deepspeed.writer import write_deepspeed
from distft.checkpoint.formats.torch_file import read_torch_file
from distft.errors import CheckpointError, ConfigError
from distft.storage.local import LocalStorage

pytestmark = pytest.mark.ranks
MIDDLE, END = 3, 6
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 20}}
# At stage 1 in bf16 it makes DeepSpeed use another optimizer wrapper (BF16_Optimizer).
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}

# The script that saves and its number of ranks; the script that resumes and its number of ranks.
CASES: dict[str, tuple[Script, int, Script, int]] = {
    "0 to 3": (Script(stage=0), 2, Script(stage=3), 2),
    "0 to 1, frozen": (
        Script(stage=0, groups="one", frozen=True),
        1,
        Script(stage=1, groups="one", frozen=True),
        2,
    ),
    "1 to 0, frozen": (Script(stage=1, frozen=True), 2, Script(stage=0, frozen=True), 1),
    "2 to 3, layers": (
        Script(stage=2, groups="layers", frozen=True, with_scheduler=True),
        2,
        Script(stage=3, groups="layers", frozen=True, config=SUB_GROUPS, with_scheduler=True),
        1,
    ),
    "3 to 2, sub-groups": (
        Script(stage=3, frozen=True, config=SUB_GROUPS),
        2,
        Script(stage=2, frozen=True),
        1,
    ),
    "3 to 3, three ranks": (Script(stage=3, frozen=True), 1, Script(stage=3, frozen=True), 3),
    "3 to 1, aligned": (
        Script(stage=3),
        2,
        Script(stage=1, config={"zero_optimization": {"parameter_alignment": True}}),
        2,
    ),
    "1 aligned to 2": (
        Script(stage=1, config={"zero_optimization": {"parameter_alignment": True}}),
        2,
        Script(stage=2),
        3,
    ),
    "bf16: 1 to 3": (
        Script(stage=1, dtype="bf16", config=FP32_ACCUMULATION),
        2,
        Script(stage=3, dtype="bf16"),
        1,
    ),
    "bf16: 2 to 1": (
        Script(stage=2, dtype="bf16", frozen=True),
        2,
        Script(stage=1, dtype="bf16", frozen=True, config=FP32_ACCUMULATION),
        2,
    ),
    "bf16: 0 to 0": (
        Script(stage=0, dtype="bf16", groups="layers"),
        1,
        Script(stage=0, dtype="bf16", groups="layers"),
        2,
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Result of one script's training, its directory, that script and its ranks; who resumes, on how many."""
    script, world_size, other, other_world_size = CASES[request.param]
    root = tmp_path_factory.mktemp("plain")
    [result, *_] = run_ranks(train, world_size, script, (0, END), None, str(root))
    return result, str(root), script, world_size, other, other_world_size


def _open(root: str, script: Script) -> DeepSpeedCheckpoint:
    """Open the checkpoint, with the names of its groups if they cannot be found from shapes.

    Stage 0 saves no names, and some frozen parameters have the shape of trained ones.
    """
    if not (script.stage == 0 and script.frozen):
        return DeepSpeedCheckpoint.open(root)
    with pytest.raises(CheckpointError, match=r"numbers the optimizer.*several orders fit: give the names"):
        DeepSpeedCheckpoint.open(root)
    names = ["embed.weight", "first.weight", "first.bias", "norm.weight", "second.bias"]
    with pytest.raises(CheckpointError, match=r"'second\.bias' does not fit its position in group 0"):
        DeepSpeedCheckpoint.open(root, groups=[names[::-1]])
    with pytest.raises(CheckpointError, match="has more parameters than the 4 names given"):
        DeepSpeedCheckpoint.open(root, groups=[names[:4]])
    return DeepSpeedCheckpoint.open(root, groups=[names])


def test_states_read_equal_those_that_deepspeed_reports(case: Any) -> None:
    result, root, script, world_size, *_ = case
    checkpoint = _open(root, script)
    manifest = checkpoint.manifest
    read = {}
    for name, record in manifest.parameters.items():
        for state in record.states:
            numel = torch.Size(record.shape).numel()
            slices = [checkpoint.read(name, state, i, min(i + 4, numel)) for i in range(0, numel, 4)]
            read[name, state] = torch.cat(slices).reshape(record.shape)
            assert str(read[name, state].dtype) == f"torch.{record.states[state].dtype}"
    assert read.keys() == result["saved"].keys()
    for key, expected in result["saved"].items():
        assert torch.equal(read[key], expected), key
    assert checkpoint.find_damage() == []
    assert manifest.progress.step == MIDDLE
    assert manifest.tied == {"head.weight": "embed.weight"}
    assert [name for name, record in manifest.parameters.items() if record.is_buffer] == ["offset"]
    frozen = {name for name, record in manifest.parameters.items() if not record.trainable} - {"offset"}
    assert frozen == ({"second.weight", "norm.bias"} if script.frozen else set())
    assert manifest.written_by["zero_stage"] == script.stage
    assert manifest.written_by["world_size"] == world_size
    assert manifest.written_by["param_dtype"] == script.dtype


def test_groups_keep_their_settings_parameters_and_update_counts(case: Any) -> None:
    result, root, script, *_ = case
    checkpoint = _open(root, script)
    groups = checkpoint.manifest.groups
    decays = [group.settings["weight_decay"] for group in groups]
    assert decays == ([0.01] if script.groups == "one" else [0.1, 0.0])
    assert all(list(group.settings["betas"]) == [0.9, 0.95] for group in groups)
    if script.groups == "decay":
        assert all(len(checkpoint.shape(name)) > 1 for name in groups[0].parameters)
        assert all(len(checkpoint.shape(name)) == 1 for name in groups[1].parameters)
    elif script.groups == "layers":
        assert groups[0].parameters == ("embed.weight", "first.weight")
    counts = [{checkpoint.updates(name) for name in group.parameters} for group in groups]
    assert counts == [{count} for count in result["updates"]]
    if len(counts) > 1:
        assert counts[0] != counts[1]


def test_deepspeed_resumes_from_a_written_checkpoint_with_equal_losses(case: Any, tmp_path: Path) -> None:
    result, root, script, _, other, other_world_size = case
    num_bytes: list[int] = []
    source = _open(root, script)
    write_deepspeed(
        source,
        str(tmp_path),
        zero_stage=other.stage,
        world_size=other_world_size,
        param_dtype=other.dtype,
        tag="moved",
        on_progress=num_bytes.append,
        sub_group_size=other.config.get("zero_optimization", {}).get("sub_group_size", 10**9),
    )
    [resumed, *_] = run_ranks(train, other_world_size, other, (MIDDLE, END), str(tmp_path))
    for key, expected in result["saved"].items():
        assert torch.equal(resumed["loaded"][key].float(), expected.float()), key
    # bf16 gradients are summed over another number of ranks, seen: 1.1e-3.
    tolerance = 2e-6 if script.dtype == "fp32" else 3e-3
    assert resumed["losses"] == pytest.approx(result["losses"][MIDDLE:], abs=tolerance, rel=0)
    assert resumed["client_state"]["epoch"] == 4
    assert torch.equal(resumed["client_state"]["noise"], torch.ones(2))
    written = sum(path.stat().st_size for path in (tmp_path / "moved").iterdir())
    assert 0.5 * written < sum(num_bytes) <= written
    again = DeepSpeedCheckpoint.open(str(tmp_path))
    assert again.manifest.groups == source.manifest.groups
    assert again.find_damage() == []


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-3 checkpoint of two ranks."""
    root = tmp_path_factory.mktemp("damage")
    run_ranks(train, 2, Script(stage=3), (0, 2), None, str(root))
    return root


@pytest.fixture
def copied(two_ranks: Path, tmp_path: Path) -> Path:
    """A copy of its tag's directory, for tests that damage it."""
    tag = tmp_path / "global_step1"
    tag.mkdir()
    for path in (two_ranks / "global_step1").iterdir():
        (tag / path.name).write_bytes(path.read_bytes())
    (tmp_path / "latest").write_text("global_step1")
    return tag


def test_all_missing_and_damaged_files_are_reported_at_once(copied: Path) -> None:
    names = [
        f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in (0, 1) for kind in ("model", "optim")
    ]
    checkpoint = DeepSpeedCheckpoint.open(str(copied.parent))
    (copied / names[3]).unlink()
    cut = copied / names[2]
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = copied / names[1]
    flip_bit(flipped, flipped.stat().st_size // 2)
    with pytest.raises(CheckpointError) as failure:
        DeepSpeedCheckpoint.open(str(copied))
    assert "the optimizer file of rank 1 is missing" in str(failure.value)
    assert f"{names[2]} is damaged or cut short" in str(failure.value)
    damage = "\n".join(checkpoint.find_damage())
    assert f"{names[3]} does not exist" in damage
    assert f"{names[2]} is damaged or cut short" in damage
    assert f"{names[1]} is damaged at" in damage
    assert names[0] not in damage


def test_files_of_more_ranks_than_wrote_the_checkpoint_are_rejected(copied: Path) -> None:
    for kind in ("model", "optim"):
        content = (copied / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt").read_bytes()
        (copied / f"zero_pp_rank_2_mp_rank_00_{kind}_states.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"by 2 ranks, but the model file of rank 2 does not belong"):
        DeepSpeedCheckpoint.open(str(copied))


def test_two_files_of_one_rank_from_different_runs_are_rejected(copied: Path) -> None:
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    (copied / f"bf16_{name}").write_bytes((copied / name).read_bytes())
    with pytest.raises(CheckpointError, match="two files of rank 0 from different runs"):
        DeepSpeedCheckpoint.open(str(copied))


def test_absent_and_unsupported_checkpoints_are_rejected_with_a_remedy(copied: Path, tmp_path: Path) -> None:
    (copied.parent / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match=r"names the tag 'global_step7'.*global_step1"):
        DeepSpeedCheckpoint.open(str(copied.parent))
    with pytest.raises(CheckpointError, match="neither a file 'latest' nor"):
        DeepSpeedCheckpoint.open(str(tmp_path / "nowhere"))
    (copied / "layer_00_expert_0_mp_rank_00_model_states.pt").touch()
    (copied / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"(?s)pipeline stages or mixture.*pipeline-parallel"):
        DeepSpeedCheckpoint.open(str(copied))


def test_all_invalid_settings_are_reported_at_once_and_nothing_is_overwritten(copied: Path) -> None:
    source = DeepSpeedCheckpoint.open(str(copied))
    with pytest.raises(ConfigError) as failure:
        write_deepspeed(
            source, str(copied.parent), zero_stage=4, world_size=0, param_dtype="fp8", tag="global_step1"
        )
    for problem in ("zero_stage=4", "world_size=0", "param_dtype='fp8'", "global_step1 is not empty"):
        assert problem in str(failure.value)


def test_the_loss_scale_of_fp16_is_written_in_deepspeeds_own_class(copied: Path, tmp_path: Path) -> None:
    source = DeepSpeedCheckpoint.open(str(copied))
    scale = {"scale": 512.0, "good_steps": 1.0, "tolerance": 2.0}
    progress = source.manifest.progress.model_copy(update={"loss_scale": scale, "step": 5})
    source.manifest = source.manifest.model_copy(update={"progress": progress})
    for stage in (0, 2, 3):
        target = tmp_path / str(stage)
        write_deepspeed(source, str(target), zero_stage=stage, world_size=1, param_dtype="fp16", tag="half")
        back = DeepSpeedCheckpoint.open(str(target)).manifest
        assert back.written_by["param_dtype"] == "fp16"
        assert back.progress.loss_scale is not None
        assert back.progress.loss_scale["scale"] == 512.0
        assert back.progress.loss_scale["good_steps"] == 1
    content = torch.load(
        tmp_path / "3" / "half" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False
    )
    scaler = content["optimizer_state_dict"]["loss_scaler"]
    assert type(scaler).__module__ == "deepspeed.runtime.fp16.loss_scaler"
    assert scaler.loss_scale == 512.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_optimizer_files_need_a_class_to_be_loaded(copied: Path, tmp_path: Path, stage: int) -> None:
    write_deepspeed(
        DeepSpeedCheckpoint.open(str(copied)),
        str(tmp_path / "to"),
        zero_stage=stage,
        world_size=2,
        param_dtype="fp32",
        tag="plain",
    )
    needs_a_class = [
        path.name
        for path in sorted((tmp_path / "to" / "plain").iterdir())
        if not _loads_weights_only(path) and read_torch_file(str(path))
    ]
    assert all("optim_states" in name for name in needs_a_class)
    # Stage 3 needs a loss scaler; ds_to_universal needs the fragment addresses of stages 1 and 2.
    assert bool(needs_a_class) == (stage > 0)


def _loads_weights_only(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:  # torch raises errors of several classes
        return False
    return True


def test_without_groups_one_group_contains_all_trainable_parameters(
    tmp_path: Path,
) -> None:
    script = Script(stage=1, groups="one")
    [result, *_] = run_ranks(train, 1, script, (0, END), None, str(tmp_path / "plain"))
    source = DeepSpeedCheckpoint.open(str(tmp_path / "plain"))
    optim = {"peak_lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}
    source.manifest = source.manifest.model_copy(update={"groups": [], "config": {"optim": optim}})
    write_deepspeed(source, str(tmp_path), zero_stage=2, world_size=2, param_dtype="fp32", tag="x")
    [resumed, *_] = run_ranks(train, 2, Script(stage=2, groups="one"), (MIDDLE, END), str(tmp_path))
    assert resumed["losses"] == pytest.approx(result["losses"][MIDDLE:], abs=2e-6, rel=0)


def test_a_scheduler_resumes_from_a_source_without_scheduler_state(tmp_path: Path) -> None:
    script = Script(stage=2, groups="one", with_scheduler=True)
    [result, *_] = run_ranks(train, 1, script, (0, END), None, str(tmp_path / "plain"))
    source = DeepSpeedCheckpoint.open(str(tmp_path / "plain"))
    assert source.extra_state.lr_scheduler["last_epoch"] == MIDDLE
    source.extra_state = ExtraState()
    write_deepspeed(source, str(tmp_path), zero_stage=3, world_size=1, param_dtype="fp32", tag="x")
    other = Script(stage=3, groups="one", with_scheduler=True)
    [resumed, *_] = run_ranks(train, 1, other, (MIDDLE, END), str(tmp_path))
    assert resumed["losses"] == pytest.approx(result["losses"][MIDDLE:], abs=2e-6, rel=0)


def test_a_distft_checkpoint_converts_to_deepspeed_and_back_at_a_url(tmp_path: Path) -> None:
    source = Checkpoint.open(run_alone(Scenario(trainable=("blocks.*",)), 2).save(str(tmp_path)))
    write_deepspeed(
        source, f"memory://{tmp_path.name}", zero_stage=3, world_size=3, param_dtype="fp32", tag="x"
    )
    converted = DeepSpeedCheckpoint.open(f"memory://{tmp_path.name}")
    [group] = converted.manifest.groups
    assert set(group.parameters) == {name for name, p in source.manifest.parameters.items() if p.trainable}
    assert converted.find_damage() == []
    for name, record in source.manifest.parameters.items():
        assert converted.shape(name) == record.shape
        assert converted.updates(name) == record.updates
        for state in record.states:
            numel = torch.Size(record.shape).numel()
            assert torch.equal(converted.read(name, state, 0, numel), source.read(name, state, 0, numel))


def test_different_update_counts_within_a_group_are_written_only_at_stage_0(
    copied: Path, tmp_path: Path
) -> None:
    source = DeepSpeedCheckpoint.open(str(copied))
    parameters = dict(source.manifest.parameters)
    parameters["first.weight"] = parameters["first.weight"].model_copy(update={"updates": 9})
    source.manifest = source.manifest.model_copy(update={"parameters": parameters})
    options: dict[str, Any] = {"world_size": 1, "param_dtype": "fp32", "tag": "x"}
    for stage in (1, 3):
        with pytest.raises(CheckpointError, match=r"1 updates: embed\.weight.*9 updates: first\.weight"):
            write_deepspeed(source, str(tmp_path / "to"), zero_stage=stage, **options)
    assert not (tmp_path / "to").exists()
    write_deepspeed(source, str(tmp_path / "to"), zero_stage=0, **options)
    back = DeepSpeedCheckpoint.open(str(tmp_path / "to"))
    assert (back.updates("first.weight"), back.updates("embed.weight")) == (9, 1)


def test_reading_an_interval_reads_only_its_bytes(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = DeepSpeedCheckpoint.open(str(copied))
    num_bytes: list[int] = []
    read_into = LocalStorage.read_into

    def recorded(self: LocalStorage, path: str, start: int, out: memoryview) -> int:
        num_bytes.append(len(out))
        return read_into(self, path, start, out)

    monkeypatch.setattr(LocalStorage, "read_into", recorded)
    assert checkpoint.read("embed.weight", "exp_avg", 30, 50).numel() == 20
    assert sum(num_bytes) == 20 * 4
