"""Adapters of PEFT in and out: PEFT itself computes what distft computes."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support.huggingface_models import (
    DISTFT_GPT2,
    build_model,
    loaded,
    make_distft_model,
    make_hf_model,
    model_config,
    random_ids,
    randomize,
    save_model,
)
from torch import Tensor

from distft.checkpoint.adapters import merged
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.formats.peft_source import PeftCheckpoint
from distft.checkpoint.formats.peft_target import write_peft
from distft.config import parse
from distft.engine.memory import allocate
from distft.errors import CheckpointError, ConfigError
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, Heads
from distft.model.lora import add_adapters
from distft.model.lora_config import LoraConfig, is_adapter
from distft.model.settings import AnyModelConfig
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 5},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True, "use_rslora": True},
    "patterns": {"r": 3, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}},
}
BERT: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
# PEFT uses what the installed transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _peft_adapter(base: Any, folder: Path, base_folder: Path, **settings: Any) -> Any:
    """An adapter of PEFT with random weights, saved."""
    is_gpt2 = base.config.model_type == "gpt2"
    config = peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=is_gpt2, **settings)
    model = peft.get_peft_model(base, config)
    _randomize_trainable(model)
    model.peft_config["default"].base_model_name_or_path = str(base_folder)
    model.save_pretrained(folder)
    return model.eval()


def _randomize_trainable(model: torch.nn.Module) -> None:
    """Adapters that change the logits by some hundredths: large ones amplify rounding to 1e-5."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator) * 0.1)


def _logits(source: Any, heads: Heads = LANGUAGE_MODEL) -> Tensor:
    """Of the model with its adapters merged in."""
    plain = merged(source)
    config = parse(AnyModelConfig, plain.manifest.config["model"])
    assert isinstance(config, TransformerConfig)
    with torch.no_grad():
        return build_model(config, plain, heads).logits(random_ids())


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("llama", "lora"), ("llama", "patterns"), ("qwen2_tied", "dora"), ("gpt2", "lora"), ("gpt2", "dora")],
)
def test_an_adapter_of_peft_comes_in_and_goes_out(tmp_path: Path, kind: str, variant: str) -> None:
    base = make_hf_model(kind)
    base.save_pretrained(tmp_path / "base")
    model = _peft_adapter(base, tmp_path / "adapter", tmp_path / "base", **VARIANTS[variant])
    with torch.no_grad():
        expected = model(random_ids()).logits
    source = open_source(str(tmp_path / "adapter"))
    assert source.format == "peft"
    assert not source.find_damage()
    torch.testing.assert_close(_logits(source), expected, atol=1e-5, rtol=1e-5)
    write_peft(source, str(tmp_path / "out"), on_progress=lambda _: None)
    again = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(random_ids()).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_classifier_that_the_adapter_has_whole_comes_in_and_goes_out(tmp_path: Path) -> None:
    """The base is a plain encoder, as in most fine-tunes; PEFT's `modules_to_save` is the head."""
    config = transformers.BertConfig(**BERT)
    base = transformers.BertModel(config, add_pooling_layer=True)
    randomize(base)
    base.save_pretrained(tmp_path / "base")
    with_head = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = _peft_adapter(
        with_head,
        tmp_path / "adapter",
        tmp_path / "base",
        task_type="SEQ_CLS",
        modules_to_save=["classifier", "pooler.dense"],
        exclude_modules=".*pooler.*",
        r=2,
    )
    with torch.no_grad():
        expected = model(random_ids()).logits
    source = open_source(str(tmp_path / "adapter"))
    heads = {"classifier": ClassificationHead(num_labels=3, pooling="first", hidden="tanh")}
    torch.testing.assert_close(_logits(source, heads), expected, atol=1e-5, rtol=1e-5)
    write_peft(source, str(tmp_path / "out"), on_progress=lambda _: None)
    assert "classifier" in json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"]
    fresh = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(random_ids()).logits, expected, atol=1e-5, rtol=1e-5)


def _adapted(root: Path, lora: LoraConfig, **options: Any) -> tuple[Checkpoint, Checkpoint, Tensor]:
    """A model, the same with random adapters as a run saves it, and the logits of that."""
    base = make_distft_model(model_config(**options))
    base_source = save_model(base, root / "base")
    with torch.device("meta"):
        module = Transformer(base.config)
        add_adapters(module, lora)
    allocate(module, torch.device("cpu"), torch.float32)
    randomize(module)
    module.load_state_dict(base.state_dict(), strict=False)
    source = save_model(module, root / "adapted")
    records = {
        name: record.model_copy(update={"trainable": is_adapter(name)})
        for name, record in source.manifest.parameters.items()
    }
    config = {**source.manifest.config, "lora": lora.model_dump(mode="json")}
    source.manifest = source.manifest.model_copy(update={"config": config, "parameters": records})
    with torch.no_grad():
        return base_source, source, module.eval().logits(random_ids())


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({"num_kv_heads": 2}, {"targets": ["q", "v", "down"]}),
        ({"qk_norm": True}, {"dora": True}),
        (DISTFT_GPT2, {"rslora": True, "targets": ["q", "v", "mlp.*"]}),
    ],
    ids=["llama", "qwen3", "gpt2"],
)
def test_adapters_of_a_run_merged_and_apart(
    tmp_path: Path, options: dict[str, Any], lora: dict[str, Any]
) -> None:
    base, source, expected = _adapted(tmp_path, LoraConfig(rank=3, **lora), **options)
    torch.testing.assert_close(_logits(source), expected, atol=1e-5, rtol=1e-5)
    write_huggingface(merged(source), str(tmp_path / "merged"))
    write_huggingface(base, str(tmp_path / "hf_base"))
    write_peft(source, str(tmp_path / "adapter"), on_progress=lambda _: None)
    model = peft.PeftModel.from_pretrained(loaded(tmp_path / "hf_base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        for found in (loaded(tmp_path / "merged"), model):
            torch.testing.assert_close(found(random_ids()).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = make_hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    _peft_adapter(base, tmp_path / "adapter", tmp_path / "base", r=2)
    make_hf_model("llama", hidden_size=32).save_pretrained(tmp_path / "wider")
    make_hf_model("gpt2").save_pretrained(tmp_path / "gpt2")
    for other in ("wider", "gpt2"):
        _change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / other))
        with pytest.raises(CheckpointError, match=rf"the base .*{other}:\n.*fits no linear layer"):
            open_source(str(tmp_path / "adapter"))
    _change(tmp_path / "adapter", base_model_name_or_path="org/model")
    with pytest.raises(CheckpointError, match="'org/model' is no directory here: set it to that of the"):
        open_source(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported: only LORA is"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"alpha_pattern": {"layers.[01].q": 2}}, r"alpha_pattern has the regular expression 'layers"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    _change(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=problem):
        PeftCheckpoint.open(str(tmp_path))


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    _, source, _ = _adapted(tmp_path, LoraConfig(rank=2, dora=True, targets=("q",)), **DISTFT_GPT2)
    with pytest.raises(ConfigError, match=r"attn\.c_attn has adapters for .*attn\.q.* alone, and DoRA"):
        write_peft(source, str(tmp_path / "out"), on_progress=lambda _: None)
    records = dict(source.manifest.parameters)
    records["blocks.0.attn.q.bias"] = records["blocks.0.attn.q.bias"].model_copy(update={"trainable": True})
    source.manifest = source.manifest.model_copy(update={"parameters": records})
    with pytest.raises(ConfigError, match=r"h\.0\.attn\.c_attn trains beside its adapter"):
        write_peft(source, str(tmp_path / "out"), on_progress=lambda _: None)


def _change(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
