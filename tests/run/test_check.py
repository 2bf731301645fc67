"""`distft config check`: all faults at once, remarks on what no one can mean, and what the run needs."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_runs import fine_tuning, pretraining, run
from typer.testing import CliRunner

from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.manifest import Manifest, Progress
from distft.checkpoint.retention import steps_to_prune
from distft.checkpoint.safetensors_header import read_safetensors_header
from distft.cli.main import app
from distft.config import dump_yaml, parse, redact
from distft.errors import ConfigError, DistftError
from distft.run.check import check_run, describe_run
from distft.run.config import RunConfig
from distft.run.plan import num_kept_commits, show_bytes
from distft.run.resume import changed_settings, require_resumable
from distft.run.training_module import build_training_module
from distft.topology import Topology


def checked(raw: Mapping[str, Any], world_size: int = 1) -> Any:
    return describe_run(parse(RunConfig, raw), world_size)


def problems(raw: Mapping[str, Any]) -> str:
    with pytest.raises(DistftError) as caught:
        check_run(parse(RunConfig, raw), Topology())
    return str(caught.value)


def test_faults_in_several_files_are_told_together_with_a_wrong_tokenizer(data: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(data / "shards", shards)
    shard = next((shards / "train").glob("shard_*"))
    shard.unlink()
    (tmp_path / "file").touch()
    raw = pretraining(
        data,
        tmp_path / "file" / "run",
        tokenizer=str(tmp_path / "no.model"),
        data={"type": "tokens", "sources": [{"path": str(shards / "train")}]},
        validation={"type": "labelled", "path": str(tmp_path / "no.jsonl")},
        init_from=str(tmp_path / "no_checkpoint"),
    )
    text = problems(raw)
    for part in (
        f"run_dir={tmp_path}/file/run cannot be a directory",
        f"{tmp_path}/no.model",
        "data.sources.0.path: ",
        shard.name,
        f"validation.path: {tmp_path}/no.jsonl does not exist",
        f"init_from: {tmp_path}/no_checkpoint does not exist",
    ):
        assert part in text


def test_a_damaged_tokenizer_hides_no_fault_of_the_model_or_the_data(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"\x00\x01")
    raw = pretraining(
        data,
        tmp_path / "run",
        tokenizer=str(broken),
        trainable=["no_such_block.*"],
        data={"type": "tokens", "sources": [{"path": str(tmp_path / "nowhere")}]},
    )
    text = problems(raw)
    for part in (str(broken), "no_such_block", f"data.sources.0.path: {tmp_path}/nowhere does not exist"):
        assert part in text


@pytest.mark.parametrize("run_dir", ["/proc/run", "/proc/a/b", "/sys/run", "/dev/null/x", "x" * 300])
def test_a_directory_that_cannot_be_made_is_told_before_any_work(
    data: Path, tmp_path: Path, run_dir: str
) -> None:
    assert f"run_dir={run_dir} can" in problems(pretraining(data, Path(run_dir)))
    raw = pretraining(data, tmp_path, checkpoint={"directory": run_dir})
    assert f"checkpoint.directory={run_dir} can" in problems(raw)


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"optim": {"peak_lr": 1e9}}, "optim.peak_lr=1e+09: one update changes every weight"),
        ({"optim": {"peak_lr": 0.9, "weight_decay": 2.0}}, "each update would reverse the weights"),
        ({"train": {"max_steps": 10**7}}, "times: check train.max_steps"),
        ({"train": {"max_steps": 3, "log_every_steps": 5}}, "log_every_steps=5 is more than the 3 steps"),
        ({"checkpoint": {"every_steps": 50}}, "checkpoint.every_steps=50 is more than the 12 steps"),
        ({"checkpoint": {"every_steps": 4, "keep_every_steps": 6}}, "make one a multiple of the other"),
        ({"validation": None, "evaluation": {"max_sequences": 3}}, "evaluation.max_sequences has no effect"),
        ({"allow_model_changes": ["dropout"]}, "allow_model_changes has no effect"),
        ({"trainable": ["blocks.*"]}, "trainable leaves parameters frozen at random values"),
        (
            {"trainable": ["blocks.1.*"], "optim": {"lr_scales": {"blocks.0.*": 0.5}}},
            "optim.lr_scales.'blocks.0.*' has no effect",
        ),
        (
            {"model": {"max_seq_len": 24, "d_model": 16, "num_layers": 1, "num_heads": 2,
                       "attention_kernel": "cudnn"}},
            "This machine cannot run it: model.attention_kernel=cudnn needs",
        ),
        (
            {"model": {"max_seq_len": 24, "d_model": 16, "num_layers": 1, "num_heads": 2,
                       "sliding_window": 24}},
            "sliding_window of the model has no effect on this run: it reaches 23 tokens, and rows have "
            "batch.seq_len=24",
        ),
        (
            {"device": "cuda", "model": {"max_seq_len": 24, "d_model": 16, "num_layers": 1, "num_heads": 2,
                                         "dropout": 0.1}},
            "model.dropout=0.1 drops attention weights, too, which no fast kernel does: on a GPU each layer",
        ),
        ({"device": "cuda", "phases": [{"steps": 2}, {"dropout": 0.3}]}, "model.dropout=0.3 drops attention"),
        ({"engine": {"type": "local", "frozen_bits": 8}}, "engine.frozen_bits=8 has no effect: no matrix"),
        ({"engine": {"type": "local", "allow_tf32": True}}, "engine.allow_tf32 has no effect on a CPU"),
        ({"engine": {"type": "local", "fp8_min_features": 32}}, "engine.fp8_min_features has no effect"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_setting_that_no_one_can_mean_is_told(
    data: Path, tmp_path: Path, changes: dict[str, Any], remark: str
) -> None:
    found = checked(pretraining(data, tmp_path / "run", **changes)).remarks
    assert any(remark in line for line in found), found


def test_ordinary_runs_give_no_remark(data: Path, pretrained: Path, tmp_path: Path) -> None:
    assert checked(pretraining(data, tmp_path / "run")).remarks == []
    with_window = pretraining(data, tmp_path / "run")
    with_window["model"]["sliding_window"] = 23
    assert checked(with_window).remarks == []
    assert checked(fine_tuning(data, tmp_path / "run", pretrained)).remarks == []


def test_a_run_on_a_gpu_tells_once_what_dropout_in_attention_costs(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = pretraining(data, tmp_path, engine={"type": "local", "compile": False})
    raw["model"]["dropout"] = 0.25
    plan, inputs = check_run(parse(RunConfig, raw), Topology())
    for kind, num_warnings in (("cpu", 0), ("cuda", 1), ("cuda", 1)):
        build_training_module(inputs, plan, torch.device(kind))
        assert sum("drops attention weights" in text for text in caplog.messages) == num_warnings
    assert checked(raw).remarks == []  # device: cpu


def test_workers_that_differ_from_the_ranks_of_the_check_are_told(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path / "run", engine={"type": "zero"}, cluster={"workers": 4})
    assert "cluster.workers starts 4 ranks, and this check is for 2" in "".join(checked(raw, 2).remarks)
    assert checked(raw, 4).remarks == []


def test_deepspeeds_own_parser_judges_its_settings(data: Path, tmp_path: Path) -> None:
    def raw(settings: dict[str, Any]) -> dict[str, Any]:
        return pretraining(data, tmp_path / "run", engine={"type": "zero", "deepspeed": settings})

    assert checked(raw({"wall_clock_breakdown": False})).remarks == []
    (remark,) = checked(raw({"wall_clock_breakdwn": True})).remarks
    assert remark.startswith("engine.deepspeed.wall_clock_breakdwn has no effect")
    assert remark.endswith("Did you mean 'wall_clock_breakdown'?")
    assert problems(
        raw({"zero_optimization": {"reduce_bucket_size": "many", "nonsense": 1}})
    ).splitlines() == [
        "engine.deepspeed.zero_optimization.reduce_bucket_size='many': must be an integer.",
        "engine.deepspeed.zero_optimization.nonsense=1 is not a setting of DeepSpeed: leave it out.",
    ]
    assert "refused by DeepSpeed" in problems(raw({"comms_logger": 5}))


def test_a_resume_with_another_engine_lists_no_settings_that_only_one_of_them_has(
    data: Path, tmp_path: Path
) -> None:
    before = pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": 2, "param_dtype": "bf16"})
    now = pretraining(data, tmp_path, engine={"type": "local"}, optim={"peak_lr": 0.02})
    saved = parse(RunConfig, before).model_dump(mode="json")
    assert changed_settings(saved, parse(RunConfig, now)) == [
        "engine.param_dtype", "engine.type", "optim.peak_lr", "optim.schedule",
    ]  # fmt: skip
    assert changed_settings(saved, parse(RunConfig, before)) == []


def test_a_resume_from_data_at_a_url_with_a_login_is_the_same_run(data: Path, tmp_path: Path) -> None:
    """Manifests are redacted, so what they say is compared with the redacted settings of now."""
    raw = pretraining(
        data, tmp_path, data={"type": "tokens", "sources": [{"path": "s3://me:pw@bucket/train"}]}
    )
    config = parse(RunConfig, raw)
    saved = Manifest(
        run_id="a",
        progress=Progress(step=1),
        config=redact(config.model_dump(mode="json")),
        written_by={},
        parameters={},
        files=[],
    )
    assert "pw" not in str(saved)
    require_resumable(saved, config, None)


@given(st.integers(1, 60), st.integers(1, 12) | st.none(), st.integers(1, 5), st.integers(1, 12) | st.none())
def test_as_many_commits_stay_as_the_runs_own_pruning_leaves(
    num_steps: int, every: int | None, keep_last: int, keep_every: int | None
) -> None:
    config = CheckpointConfig(every_steps=every, keep_last=keep_last, keep_every_steps=keep_every)
    present: list[int] = []
    for step in range(1, num_steps + 1):
        if step == num_steps or (every is not None and step % every == 0):
            present.append(step)
            present = [one for one in present if one not in steps_to_prune(present, config)]
    assert num_kept_commits(config, num_steps) == len(present)


@pytest.mark.parametrize("kind", ["pretraining", "fine_tuning"])
def test_predicted_bytes_of_checkpoints_are_those_written(
    data: Path, pretrained: Path, tmp_path: Path, kind: str
) -> None:
    changes = {"engine": {"type": "local", "param_dtype": "bf16"}, "checkpoint": {"every_steps": 4}}
    optim = {"peak_lr": 0.001, "ema_decay": 0.9}
    make = pretraining(data, tmp_path / "run", optim=optim, **changes)
    if kind == "fine_tuning":
        make = fine_tuning(data, tmp_path / "run", pretrained, optim=optim, **changes)
    needs = checked(make).needs
    run(Topology(), make)
    root = tmp_path / "run" / "checkpoints"
    written = list(root.rglob("*.safetensors"))
    sizes = {path: path.stat().st_size - _header_bytes(path) for path in written}
    assert sum(sizes.values()) == needs.kept_bytes
    newest = max(path.parent.name for path in written if path.parent.name.startswith("step_"))
    own = sum(size for path, size in sizes.items() if path.parent.name == newest)
    assert own + needs.shared_bytes == needs.checkpoint_bytes
    assert (needs.shared_bytes > 0) == (kind == "fine_tuning")


def _header_bytes(path: Path) -> int:
    return min(tensor.offset for tensor in read_safetensors_header(str(path)).values())


def test_the_command_prints_a_table_or_json_and_warnings_apart(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(parse(RunConfig, pretraining(data, tmp_path / "run", optim={"peak_lr": 1e9}))))
    done = CliRunner().invoke(
        app, ["config", "check", str(path), "--mfu", "0.4", "--peak-tflops", "989"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "less than a second at 40% of 989 TFLOP/s a rank" in done.stdout
    assert "warning: optim.peak_lr=1e+09" in done.stderr
    done = CliRunner().invoke(app, ["config", "check", str(path), "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["length"]["steps"] == 12
    assert found["length"]["tokens"] == 12 * 8 * 24
    assert found["length"]["hours"] is None
    assert found["warnings"][0].startswith("optim.peak_lr")


@pytest.mark.parametrize("world_size", ["0", "-3", "1000001"])
def test_a_number_of_ranks_that_cannot_be_is_refused(tmp_path: Path, world_size: str) -> None:
    done = CliRunner().invoke(app, ["config", "check", str(tmp_path), "--world-size", world_size])
    assert done.exit_code == 2
    assert "--world-size" in done.stderr


def test_an_engine_of_one_process_is_refused_for_several_ranks(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one process, but 8 ranks are to run: .*--world-size 1"):
        checked(pretraining(data, tmp_path / "run"), world_size=8)


def test_half_an_expectation_of_speed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs both --mfu and --peak-tflops"):
        CliRunner().invoke(app, ["config", "check", str(tmp_path), "--mfu", "0.4"], catch_exceptions=False)


def test_bytes_are_shown_in_decimal_units() -> None:
    shown = [show_bytes(n) for n in (0, 999, 1000, 1_234_567, 81_900_000_000, 10**18)]
    assert shown == ["0 B", "999 B", "1 kB", "1.23 MB", "81.9 GB", "1,000 PB"]
