"""Checkpoints that transformers' Trainer writes under DeepSpeed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.rank_pool import run_ranks

from distft.checkpoint.formats.deepspeed_source import DeepSpeedCheckpoint

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
        name: safe_get_full_fp32_param(param).clone()
        for name, param in trainer.model_wrapped.module.named_parameters()
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_the_trainer_is_read(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("accelerate", reason="the Trainer uses DeepSpeed through accelerate")
    [weights] = run_ranks(train_with_trainer, 1, str(tmp_path), stage)
    checkpoint = DeepSpeedCheckpoint.open(str(tmp_path / "checkpoint-2"))
    assert checkpoint.manifest.progress.step == 2
    assert [len(group.parameters) > 0 for group in checkpoint.manifest.groups] == [True, True]
    assert checkpoint.manifest.parameters.keys() == weights.keys()
    for name, expected in weights.items():
        read = checkpoint.read(name, "weight", 0, expected.numel())
        assert torch.equal(read.reshape(expected.shape), expected), name
