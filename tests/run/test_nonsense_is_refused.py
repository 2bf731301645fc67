"""Runs that would train nonsense, or nothing, are refused or fail; they never end as completed."""

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import run_ranks
from support.small_runs import events, fine_tuning, logged, pretraining, run

from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.manifest import MANIFEST, Manifest
from distft.cli.main import main
from distft.collectives import ProcessGroup, require_same_device
from distft.config import dump_yaml, parse
from distft.config.yaml_text import to_yaml
from distft.errors import ConfigError, DistftError, ErrorCollector, TrainingError
from distft.objective.causal_lm import CausalLM
from distft.run.config import RunConfig, load_run_config
from distft.run.paths import require_outputs
from distft.topology import Topology


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rope_theta": 5000.0}, r"model\.rope_theta is 10000\.0 in .* and 5000\.0 here"),
        ({"tie_embeddings": False}, r"model\.tie_embeddings is True"),
        ({"num_layers": 1}, r"model\.num_layers is 2"),
        ({"attention": "bidirectional"}, r"model\.attention is 'causal'"),
    ],
)
def test_a_model_that_differs_from_the_checkpoint_is_refused_unless_the_change_is_named(
    data: Path, pretrained: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    model = {**pretraining(data, tmp_path)["model"], **change}
    raw = fine_tuning(data, tmp_path / "run", pretrained, model=model, trainable=["classifier.*"])
    with pytest.raises(ConfigError, match=problem) as caught:
        run(Topology(), raw)
    (name,) = change
    assert f"allow_model_changes=[{name}]" in str(caught.value)
    run(Topology(), {**raw, "allow_model_changes": [name]})


def test_new_and_unused_parameters_of_a_start_are_recorded(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    model = {**pretraining(data, tmp_path)["model"], "num_layers": 1, "tie_embeddings": False}
    raw = pretraining(
        data,
        tmp_path / "run",
        model=model,
        init_from=str(pretrained),
        allow_model_changes=["num_layers", "tie_embeddings"],
    )
    run(Topology(), raw)
    start = events(tmp_path / "run")[0]
    assert start["new_parameters"] == "lm_head.weight"
    assert start["unused_parameters"] == "blocks.1.* (9 parameters)"


def test_single_fields_of_the_checkpoints_model_can_be_set(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    raw = fine_tuning(data, tmp_path / "run", pretrained)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(parse(RunConfig, raw)))
    config = load_run_config(path, ["model={dropout: 0.25}"])
    saved = load_run_config(pretrained / "config.yaml").model
    assert config.model is not None
    assert saved is not None
    assert config.model.dropout == 0.25
    assert config.model.model_copy(update={"dropout": saved.dropout, "vocab_size": None}) == saved.model_copy(
        update={"vocab_size": None}
    )


def test_a_language_model_that_sees_its_targets_is_refused(data: Path, tmp_path: Path) -> None:
    model = {**pretraining(data, tmp_path)["model"], "attention": "bidirectional"}
    with pytest.raises(ConfigError, match="every token sees the one that it has to predict"):
        run(Topology(), pretraining(data, tmp_path / "run", model=model))


def test_pooling_the_first_token_of_a_causal_model_is_refused(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    objective = {"type": "classification", "pooling": "first"}
    with pytest.raises(ConfigError, match="the rest of the text has no effect"):
        run(Topology(), fine_tuning(data, tmp_path / "run", pretrained, objective=objective))


def _poison(monkeypatch: pytest.MonkeyPatch, *, first: int, last: int) -> None:
    """Losses of steps [first, last] are NaN; a step has four micro-batches."""
    loss_sums = CausalLM.loss_sums
    calls = {"made": 0}

    def loss_or_nan(self: CausalLM, *arguments: Any) -> Any:
        step = calls["made"] // 4 + 1
        calls["made"] += 1
        factor = float("nan") if first <= step <= last else 1.0
        return {name: value * factor for name, value in loss_sums(self, *arguments).items()}

    monkeypatch.setattr(CausalLM, "loss_sums", loss_or_nan)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (
            1,
            12,
            r"Steps 1 to 12 all had gradients that are not finite, so the weights are still those of step 0",
        ),
        (10, 12, r"Steps 10 to 12 all had .* still those of step 9"),
        (2, 9, r"8 of 12 steps had gradients that are not finite .* train\.max_skipped_share=0\.5"),
    ],
)
def test_a_run_whose_steps_were_skipped_fails_instead_of_completing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int, message: str
) -> None:
    _poison(monkeypatch, first=first, last=last)
    with pytest.raises(TrainingError, match=message):
        run(Topology(), pretraining(data, tmp_path))
    assert events(tmp_path)[-1] == {**events(tmp_path)[-1], "kind": "finish", "status": "failed"}


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (1, 12, r"Steps 1 to 8 all had .* still those of step 0 .*; at the end of the run it is 2\)"),
        (6, 12, r"Steps 6 to 8 all had .* still those of step 5"),
        (2, 6, r"5 of 8 steps had gradients that are not finite .* train\.max_skipped_share=0\.5"),
    ],
)
def test_a_run_that_stalls_since_its_steps_were_skipped_fails_instead_of_stopping_early(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int, message: str
) -> None:
    _poison(monkeypatch, first=first, last=last)
    stopping = {"patience": 1, "min_delta": 100.0}
    train = {"max_steps": 12, "log_every_steps": 100, "early_stopping": stopping}
    with pytest.raises(TrainingError, match=message):
        run(Topology(), pretraining(data, tmp_path, train=train, evaluation={"every_steps": 4}))
    assert events(tmp_path)[-1] == {**events(tmp_path)[-1], "kind": "finish", "status": "failed"}
    assert not {"early_stop", "best"} & {event["kind"] for event in events(tmp_path)}


@pytest.mark.parametrize("stopping", [None, {"patience": 1, "metric": "accuracy"}])
def test_a_run_that_ends_with_a_validation_loss_of_nan_fails_however_short_it_is(
    data: Path, tmp_path: Path, stopping: dict[str, Any] | None
) -> None:
    train = {"max_steps": 2, "log_every_steps": 1, "early_stopping": stopping}
    optim = {"peak_lr": 1e30, "schedule": {"type": "constant"}}
    raw = pretraining(data, tmp_path, train=train, optim=optim, evaluation={"every_steps": 1})
    raw["model"] = {"type": "deep_averaging", "max_seq_len": 24, "d_model": 16}  # has no norm
    with pytest.raises(
        TrainingError, match=r"ends at step \d with validation/loss=(nan|inf).*another run_dir"
    ):
        run(Topology(), raw)
    assert events(tmp_path)[-1] == {**events(tmp_path)[-1], "kind": "finish", "status": "failed"}


def test_a_few_skipped_steps_let_a_run_complete_and_are_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, first=5, last=6)
    run(Topology(), pretraining(data, tmp_path))
    assert logged(tmp_path, "skipped_steps")[12] == 2


def test_ranks_on_different_devices_are_named() -> None:
    require_same_device(["cuda"] * 4)
    with pytest.raises(ConfigError, match=r"rank 2 \(cpu\), the others cuda"):
        require_same_device(["cuda", "cuda", "cpu", "cuda"])


def _join_the_group_of_ray(topology: Topology, kinds: list[str]) -> str:
    """The error of a rank whose process group exists, as under Ray, before it has chosen a device."""
    dist.init_process_group("gloo")
    with pytest.raises(ConfigError) as caught:
        ProcessGroup(topology, torch.device(kinds[topology.rank]), 60)
    return str(caught.value)


@pytest.mark.ranks
def test_ranks_on_different_devices_are_named_when_their_group_exists_already() -> None:
    found = run_ranks(_join_the_group_of_ray, 2, ["cuda", "cpu"], timeout_s=240)
    assert found[0] == found[1]
    assert found[0].startswith("Ranks chose different devices: rank ")


@pytest.fixture
def hostile(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pretrained run whose configuration names classes in a module that can be imported."""
    (tmp_path / "modules").mkdir()
    module = tmp_path / "modules" / "hostile_module.py"
    module.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemError('code ran')")
    monkeypatch.syspath_prepend(module.parent)
    copied = tmp_path / "hostile"
    shutil.copytree(pretrained, copied)
    named = {"type": "hostile_module:Anything", "peak_step": 3}
    for manifest in copied.rglob(MANIFEST):
        saved = Manifest.from_bytes(manifest.read_bytes(), str(manifest))
        config = {
            **saved.config,
            "optim": {**saved.config["optim"], "schedule": named},
            "objective": named,
            "validation": named,
            "engine": named,
            "trackers": [named],
        }
        manifest.write_bytes(saved.model_copy(update={"config": config}).to_bytes())
        last = config
    (copied / "config.yaml").write_text(to_yaml(last))
    return copied


@pytest.mark.parametrize(
    "command",
    [
        "evaluate {run}",
        "generate {run} --prompt the",
        "audit {run}",
        "checkpoint inspect {run}",
        "checkpoint verify {run}",
        "checkpoint diff {run} {run}",
        "checkpoint plan {run}",
        "checkpoint reshard {run} {out}",
        "checkpoint convert {run} {out} --to huggingface",
        "checkpoint average {run} {run} -o {out}",
        "config check {yaml} init_from={run}",
    ],
)
def test_no_configuration_out_of_a_file_that_is_read_runs_code(
    data: Path, hostile: Path, tmp_path: Path, command: str
) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(dump_yaml(parse(RunConfig, pretraining(data, tmp_path / "new"))))
    main(command.format(run=hostile, out=tmp_path / "out", yaml=yaml).split())
    assert not (tmp_path / "ran").exists()
    assert "hostile_module" not in sys.modules


def test_no_start_from_a_checkpoint_and_no_resume_runs_code_of_its_configuration(
    data: Path, hostile: Path, tmp_path: Path
) -> None:
    for raw in (
        pretraining(data, tmp_path / "new", init_from=str(hostile)),
        pretraining(data, hostile, train={"max_steps": 13}),
    ):
        with suppress(DistftError):
            run(Topology(), raw)
        assert not (tmp_path / "ran").exists()


def test_with_trust_the_same_configuration_is_imported(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(hostile), "--prompt", "the"]) == 2
    assert "pass --trust if you know who wrote it" in capsys.readouterr().err
    assert main(["generate", str(hostile), "--prompt", "the", "--trust"]) == 2
    assert (tmp_path / "ran").exists()


def test_an_audit_of_sequences_needs_no_trust_and_tells_why_rows_are_not_counted(
    hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(hostile)]) == 0
    told = capsys.readouterr().out
    assert "step 12, 1 start, ranks 1, 0 steps done again" in told
    assert "was used exactly once" in told
    assert "uses per row of the data were not counted: " in told
    assert "pass --trust" in told


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "events.jsonl"])
def test_a_start_replaces_no_file_of_the_user(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine: 1\n")
    errors = ErrorCollector()
    require_outputs(RunConfig.model_construct(run_dir=str(tmp_path), checkpoint=CheckpointConfig()), errors)
    with pytest.raises(ConfigError, match=f"{name} that no run of distft wrote"):
        errors.raise_if_any()
