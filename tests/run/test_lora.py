"""Runs with adapters: the same at every ZeRO stage, after any restart, and merged."""

import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, logged, pretraining, run, run_until_power_cut
from torch import Tensor

from distft.checkpoint.adapters import merged
from distft.checkpoint.committed import find_checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.cli.main import main
from distft.config import parse
from distft.errors import CheckpointError, ConfigError
from distft.run.check import check_run
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.run.pretrained import evaluate_checkpoint, load_model, open_model
from distft.run.training_module import build_training_module
from distft.topology import BatchPlan, Topology

CPU = torch.device("cpu")
LORA = {"rank": 3, "alpha": 6.0}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": {**LORA, "dora": True, "rslora": True, "targets": ["q", "mlp.*"]},
    "dropout": {**LORA, "dropout": 0.3},
}


def _config(
    data: Path, run_dir: Path, init_from: Path, lora: dict[str, Any], /, **changes: Any
) -> dict[str, Any]:
    raw = {**fine_tuning(data, run_dir, init_from), "lora": lora}
    del raw["trainable"]
    return {**raw, **changes}


def _run(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


def _weights(run_dir: Path) -> dict[str, Tensor]:
    checkpoint = open_source(str(run_dir))
    return {
        name: checkpoint.read(name, "weight", 0, math.prod(record.shape)).view(record.shape)
        for name, record in checkpoint.manifest.parameters.items()
    }


@pytest.fixture(scope="module")
def adapted(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one run of each of `KINDS`."""
    root = tmp_path_factory.mktemp("adapted")
    for kind, lora in KINDS.items():
        run(Topology(), _config(data, root / kind, pretrained, lora))
    return root


def test_adapters_and_heads_train_and_nothing_else(adapted: Path, pretrained: Path) -> None:
    before, parameters = _weights(pretrained), find_checkpoint(str(adapted / "dora")).manifest.parameters
    after = _weights(adapted / "dora")
    trained = {name for name, record in parameters.items() if record.trainable}
    assert trained == {name for name in after if "lora_" in name or name.startswith("classifier.")}
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "lora_a", "lora_b", "lora_magnitude"}
    for name in set(after) - trained:
        assert torch.equal(after[name], before[name]), name
    assert all(float(after[name].abs().max()) > 0 for name in trained), "every B has left zero"


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "stage"), [("dora", 3), ("dropout", 2)])
def test_a_run_with_adapters_resumes_on_other_ranks(
    data: Path, tmp_path: Path, pretrained: Path, adapted: Path, kind: str, stage: int
) -> None:
    raw = _config(data, tmp_path / "cut", pretrained, KINDS[kind])
    run_until_power_cut(raw, 6)
    run_ranks(_run, 2, {**raw, "engine": {"type": "zero", "zero_stage": stage}}, timeout_s=180)
    assert logged(tmp_path / "cut") == pytest.approx(logged(adapted / kind), abs=1e-6)


# PEFT uses what the installed transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.ranks
def test_peft_opens_adapters_that_two_ranks_trained_at_stage_3(
    data: Path, tmp_path: Path, pretrained: Path
) -> None:
    """Each rank has a part of every adapter; trl#4416 saved empty ones. All linear layers have one."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    assert main(["checkpoint", "convert", str(pretrained), str(base), "--to", "huggingface"]) == 0
    raw = pretraining(data, tmp_path / "run", init_from=str(base), lora={"rank": 3, "dora": True})
    raw |= {"train": {"max_steps": 2}, "optim": {"peak_lr": 0.1}, "validation": None}
    del raw["model"]
    run_ranks(_run, 2, {**raw, "engine": {"type": "zero", "zero_stage": 3, "compile": False}}, timeout_s=180)
    assert main(["checkpoint", "convert", str(tmp_path / "run"), str(adapter), "--to", "peft"]) == 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3, "A, B and magnitude of 7 linear layers in 2 blocks"
    assert [name for name, values in tensors.items() if not values.count_nonzero()] == []
    ids = torch.arange(24).view(2, 12) % 13
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    expected = load_model(open_model(str(tmp_path / "run")), CPU)
    with torch.no_grad():
        before, logits = plain(ids).logits, expected(ids)["lm_head"]
        found = peft.PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
    torch.testing.assert_close(found, logits[..., : found.shape[2]], atol=1e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 0.01, "they have learnt something"


def test_every_tool_opens_it_like_any_other(adapted: Path, tmp_path: Path) -> None:
    """Evaluation of the run, of what was merged on export, and of a copy that needs no base."""
    evaluated = evaluate_checkpoint(str(adapted / "dora"), [], Topology())
    assert evaluated["loss"] == pytest.approx(logged(adapted / "dora", "validation/loss")[12], abs=1e-6)
    for to in ("distft", "huggingface"):
        main(["checkpoint", "convert", str(adapted / "dora"), str(tmp_path / to), "--to", to])
    copy = open_source(str(tmp_path / "distft"))
    assert copy.manifest.base is None
    assert {"blocks.0.attn.q.lora_a", "blocks.0.attn.q.weight"} <= copy.manifest.parameters.keys()
    assert evaluate_checkpoint(str(tmp_path / "distft"), [], Topology()) == evaluated
    main(
        [
            "checkpoint",
            "average",
            *[str(adapted / kind) for kind in ("lora", "dora")],
            "-o",
            str(tmp_path / "mean"),
        ]
    )
    mean = open_source(str(tmp_path / "mean"))
    assert not any("lora_" in name for name in mean.manifest.parameters)
    name = "blocks.1.attn.q.weight"
    parts = [
        merged(open_source(str(adapted / kind))).read(name, "weight", 0, 256) for kind in ("lora", "dora")
    ]
    torch.testing.assert_close(mean.read(name, "weight", 0, 256), (parts[0] + parts[1]) / 2)
    exported = open_source(str(tmp_path / "huggingface")).read(name, "weight", 0, 256)
    torch.testing.assert_close(exported, parts[1])


def test_commits_hold_the_adapters_alone(data: Path, adapted: Path, tmp_path: Path, pretrained: Path) -> None:
    checkpoints = adapted / "lora" / "checkpoints"
    assert not list(checkpoints.glob("frozen_*"))
    commit = find_checkpoint(str(adapted / "lora"))
    held = {name for file in commit.manifest.files for name in file.intervals}
    assert held == {name for name, record in commit.manifest.parameters.items() if record.trainable}
    raw = _config(data, tmp_path / "copies", pretrained, {**LORA, "copies_base": True})
    run(Topology(), raw)
    assert len(list((tmp_path / "copies/checkpoints").glob("frozen_*"))) == 1
    assert find_checkpoint(str(tmp_path / "copies")).manifest.base is None
    assert logged(tmp_path / "copies") == logged(adapted / "lora")


def test_a_base_that_moved_or_changed_is_told(data: Path, tmp_path: Path, pretrained: Path) -> None:
    shutil.copytree(pretrained, tmp_path / "a/base")
    raw = _config(data, tmp_path / "a/run", tmp_path / "a/base", LORA, train={"max_steps": 4})
    run(Topology(), raw)
    expected = evaluate_checkpoint(str(tmp_path / "a/run"), [], Topology())
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert evaluate_checkpoint(str(tmp_path / "b/run"), [], Topology()) == expected, "moved together"
    commit = find_checkpoint(str(tmp_path / "b/base")).path
    shutil.move(commit, tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"holds adapters alone, and their base is no longer at .*put it"
    ):
        evaluate_checkpoint(str(tmp_path / "b/run"), [], Topology())
    other = pretraining(data, tmp_path / "other", seed=1)
    run(Topology(), other)
    shutil.copytree(find_checkpoint(str(tmp_path / "other")).path, commit)
    with pytest.raises(
        CheckpointError, match=r"holds adapters for another base than .*weights, such as blocks"
    ):
        evaluate_checkpoint(str(tmp_path / "b/run"), [], Topology())
    resumed = {**raw, "run_dir": str(tmp_path / "b/run"), "init_from": commit, "train": {"max_steps": 5}}
    with pytest.raises(CheckpointError, match="for another base than") as refused:
        run(Topology(), resumed)
    assert "damaged" not in str(refused.value)


def test_adapters_go_on_in_another_run(data: Path, tmp_path: Path, adapted: Path) -> None:
    """With the same settings; without lora they are merged in; with others the run is refused."""
    before = _weights(adapted / "lora")
    raw = _config(
        data, tmp_path / "run", adapted / "lora", LORA, train={"max_steps": 1}, optim={"peak_lr": 1e-30}
    )
    run(Topology(), raw)
    after = _weights(tmp_path / "run")
    assert all(torch.equal(after[name], values) for name, values in before.items())
    plain = {**raw, "lora": None, "trainable": ["classifier.*"], "run_dir": str(tmp_path / "plain")}
    run(Topology(), plain)
    source = open_source(str(adapted / "lora"))
    expected = merged(source).read("blocks.0.mlp.up.weight", "weight", 0, 50)
    assert torch.equal(_weights(tmp_path / "plain")["blocks.0.mlp.up.weight"].view(-1)[:50], expected)
    with pytest.raises(ConfigError, match=r"lora.rank is 3 in .* and 4 here\.\nlora.targets is"):
        read_inputs(parse(RunConfig, {**raw, "lora": {"rank": 4, "alpha": 6.0, "targets": ["q"]}}))


def test_settings_that_do_not_go_together_are_refused(data: Path, tmp_path: Path, pretrained: Path) -> None:
    def check(lora: dict[str, Any], **changes: Any) -> None:
        config = parse(RunConfig, _config(data, tmp_path / "run", pretrained, lora, **changes))
        _, inputs = check_run(config, Topology())
        build_training_module(inputs, BatchPlan(**config.batch.model_dump(), dp_world_size=1), CPU)

    with pytest.raises(
        ConfigError, match=r"lora.targets: 'attn.qkv' matches no linear layer; there are blocks\.\*"
    ):
        check({**LORA, "targets": ["attn.qkv"]})
    with pytest.raises(ConfigError, match="'@lora' matches none of the 21 parameters"):
        check(None, trainable=["@lora"])  # type: ignore[arg-type]
    recomputing = {"type": "local", "activation_checkpointing": "full"}
    with pytest.raises(ConfigError, match=r"lora.dropout=0.1 with engine.activation_checkpointing=full"):
        check({**LORA, "dropout": 0.1}, engine=recomputing)
    with pytest.raises(ConfigError, match="adapters have no FP8"):
        check(LORA, engine={"type": "local", "fp8": "tensorwise", "param_dtype": "bf16"})


def test_a_resume_with_other_adapters_is_refused(data: Path, adapted: Path, pretrained: Path) -> None:
    raw = _config(data, adapted / "lora", pretrained, {**LORA, "rank": 2})
    with pytest.raises(ConfigError, match=r"lora.rank was 3 and is now 2"):
        run(Topology(), raw)


def test_the_first_step_computes_what_the_base_does(adapted: Path) -> None:
    """B is zero, and DoRA's magnitudes are the lengths of the base's rows."""
    first = {kind: logged(adapted / kind)[1] for kind in KINDS}
    assert first == pytest.approx(dict.fromkeys(KINDS, first["lora"]), abs=1e-6)


@pytest.mark.ranks
def test_a_base_in_4_bits_is_no_part_of_commits_and_resumes_on_other_ranks(
    data: Path, tmp_path: Path, pretrained: Path
) -> None:
    raw = _config(data, tmp_path / "whole", pretrained, LORA, engine={"type": "local", "frozen_bits": 4})
    run(Topology(), raw)
    manifest = find_checkpoint(str(tmp_path / "whole")).manifest
    assert manifest.base is not None
    held = {name for file in manifest.files for name in file.intervals}
    assert held == {name for name, record in manifest.parameters.items() if record.trainable}
    before, after = _weights(pretrained), _weights(tmp_path / "whole")
    assert all(torch.equal(after[n], v) for n, v in before.items() if n in after and n.startswith("blocks."))
    cut = {**raw, "run_dir": str(tmp_path / "cut")}
    run_until_power_cut(cut, 6)
    zero = {"type": "zero", "zero_stage": 3, "frozen_bits": 4}
    run_ranks(_run, 2, {**cut, "engine": zero}, timeout_s=180)
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=1e-6)
    copied = {**raw, "run_dir": str(tmp_path / "copied"), "lora": {**LORA, "copies_base": True}}
    run(Topology(), copied)
    assert find_checkpoint(str(tmp_path / "copied")).manifest.base is None
    copy = _weights(tmp_path / "copied")
    assert all(torch.equal(copy[name], values) for name, values in after.items())


def test_bits_of_frozen_weights_may_change_on_a_resume(data: Path, tmp_path: Path, pretrained: Path) -> None:
    raw = _config(data, tmp_path / "run", pretrained, LORA, engine={"type": "local", "frozen_bits": 8})
    run_until_power_cut(raw, 6)
    run(Topology(), {**raw, "engine": {"type": "local"}})
    assert max(logged(tmp_path / "run")) == 12
