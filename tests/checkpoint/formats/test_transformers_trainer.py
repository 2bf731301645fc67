"""Checkpoints that transformers' Trainer writes under DeepSpeed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_cli import cli
from support.rank_pool import run_ranks

from distft.checkpoint.formats.deepspeed.reader import DeepSpeedCheckpoint
from distft.checkpoint.formats.deepspeed.transformers_model import TransformersCheckpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.sources import notes_of

pytestmark = pytest.mark.ranks


def train_with_trainer(_topology: Any, root: str, stage: int) -> dict[str, torch.Tensor]:
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(8)]
    arguments = TrainingArguments(
        root,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        deepspeed={
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: (safe_get_full_fp32_param(param) if stage else param.detach()).clone()
        for name, param in trainer.model_wrapped.module.named_parameters()
    }


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, dict[str, torch.Tensor]]:
    """The ZeRO stage, the Trainer's checkpoint, and the weights in it."""
    pytest.importorskip("accelerate", reason="the Trainer uses DeepSpeed through accelerate")
    root = tmp_path_factory.mktemp("trainer")
    [weights] = run_ranks(train_with_trainer, 1, str(root), request.param)
    return request.param, root / "checkpoint-2", weights


Trained = tuple[int, Path, dict[str, torch.Tensor]]


@pytest.fixture
def deepspeed_only(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the checkpoint without model.safetensors, which the Trainer writes at stages 0 to 2."""
    copied = Path(shutil.copytree(trained[1], tmp_path / "copied"))
    (copied / "model.safetensors").unlink(missing_ok=True)
    return copied


def test_a_checkpoint_of_the_trainer_is_read(trained: Trained) -> None:
    _, path, weights = trained
    checkpoint = DeepSpeedCheckpoint.open(str(path))
    assert checkpoint.manifest.progress.step == 2
    assert [len(group.parameters) > 0 for group in checkpoint.manifest.groups] == [True, True]
    assert checkpoint.manifest.parameters.keys() == weights.keys()
    for name, expected in weights.items():
        read = checkpoint.read(name, "weight", 0, expected.numel())
        assert torch.equal(read.reshape(expected.shape), expected), name


def exported_weights(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("tag", ["global_step2", "pytorch_model"])
def test_its_weights_get_out_to_transformers_without_a_run_configuration(
    trained: Trained, deepspeed_only: Path, tmp_path: Path, tag: str
) -> None:
    _, _, weights = trained
    (deepspeed_only / "global_step2").rename(deepspeed_only / tag)
    (deepspeed_only / "latest").write_text(tag)
    assert cli("verify", deepspeed_only) == 0
    for source in (deepspeed_only, deepspeed_only / tag):
        out = tmp_path / f"out-{source.name}"
        assert cli("convert", source, out, "--to", "huggingface") == 0
        found = exported_weights(out)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], expected) for name, expected in weights.items())


def test_states_are_the_same_under_distfts_names(deepspeed_only: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("convert", deepspeed_only, out, "--to", "distft") == 0
    assert cli("diff", deepspeed_only, out) == 0
    source = open_source(str(deepspeed_only))
    assert isinstance(source, TransformersCheckpoint)
    groups = open_source(str(out)).manifest.groups
    trained_names = {name for group in groups for name in group.parameters}
    assert trained_names == set(source.manifest.parameters)
    query = "blocks.1.attn.q.weight"
    own = "model.layers.1.self_attn.q_proj.weight"
    for state in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(source.read(query, state, 5, 40), source.deepspeed.read(own, state, 5, 40))


def test_converted_to_deepspeed_it_keeps_the_names_of_the_script(
    trained: Trained, deepspeed_only: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("convert", deepspeed_only, out, "--to", "deepspeed", "--zero-stage", "3", "--ranks", "2") == 0
    assert DeepSpeedCheckpoint.open(str(out)).manifest.parameters.keys() == trained[2].keys()


def test_latest_does_not_hide_the_safetensors_beside_it(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, path, weights = trained
    for source, is_hidden in ((path, stage == 3), (path / "global_step2", True)):
        opened = open_source(str(source), weights_only=True)
        assert opened.format == ("deepspeed" if is_hidden else "huggingface")
        value = opened.read("norm.weight", "weight", 0, 8)
        assert torch.equal(value, weights["model.norm.weight"])
    assert cli("convert", path, tmp_path / "out", "--to", "huggingface") == 0
    assert ("The weights are those of the safetensors in" in capsys.readouterr().err) == (stage < 3)
    assert cli("verify", path) == 0
    if stage < 3:
        copied = Path(shutil.copytree(path, tmp_path / "copied"))
        save_file(
            {n: w + 1 for n, w in load_file(path / "model.safetensors").items()}, copied / "model.safetensors"
        )
        assert cli("verify", copied) == 1
        assert "are of another step than DeepSpeed's files" in capsys.readouterr().out
        assert cli("verify", copied / "global_step2") == 0


def test_a_config_of_another_model_is_not_used_and_this_is_said(deepspeed_only: Path) -> None:
    raw = json.loads((deepspeed_only / "config.json").read_text())
    for change in ({"hidden_size": 16}, {"model_type": "bert"}):
        (deepspeed_only / "config.json").write_text(json.dumps({**raw, **change}))
        source = open_source(str(deepspeed_only))
        assert "model.norm.weight" in source.manifest.parameters
        assert any("parameters keep their own names" in note for note in notes_of(source))
