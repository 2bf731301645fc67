"""An encoder with a decoder over rows of sources and targets. T5 of transformers is its oracle, elsewhere."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import build_any
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distft.config import parse
from distft.errors import ConfigError
from distft.model.config import check_pooling
from distft.model.counts import forward_flops, num_parameters, training_flops
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.generation import Decoder, generate
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, GeneratorHead, Heads
from distft.model.layout import RowLayout
from distft.model.settings import AnyModelConfig
from distft.model.source_split import SourceSplit

VOCAB_SIZE, MAX_SEQ_LEN = 31, 24
SIZES = {
    "type": "encoder_decoder",
    "vocab_size": VOCAB_SIZE,
    "max_seq_len": MAX_SEQ_LEN,
    "d_model": 12,
    "num_encoder_layers": 2,
    "num_heads": 3,
    "d_ff": 17,
    "num_buckets": 8,
    "max_distance": 10,
    "init_std": 0.3,
}
CLASSIFIER: Heads = {"classifier": ClassificationHead(num_labels=3, pooling="last")}


def config_of(**changes: Any) -> EncoderDecoderConfig:
    config = parse(AnyModelConfig, {**SIZES, **changes}, where="model")
    assert isinstance(config, EncoderDecoderConfig)
    return config


Document = tuple[list[int], list[int]]  # source and target


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[Document]], int]:
    """Rows of documents, and their common width."""
    tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5)
    document = st.tuples(tokens, st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5))
    found = draw(st.lists(st.lists(document, max_size=2), min_size=1, max_size=3))
    width = max(sum(len(source) + len(target) for source, target in row) for row in found)
    return found, draw(st.integers(max(width, 1), MAX_SEQ_LEN))


def batch_of(documents: list[list[Document]], width: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(documents), width, dtype=torch.int64)
    document_ids, is_prefix = torch.full_like(ids, 9), torch.zeros_like(ids, dtype=torch.bool)
    lengths = []
    for index, row in enumerate(documents):
        tokens = [token for source, target in row for token in (*source, *target)]
        marks = [mark for source, target in row for mark in [True] * len(source) + [False] * len(target)]
        owners = [number for number, (source, target) in enumerate(row) for _ in (*source, *target)]
        lengths.append(len(tokens))
        ids[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        is_prefix[index, : len(tokens)] = torch.tensor(marks, dtype=torch.bool)
        document_ids[index, : len(tokens)] = torch.tensor(owners, dtype=torch.int64)
    return {
        "input_ids": ids,
        "document_ids": document_ids,
        "is_prefix": is_prefix,
        "lengths": torch.tensor(lengths),
    }


def alone(source: list[int], target: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor([[*source, *target]])
    return {"input_ids": ids, "is_prefix": torch.arange(ids.shape[1])[None] < len(source)}


@settings(max_examples=25)
@given(packed=rows())
@torch.no_grad()
def test_a_document_does_not_depend_on_its_row_or_its_padding(
    packed: tuple[list[list[Document]], int],
) -> None:
    model = build_any(config_of())
    documents, width = packed
    logits = model.logits(**batch_of(documents, width))
    for row, found in zip(documents, logits, strict=True):
        ends = torch.tensor([0, *(len(source) + len(target) for source, target in row)]).cumsum(0).tolist()
        for (source, target), (start, stop) in zip(row, pairwise(ends), strict=True):
            expected = model.logits(**alone(source, target))[0]
            torch.testing.assert_close(found[start:stop], expected, rtol=0, atol=5e-6)


@given(packed=rows())
def test_each_position_is_the_encoders_or_the_decoders_and_the_last_of_a_source_is_both(
    packed: tuple[list[list[Document]], int],
) -> None:
    batch = batch_of(*packed)
    split = SourceSplit.of(
        RowLayout(
            shape=batch["input_ids"].shape,
            position_ids=torch.arange(packed[1])[None],
            document_ids=batch["document_ids"],
            lengths=batch["lengths"],
            is_prefix=batch["is_prefix"],
        )
    )
    is_real = torch.arange(packed[1]) < batch["lengths"][:, None]
    assert torch.equal(split.source.is_taken | split.target.is_taken, is_real)
    assert torch.equal(split.source.is_taken, batch["is_prefix"])
    both = split.source.is_taken & split.target.is_taken
    assert both.sum(1).tolist() == [len(row) for row in packed[0]]
    for mask in (split.source_mask(), split.target_mask(), split.cross_mask()):
        assert mask.any(-1).all()  # a softmax over no keys would be NaN


@torch.no_grad()
def test_a_target_sees_all_of_its_source_and_nothing_later() -> None:
    model = build_any(config_of())
    source, target = [3, 4, 5, 6], [7, 8, 9, 10]
    before = model.logits(**alone(source, target))[0]
    changed = model.logits(**alone([30, *source[1:]], target))[0]
    assert not torch.isclose(before, changed).all(-1).any()
    later = model.logits(**alone(source, [*target[:2], 30, target[3]]))[0]
    assert torch.equal(before[:6], later[:6])
    assert not torch.isclose(before[6:], later[6:]).all(-1).any()
    # Where the decoder begins it reads its start, and not the source's last token; that is the encoder's.
    other = build_any(config_of(start_id=1)).logits(**alone(source, target))[0]
    assert torch.equal(before[:3], other[:3])
    assert not torch.isclose(before[3:], other[3:]).all(-1).any()


@torch.no_grad()
def test_without_marks_the_row_is_the_source_and_a_document_without_any_has_one_token_of_it() -> None:
    model = build_any(config_of())
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(model.logits(ids), model.logits(**alone([3, 4, 5, 6], [])))
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert torch.equal(model.logits(ids, is_prefix=nothing), model.logits(**alone([3], [4, 5, 6])))


@torch.no_grad()
def test_cached_logits_equal_uncached_ones() -> None:
    model = build_any(config_of(num_decoder_layers=3))
    for sources in ([[3], [1, 2, 3, 4, 5, 6], [7, 8]], [[4, 5], [6, 7]]):
        decoder, targets = Decoder(model, sources, 12), [[] for _ in sources]  # type: ignore[var-annotated]
        logits = decoder.prefill()
        for token in (5, 0, 7, 7, 1, 2, 9, 9, 9, 12, 4, 3):
            for found, source, target in zip(logits, sources, targets, strict=True):
                expected = model.logits(**alone(source, target))[0, -1]
                torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
                target.append(token)
            logits = decoder.decode(torch.full((len(sources),), token))


def test_generation_ends_where_the_row_is_full_and_refuses_a_longer_source() -> None:
    model = build_any(config_of())
    sources = [[3] * 20, [4] * MAX_SEQ_LEN, [5]]
    new = generate(model, sources, max_new_tokens=9, temperature=0)
    assert [len(tokens) for tokens in new] == [5, 1, 9]
    assert new[0] == generate(model, sources[:1], max_new_tokens=9, temperature=0)[0]
    with pytest.raises(ConfigError, match="Prompt 0 has 25 tokens, and an encoder reads a source whole"):
        generate(model, [[3] * 25], max_new_tokens=1)


def test_dropout_does_not_depend_on_the_batch() -> None:
    model = build_any(config_of(dropout=0.4)).train()
    documents: list[list[Document]] = [
        [([1, 2, 3], [4, 5])],
        [([6], [7, 8, 9, 1]), ([2], [3])],
        [([4] * 6, [])],
    ]
    keys = torch.arange(3) * 7919
    whole = model.logits(**batch_of(documents, 11), dropout_keys=keys)
    evaluated = model.eval().logits(**batch_of(documents, 11))
    assert not torch.allclose(whole, evaluated)
    model.train()
    for row, length in enumerate((5, 7, 6)):
        one = model.logits(**batch_of(documents[row : row + 1], length), dropout_keys=keys[row : row + 1])
        torch.testing.assert_close(whole[row, :length], one[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("heads", [LANGUAGE_MODEL, CLASSIFIER], ids=["language-model", "classifier"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp": "geglu_tanh", "tie_embeddings": False, "num_decoder_layers": 3, "head_dim": 5}],
    ids=["1.0", "1.1"],
)
def test_parameters_and_flops_are_counted_exactly(changes: dict[str, Any], heads: Heads) -> None:
    config = config_of(**changes)
    model = build_any(config, heads)
    assert num_parameters(config, heads) == sum(parameter.numel() for parameter in model.parameters())
    num_source, num_target = (6, 3) if heads is LANGUAGE_MODEL else (8, 1)
    seq_len = num_source + num_target - 1
    batch = batch_of([[([1] * num_source, [2] * (num_target - 1))]] * 2, seq_len)
    counted = config.with_target_share(num_target / seq_len)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch)
    expected = forward_flops(counted, seq_len, heads).of(2 * seq_len, 2 * seq_len**2)
    assert counter.get_total_flops() == pytest.approx(expected)


@pytest.mark.parametrize(
    "patterns",
    [("",), ("decoder.",), ("decoder.blocks.1.", "lm_head"), ("encoder.blocks.1.",), ("lm_head",)],
    ids=str,
)
def test_the_flops_of_a_partial_fine_tune_are_those_that_torch_counts(patterns: tuple[str, ...]) -> None:
    config = config_of(tie_embeddings=False)
    model = build_any(config).train()
    trainable = {name for name, _ in model.named_parameters() if name.startswith(patterns)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    batch = batch_of([[([1] * 6, [2] * 2)]] * 2, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(**batch).sum().backward()  # type: ignore[no-untyped-call]
    expected = training_flops(config.with_target_share(3 / 8), 8, LANGUAGE_MODEL, trainable).of(16, 128)
    # The decoder's first attention does not depend on the encoder, which the count overlooks.
    assert counter.get_total_flops() <= expected * (1 + 1e-9)
    assert expected <= counter.get_total_flops() * (1.06 if patterns == ("encoder.blocks.1.",) else 1 + 1e-9)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_heads": 5}, "d_model=12 is not a multiple of num_heads=5"),
        ({"num_buckets": 10}, "num_buckets=10 must be a multiple of 4.* Set 12"),
        ({"max_distance": 4}, "max_distance=4 must be more than half of num_buckets=8"),
        ({"start_id": 31}, "start_id=31 is not an id of vocab_size=31"),
        ({"num_layers": 2}, "num_layers=2 is a setting of type"),
        ({"mlp": "tanh"}, "model.mlp"),
    ],
)
def test_wrong_sizes_are_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of(**changes)


def test_what_the_model_cannot_do_is_refused() -> None:
    model = build_any(config_of())
    with pytest.raises(ConfigError, match=r"only the blocks of model.type=transformer"):
        model.set_activation_checkpointing("full")
    with pytest.raises(ConfigError, match=r"needs model.type=transformer"):
        build_any(config_of(), {"generator": GeneratorHead(num_layers=1, size=0.5)})
    for pooling in ("first", "mean", "max"):
        with pytest.raises(ConfigError, match="the decoder's first hidden state"):
            check_pooling(pooling, config_of())  # type: ignore[arg-type]
    check_pooling("last", config_of())
