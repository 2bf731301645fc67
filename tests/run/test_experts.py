"""A mixture of experts: pretrained, resumed, fine-tuned in part, in several tasks, used and converted."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.cli.main import main
from distft.config import parse
from distft.errors import ConfigError
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.topology import Topology

EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "d_ff": 8, "router_z_weight": 0.001}
MODEL: dict[str, Any] = {"max_seq_len": 24, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24}
ZERO = {"type": "zero", "zero_stage": 3}


def test_a_router_without_gradient_may_be_frozen_but_not_trained(data: Path, tmp_path: Path) -> None:
    model = {**MODEL, "experts": {**EXPERTS, "experts_per_token": 1}}
    raw = pretraining(data, tmp_path / "run", model=model)
    with pytest.raises(ConfigError, match="the router learns nothing from the loss"):
        read_inputs(parse(RunConfig, raw))
    assert read_inputs(parse(RunConfig, {**raw, "trainable": ["*", "!*.router.*"]})).trainable


def _resumed(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def _assert_biases_are_those_of_the_load(run_dir: Path) -> None:
    """Of each commit: the sum of its steps' signs, by the shares that were logged."""
    logged_steps, names = _metrics(run_dir), [f"experts/blocks.0/share_{expert}" for expert in range(4)]
    commits = sorted((run_dir / "checkpoints").glob("step_*"))
    found = []
    for commit in map(Checkpoint.open, map(str, commits)):
        found.append(commit.read("blocks.0.mlp.router.selection_bias", "weight", 0, 4).tolist())
        shares = [[record[name] for name in names] for record in logged_steps[: commit.step]]
        signs = [[(share < 0.25) - (share > 0.25) for share in step] for step in shares]
        assert found[-1] == pytest.approx([0.01 * sum(own) for own in zip(*signs, strict=True)], abs=1e-6)
    assert found[0] != found[-1]


@pytest.mark.ranks
def test_a_run_resumes_on_other_ranks_is_fine_tuned_in_part_and_used(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**MODEL, "experts": {**EXPERTS, "bias_update_rate": 0.01}}
    whole, cut = (
        pretraining(data, tmp_path / name, model=model, checkpoint={"every_steps": 3})
        for name in ("whole", "cut")
    )
    run(Topology(), whole)
    run_until_power_cut(cut, 6)
    run_ranks(_resumed, 2, {**cut, "engine": ZERO}, timeout_s=120)
    expected = logged(tmp_path / "whole")
    assert logged(tmp_path / "cut") == pytest.approx(expected, abs=2e-6)
    last = _metrics(tmp_path / "whole")[-1]
    terms = {name: last[f"{name}/loss"] for name in ("next_token", "load_balance", "router_z")}
    weights = {"next_token": 1.0, "load_balance": 0.01, "router_z": 0.001}
    assert last["loss"] == pytest.approx(sum(weights[name] * terms[name] for name in terms))
    assert terms["load_balance"] > 0.9
    assert sum(last[f"experts/blocks.1/share_{expert}"] for expert in range(4)) == pytest.approx(1)
    assert last["experts/max_load"] >= 1
    _assert_biases_are_those_of_the_load(tmp_path / "whole")
    tuned = fine_tuning(data, tmp_path / "tuned", tmp_path / "cut", trainable=["classifier.*", "blocks.1.*"])
    assert 0 <= run(Topology(), tuned).metrics["validation/accuracy"] <= 1
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "tuned")]) == 0
    prompts = ["-p", "the cat", "-p", "a"]
    assert main(["generate", str(tmp_path / "cut"), *prompts, "--max-new-tokens", "4"]) == 0
    assert "the cat" in capsys.readouterr().out
    found = tmp_path / "cut"
    for format_name in ("universal", "deepspeed"):
        target = tmp_path / format_name
        assert main(["checkpoint", "convert", str(found), str(target), "--to", format_name]) == 0
        assert main(["checkpoint", "verify", str(target)]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "convert", str(found), str(tmp_path / "hf"), "--to", "huggingface"]) == 2
    refused = capsys.readouterr().err
    assert "model.experts.bias_update_rate=0.01 would have to be null" in refused
    assert "init_from with model.experts.bias_update_rate=null and allow_model_changes=[experts]" in refused
    without = pretraining(
        data,
        tmp_path / "without",
        init_from=str(found),
        allow_model_changes=["experts"],
        model={**model, "experts": {**EXPERTS, "bias_update_rate": None}},
        train={"max_steps": 2},
    )
    run(Topology(), without)
    exported = [str(tmp_path / "without"), str(tmp_path / "hf"), "--to", "huggingface"]
    assert main(["checkpoint", "convert", *exported]) == 0
    assert "selection_bias" not in json.dumps(list(open_source(str(tmp_path / "hf")).manifest.parameters))


def test_config_check_tells_the_active_parameters(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = pretraining(data, tmp_path / "run", model={**MODEL, "experts": EXPERTS})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    assert main(["config", "check", str(path)]) == 0
    shapes = read_inputs(parse(RunConfig, raw)).shapes
    idle = 2 * 2 * 3 * 8 * 16  # of two layers, two experts with three matrices
    total = sum(int(_numel(shape)) for shape in shapes.values())
    assert f"{total:,} parameters, {total:,} of them trainable, {total - idle:,} active for a token" in (
        capsys.readouterr().out
    )


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def test_each_part_of_a_mixture_of_tasks_has_the_losses_of_the_routers(data: Path, tmp_path: Path) -> None:
    labelled = {"type": "labelled", "path": str(data / "train.jsonl")}
    tokens = {"type": "tokens", "sources": [{"path": str(data / "shards" / "train")}]}
    raw = pretraining(
        data,
        tmp_path / "run",
        model={**MODEL, "experts": EXPERTS},
        data={"type": "streams", "streams": {"text": {"data": tokens}, "labels": {"data": labelled}}},
        objective={
            "type": "mixture",
            "parts": {
                "text": {"objective": {"type": "causal_lm"}},
                "labels": {"objective": {"type": "classification", "pooling": "mean"}, "weight": 0.5},
            },
        },
        validation=None,
        train={"max_steps": 2, "log_every_steps": 1},
    )
    run(Topology(), raw)
    last = _metrics(tmp_path / "run")[-1]
    for part in ("text", "labels"):
        assert last[f"{part}/load_balance/loss"] > 0.5
        assert last[f"{part}/router_z/loss"] > 0


def test_how_training_balances_may_change_and_the_experts_may_not(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path / "run", model={**MODEL, "experts": EXPERTS}, train={"max_steps": 2})
    run(Topology(), raw)

    def start(**changes: Any) -> RunConfig:
        model = {**MODEL, "experts": {**EXPERTS, **changes}}
        next_run = pretraining(data, tmp_path / "next", model=model, init_from=str(tmp_path / "run"))
        return parse(RunConfig, next_run)

    read_inputs(start(load_balance_weight=0.1, router_z_weight=0.0))
    with pytest.raises(ConfigError, match=r"model\.experts.normalize_weights is True in") as error:
        read_inputs(start(normalize_weights=False))
    assert "allow_model_changes=[experts]" in str(error.value)
