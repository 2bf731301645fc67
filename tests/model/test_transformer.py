"""The model against the same architectures in transformers, and packing and padding against plain rows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from torch import Tensor, nn

from distft.errors import ConfigError
from distft.model.attention_kernels import make_attention_mask
from distft.model.heads import ClassificationHead
from distft.model.layers import Linear
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(5))


def translated(name: str, names: dict[str, str]) -> str:
    """The parameter's name in transformers."""
    for distft_name, transformers_name in names.items():
        name = name.replace(distft_name, transformers_name)
    return name


LLAMA_NAMES = {
    "embed.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.q.": "self_attn.q_proj.",
    "attn.k.": "self_attn.k_proj.",
    "attn.v.": "self_attn.v_proj.",
    "attn.o.": "self_attn.o_proj.",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def copy_llama_weights(reference: nn.Module, model: Transformer) -> None:
    values = dict(reference.named_parameters())
    for name, param in model.named_parameters():
        other = "model.norm.weight" if name == "norm.weight" else translated(name, LLAMA_NAMES)
        param.data.copy_(values.pop(other))
    assert not values


def perturb(model: nn.Module) -> None:
    """Move all weights away from their initial values, biases and norms too."""
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.data.add_(torch.randn(param.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_logits_equal_those_of_transformers(family: str, tied: bool, num_kv_heads: int) -> None:
    import transformers

    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    head_dim = 10 if family in ("mistral", "qwen3") else 8
    reference_config = getattr(transformers, f"{kind}Config")(
        vocab_size=SIZES["vocab_size"],
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=24,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    reference = getattr(transformers, f"{kind}ForCausalLM")(reference_config).eval()
    perturb(reference)
    config = TransformerConfig(
        **SIZES,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=1e-6,
        rope_theta=500.0,
        tie_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    model = build(config)
    copy_llama_weights(reference, model)
    ids = random_ids(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), reference(ids).logits, rtol=0, atol=1e-5)


def test_logits_equal_those_of_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    reference_config = GPT2Config(
        vocab_size=61,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=44,
        bos_token_id=0,
        eos_token_id=0,
    )
    reference = GPT2LMHeadModel(reference_config).eval()
    perturb(reference)
    model = build(
        TransformerConfig(
            **SIZES,
            norm="layernorm",
            positions="learned",
            mlp="gelu",
            attention_bias=True,
            mlp_bias=True,
        )
    )
    values = {name.removeprefix("transformer."): p for name, p in reference.named_parameters()}
    names = {
        "position_embed": "wpe",
        "embed": "wte",
        "blocks": "h",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn.o": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for name, param in model.named_parameters():
        other = name.replace("norm.", "ln_f.") if name.startswith("norm.") else translated(name, names)
        qkv_index = next((i for i, letter in enumerate("qkv") if f"attn.{letter}." in name), None)
        if qkv_index is not None:  # GPT-2 stores q, k and v as one matrix
            *_, layer, _, _, kind = ["", *name.split(".")]
            value = values[f"h.{layer}.attn.c_attn.{kind}"].chunk(3, dim=-1)[qkv_index]
        else:
            value = values[other]
        transposed = "attn" in name or "mlp" in name  # GPT-2's Conv1D stores [in, out]
        param.data.copy_(value.T if transposed and value.ndim == 2 else value)
    ids = random_ids(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), reference(ids).logits, rtol=0, atol=1e-5)


def packed_row(cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Document ids and restarting positions of one row with documents of these lengths."""
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(cuts)])
    return documents[None], torch.cat([torch.arange(n) for n in cuts])[None]


@given(
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    attention=st.sampled_from(["causal", "bidirectional"]),
    positions=st.sampled_from(["rotary", "learned"]),
)
def test_a_packed_document_is_computed_as_if_it_were_alone(
    cuts: list[int], attention: Any, positions: Any
) -> None:
    model = build(TransformerConfig(**SIZES, attention=attention, positions=positions, num_kv_heads=2))
    ids = random_ids(1, sum(cuts))
    documents, restarting = packed_row(cuts)
    with torch.no_grad():
        packed_logits = model.logits(ids, restarting, documents)
        alone = torch.cat([model.logits(document) for document in ids.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(packed_logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_flex_attention_equals_the_masked_kernel(attention: Any) -> None:
    cuts = [90, 3, 50]
    sizes = SIZES | {"max_seq_len": 150, "d_model": 64, "num_kv_heads": 2, "init_std": 0.1}
    ids = random_ids(1, sum(cuts)).expand(2, -1)
    documents, restarting = packed_row(cuts)
    documents = torch.cat([documents, documents // 2])
    with torch.no_grad():
        logits = [
            build(TransformerConfig(**sizes, attention=attention, attention_kernel=kernel))(
                ids, restarting, documents
            )
            for kernel in ("sdpa", "flex")
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    attention=st.sampled_from(["causal", "bidirectional"]),
    pooling=st.sampled_from(["last", "mean", "first"]),
)
def test_right_padding_does_not_change_a_row(lengths: list[int], attention: Any, pooling: Any) -> None:
    model = build(
        TransformerConfig(**SIZES, attention=attention),
        {"classifier": ClassificationHead(num_labels=5, pooling=pooling)},
    )
    ids = random_ids(len(lengths), 9)
    with torch.no_grad():
        padded = model.logits(ids, lengths=torch.tensor(lengths))
        alone = torch.cat([model.logits(row[None, :n]) for row, n in zip(ids, lengths, strict=True)])
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.booleans(), st.booleans(), st.sampled_from(["causal", "bidirectional"]))
def test_every_position_attends_to_itself_so_that_no_softmax_is_over_no_keys(
    num_positions: int, has_documents: bool, has_lengths: bool, attention: Any
) -> None:
    ids = torch.arange(num_positions).expand(3, -1) // 2 if has_documents else None
    lengths = torch.arange(3) if has_lengths else None
    mask = make_attention_mask(
        TransformerConfig(**SIZES, attention=attention), torch.Size((3, num_positions)), ids, lengths
    )
    assert mask is None or (isinstance(mask, Tensor) and mask.diagonal(dim1=-2, dim2=-1).all())


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_a_row_of_padding_alone_gives_finite_logits(attention: Any, pooling: Any) -> None:
    model = build(
        TransformerConfig(**SIZES, attention=attention),
        {"classifier": ClassificationHead(num_labels=3, pooling=pooling)},
    )
    assert model.logits(random_ids(2, 4), lengths=torch.tensor([0, 4])).isfinite().all()


@pytest.mark.parametrize("lengths", [None, torch.empty(0, dtype=torch.int64)])
def test_no_rows_give_no_logits_and_zero_gradients(lengths: Tensor | None) -> None:
    model = build(TransformerConfig(**SIZES, attention="bidirectional"))
    logits = model.logits(torch.empty(0, 6, dtype=torch.int64), lengths=lengths)
    logits.sum().backward()
    assert logits.shape == (0, 6, 61)
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())


def test_dropout_acts_only_in_training_mode() -> None:
    model = build(TransformerConfig(**SIZES, dropout=0.5))
    ids = random_ids(2, 8)
    assert torch.equal(model.logits(ids), model.logits(ids))
    model.train()
    assert not torch.equal(model.logits(ids), model.logits(ids))


def test_parameters_have_the_documented_names_and_there_are_no_buffers() -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**SIZES | {"num_layers": 1}, qk_norm=True, positions="learned"))
    assert not list(model.buffers())
    assert model.lm_head.weight is model.embed.weight
    assert [name for name, _ in model.named_parameters()] == [
        "embed.weight",
        "position_embed.weight",
        "blocks.0.attn_norm.weight",
        *(f"blocks.0.attn.{name}.weight" for name in ("q", "k", "v", "o", "q_norm", "k_norm")),
        "blocks.0.mlp_norm.weight",
        *(f"blocks.0.mlp.{name}.weight" for name in ("gate", "up", "down")),
        "norm.weight",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_widened_half_precision_product_is_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    layer = Linear(64, 48, bias=bias).to(dtype)
    layer.matmul_dtype._emulated = (dtype,)  # as on a CPU without such instructions
    x = torch.randn(16, 64, dtype=dtype, generator=None).requires_grad_()
    y = layer(x)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype  # type: ignore[union-attr]
    torch.testing.assert_close(y.double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_close_to_fp32_logits(dtype: torch.dtype) -> None:
    model = build(TransformerConfig(**SIZES, num_kv_heads=2, qk_norm=True))
    documents, restarting = packed_row([5, 9])
    full = model.logits(random_ids(1, 14), restarting, documents)
    half = model.to(dtype).logits(random_ids(1, 14), restarting, documents)
    assert half.dtype == dtype
    assert (half - full).norm() < 0.03 * full.norm()


def test_a_row_longer_than_max_seq_len_is_refused() -> None:
    model = build(TransformerConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"25 tokens is longer than model\.max_seq_len=24"):
        model.logits(random_ids(1, 25))
