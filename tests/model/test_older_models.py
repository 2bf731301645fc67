"""Averaged embeddings, convolutions and recurrent networks against torch's own layers."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import build_any
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from distft.config import parse
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.counts import forward_flops, num_parameters, training_flops
from distft.model.generation import Decoder, generate
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, GeneratorHead, Heads
from distft.model.settings import AnyModelConfig
from distft.model.with_heads import ModelWithHeads

VOCAB_SIZE, MAX_SEQ_LEN, WIDTH = 31, 16, 12
SIZES = {"vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN, "d_model": WIDTH}
TYPES: dict[str, dict[str, Any]] = {
    "deep_averaging": {"type": "deep_averaging", "num_layers": 2},
    "cnn": {"type": "cnn", "kernel_sizes": [2, 3, 5], "num_layers": 2},
    "rnn": {"type": "rnn", "num_layers": 2},
    "lstm": {"type": "lstm", "num_layers": 2},
    "gru": {"type": "gru", "num_layers": 2},
}
DIRECTIONS = ["causal", "bidirectional"]
CLASSIFIER: Heads = {"classifier": ClassificationHead(num_labels=3, pooling="max")}
each_model = pytest.mark.parametrize("direction", DIRECTIONS)
each_type = pytest.mark.parametrize("name", TYPES)


def config_of(name: str, direction: str = "causal", **changes: Any) -> ModelConfig:
    raw = {**SIZES, **TYPES[name], "direction": direction, "init_std": 0.3, **changes}
    config: ModelConfig = parse(AnyModelConfig, raw)
    return config


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[list[int]]], int]:
    """Rows of documents of tokens, and their common width."""
    token = st.integers(0, VOCAB_SIZE - 1)
    document = st.lists(token, min_size=1, max_size=6)
    found = draw(st.lists(st.lists(document, min_size=1, max_size=2), min_size=1, max_size=3))
    width = max(sum(map(len, row)) for row in found)
    return found, draw(st.integers(width, MAX_SEQ_LEN))


def batch_of(documents: list[list[list[int]]], width: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(documents), width, dtype=torch.int64)
    document_ids = torch.full((len(documents), width), 9)
    lengths = [sum(map(len, row)) for row in documents]
    for index, row in enumerate(documents):
        ids[index, : lengths[index]] = torch.tensor([token for document in row for token in document])
        owners = [number for number, document in enumerate(row) for _ in document]
        document_ids[index, : lengths[index]] = torch.tensor(owners)
    return {"input_ids": ids, "document_ids": document_ids, "lengths": torch.tensor(lengths)}


def hidden_states(model: ModelWithHeads, ids: Tensor) -> Tensor:
    """Logits of an untied identity would be the hidden states; these are the encoded embeddings [1, T, H]."""
    found = []
    handle = model.get_submodule("lm_head").register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(ids)
    handle.remove()
    (states,) = found
    return states  # type: ignore[no-any-return]


@each_model
@each_type
@settings(max_examples=12)
@given(packed=rows())
@torch.no_grad()
def test_a_document_does_not_depend_on_its_row_or_its_padding(
    name: str, direction: str, packed: tuple[list[list[list[int]]], int]
) -> None:
    model = build_any(config_of(name, direction))
    documents, width = packed
    logits = model.logits(**batch_of(documents, width))
    for row, found in zip(documents, logits, strict=True):
        bounds = [0, *torch.tensor([len(document) for document in row]).cumsum(0).tolist()]
        for document, (start, stop) in zip(row, pairwise(bounds), strict=True):
            alone = model.logits(torch.tensor([document]))[0]
            torch.testing.assert_close(found[start:stop], alone, rtol=0, atol=2e-6)


@each_type
@torch.no_grad()
def test_a_causal_model_sees_no_later_token_and_a_bidirectional_one_sees_all(name: str) -> None:
    ids = torch.randint(0, VOCAB_SIZE - 1, (2, 9), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 6] = VOCAB_SIZE - 1
    causal, both = (build_any(config_of(name, direction)) for direction in DIRECTIONS)
    before, after = causal.logits(ids), causal.logits(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(dim=-1).any(dim=0)[0]
    assert not torch.allclose(both.logits(ids)[:, 5], both.logits(changed)[:, 5])


@each_model
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
@torch.no_grad()
def test_recurrent_models_equal_torchs_modules(name: str, direction: str) -> None:
    model = build_any(config_of(name, direction))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.add_(noise / 9)  # biases are 0 at first
    kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[name]
    hidden = WIDTH if direction == "causal" else WIDTH // 2
    oracle = kind(WIDTH, hidden, num_layers=2, batch_first=True, bidirectional=direction != "causal")
    weights = {}
    for key, value in model.get_submodule("blocks").state_dict().items():
        index, _, own = key.partition(".")
        base, reverse = own.removesuffix("_reverse"), "_reverse" * own.endswith("_reverse")
        weights[f"{base}_l{index}{reverse}"] = value
    oracle.load_state_dict(weights)
    ids = torch.randint(0, VOCAB_SIZE, (3, 10), generator=torch.Generator().manual_seed(2))
    expected, _ = oracle(model.embed(ids))
    torch.testing.assert_close(hidden_states(model, ids), expected, rtol=0, atol=1e-6)
    lengths = torch.tensor([10, 4, 7])
    packed = nn.utils.rnn.pack_padded_sequence(
        model.embed(ids), lengths, batch_first=True, enforce_sorted=False
    )
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(oracle(packed)[0], batch_first=True)
    expected = functional.linear(unpacked, model.embed.weight)
    found = model.logits(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=5e-6)


@each_model
@torch.no_grad()
def test_a_convolutional_model_equals_torchs_convolutions(direction: str) -> None:
    model = build_any(config_of("cnn", direction))
    ids = torch.randint(0, VOCAB_SIZE, (3, 10), generator=torch.Generator().manual_seed(2))
    x_BCT = model.embed(ids).transpose(1, 2)
    for index in range(2):
        outputs = []
        for number, size in enumerate((2, 3, 5)):
            kernel = model.get_submodule(f"blocks.{index}.kernels.{number}")
            left = size - 1 if direction == "causal" else (size - 1) // 2
            convolution = nn.Conv1d(x_BCT.shape[1], 4, size)
            convolution.load_state_dict(kernel.state_dict())
            outputs.append(convolution(functional.pad(x_BCT, (left, size - 1 - left))))
        x_BCT = torch.cat(outputs, dim=1).relu()
    torch.testing.assert_close(hidden_states(model, ids), x_BCT.transpose(1, 2), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_classifier_of_convolutions_pools_each_filters_largest_value() -> None:
    model = build_any(config_of("cnn", "bidirectional", num_layers=1), CLASSIFIER)
    ids = torch.randint(0, VOCAB_SIZE, (2, 10), generator=torch.Generator().manual_seed(2))
    found = model.logits(ids, lengths=torch.tensor([10, 6]))
    for row, length in enumerate((10, 6)):
        x_1CT = model.embed(ids[row : row + 1, :length]).transpose(1, 2)
        features = []
        for number in range(3):
            kernel = model.get_submodule(f"blocks.0.kernels.{number}")
            size = kernel.weight.shape[-1]  # type: ignore[union-attr]
            padded = functional.pad(x_1CT, ((size - 1) // 2, size - 1 - (size - 1) // 2))  # type: ignore[operator,list-item]
            y = functional.conv1d(padded, kernel.weight, kernel.bias)  # type: ignore[arg-type]
            features.append(y.relu().amax(dim=-1))
        expected = torch.cat(features, dim=1) @ model.get_submodule("classifier").weight.T  # type: ignore[operator,union-attr]
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_deep_averaging_network_transforms_means_of_embeddings() -> None:
    ids = torch.randint(0, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(2))
    for direction in DIRECTIONS:
        model = build_any(config_of("deep_averaging", direction))
        x_BTC = model.embed(ids)
        counts_T1 = torch.arange(1, 8)[:, None]
        mean_BTC = x_BTC.mean(1, keepdim=True).expand_as(x_BTC) if direction != "causal" else None
        mean_BTC = x_BTC.cumsum(1) / counts_T1 if mean_BTC is None else mean_BTC
        for index in range(2):
            layer = model.get_submodule(f"blocks.{index}")
            mean_BTC = functional.linear(mean_BTC, layer.weight, layer.bias).relu()  # type: ignore[arg-type]
        torch.testing.assert_close(hidden_states(model, ids), mean_BTC, rtol=0, atol=1e-6)


@each_type
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(name: str) -> None:
    model = build_any(config_of(name))
    for prompts in ([[3], [1, 2, 3, 4, 5, 6], [7, 8]], [[4, 5], [6, 7]]):
        decoder, texts = Decoder(model, prompts, 3), [list(prompt) for prompt in prompts]
        logits = decoder.prefill()
        for token in (5, 0, 7):
            alone = torch.cat([model.logits(torch.tensor([text]))[:, -1] for text in texts])
            torch.testing.assert_close(logits, alone, rtol=0, atol=5e-6)
            texts = [[*text, token] for text in texts]
            logits = decoder.decode(torch.full((len(texts),), token))


@each_type
def test_dropout_does_not_depend_on_the_batch(name: str) -> None:
    for direction in DIRECTIONS:
        model = build_any(config_of(name, direction, dropout=0.4)).train()
        ids = torch.randint(0, VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(2))
        lengths, keys = torch.tensor([9, 3, 5, 8]), torch.arange(4) * 7919
        whole = model.logits(ids, lengths=lengths, dropout_keys=keys)
        assert not torch.allclose(whole, model.eval().logits(ids, lengths=lengths))
        model.train()
        for row in range(4):
            length = int(lengths[row])
            one = model.logits(
                ids[row : row + 1, :length], lengths=lengths[row : row + 1], dropout_keys=keys[row : row + 1]
            )
            torch.testing.assert_close(whole[row, :length], one[0], rtol=0, atol=5e-6)


@each_model
@each_type
@pytest.mark.parametrize("heads", [LANGUAGE_MODEL, CLASSIFIER], ids=["language-model", "classifier"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameters_and_flops_are_counted_exactly(
    name: str, direction: str, heads: Heads, tie_embeddings: bool
) -> None:
    config = config_of(name, direction, tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = config.build(heads)
    assert num_parameters(config, heads) == sum(parameter.numel() for parameter in model.parameters())
    if name in ("rnn", "lstm", "gru"):
        return  # torch counts no FLOPs of its recurrent kernels
    model = build_any(config, heads)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    expected = forward_flops(config, 8, heads).of(16, 0)
    # Between two rows there are zeros, of which a convolution computes outputs that nobody reads.
    slack = {"cnn": 1.6}.get(name, 1.0)
    assert expected <= counter.get_total_flops() <= expected * slack
    assert training_flops(config, 8, heads).per_token == 3 * forward_flops(config, 8, heads).per_token


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_the_flops_of_a_recurrent_layer_are_those_of_its_matrices(name: str) -> None:
    config = config_of(name, "bidirectional")
    with torch.device("meta"):
        model = config.build(CLASSIFIER)
    matrices = [p for key, p in model.named_parameters() if "weight_" in key]
    head = 3 * WIDTH / 8
    assert forward_flops(config, 8, CLASSIFIER).per_token == 2 * (sum(p.numel() for p in matrices) + head)


@each_type
def test_what_only_a_transformer_has_is_refused(name: str) -> None:
    model = build_any(config_of(name))
    with pytest.raises(ConfigError, match=r"only the blocks of model.type=transformer"):
        model.set_activation_checkpointing("full")
    assert model.fp8_layers is None
    with pytest.raises(ConfigError, match=r"needs model.type=transformer"):
        build_any(config_of(name), {"generator": GeneratorHead(num_layers=1, size=0.5)})
    with pytest.raises(ConfigError, match="direction=bidirectional cannot generate"):
        generate(build_any(config_of(name, "bidirectional")), [[1]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("lstm", {"d_hidden": 5}, "tie_embeddings needs hidden states as wide as the embedding, d_model=12"),
        ("cnn", {"kernel_sizes": [0]}, "each must be 1 to 4096 tokens"),
        ("cnn", {"kernel_sizes": []}, "model.kernel_sizes"),
        ("cnn", {"kernel_sizes": [1, 2, 3, 4, 5]}, "make d_model a multiple of the 5 kernel_sizes"),
        ("gru", {"num_heads": 2}, "a setting of type transformer or encoder_decoder or vit, and"),
        ("deep_averaging", {"direction": "both"}, "direction"),
        ("deep_averaging", {"type": "lstn"}, "Did you mean 'lstm'?"),
    ],
)
def test_wrong_sizes_are_named(name: str, changes: dict[str, Any], problem: str) -> None:
    raw = {**SIZES, **TYPES[name], **changes}
    with pytest.raises(ConfigError, match=problem.replace("?", r"\?")):
        parse(AnyModelConfig, raw, where="model")
