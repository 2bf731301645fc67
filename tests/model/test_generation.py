"""Generation with a key-value cache against the same model without one, and sampling."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import build

from distft.errors import ConfigError
from distft.model.generation import Decoder, generate, sample
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, Heads
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

VOCAB_SIZE, MAX_SEQ_LEN = 23, 16


def model_with(heads: Heads = LANGUAGE_MODEL, **changes: Any) -> Transformer:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "pad_vocab_to": 8,
        "max_seq_len": MAX_SEQ_LEN,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "init_std": 0.5,
    }
    return build(TransformerConfig(**sizes | changes), heads)


def uncached_greedy(
    model: Transformer, prompt: list[int], max_new_tokens: int, eos_id: int, num_kept: int = 0
) -> list[int]:
    window = prompt[:num_kept] + prompt[num_kept:][num_kept - MAX_SEQ_LEN :]
    new: list[int] = []
    while len(new) < max_new_tokens and eos_id not in new:
        new.append(int(model.logits(torch.tensor([window]))[0, -1, :VOCAB_SIZE].float().argmax()))
        window.append(new[-1])
        if len(window) > MAX_SEQ_LEN:
            window = window[:num_kept] + window[num_kept - MAX_SEQ_LEN // 2 :]
    return new


PROMPTS = st.lists(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_SEQ_LEN), min_size=1, max_size=4
)
LONG_PROMPTS = st.lists(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_SEQ_LEN + 4), min_size=1, max_size=4
)


@settings(max_examples=15)
@given(prompts=PROMPTS, positions=st.sampled_from(["rotary", "learned"]), max_new_tokens=st.integers(0, 6))
@torch.no_grad()
def test_greedy_decoding_of_a_padded_batch_equals_each_row_alone_without_a_cache(
    prompts: list[list[int]], positions: str, max_new_tokens: int
) -> None:
    model = model_with(positions=positions).double()  # so that rounding decides no near ties
    generated = generate(model, prompts, max_new_tokens=max_new_tokens, temperature=0, eos_id=2)
    assert generated == [uncached_greedy(model, prompt, max_new_tokens, 2) for prompt in prompts]


@settings(max_examples=20)
@given(
    prompts=LONG_PROMPTS,
    positions=st.sampled_from(["rotary", "learned"]),
    num_kept=st.integers(0, 2),
    max_new_tokens=st.integers(0, 3 * MAX_SEQ_LEN),
)
@torch.no_grad()
def test_beyond_max_seq_len_a_row_goes_on_with_its_start_and_the_last_half_of_the_window(
    prompts: list[list[int]], positions: str, num_kept: int, max_new_tokens: int
) -> None:
    model = model_with(positions=positions).double()
    generated = generate(
        model, prompts, max_new_tokens=max_new_tokens, temperature=0, eos_id=2, num_kept=num_kept
    )
    assert generated == [uncached_greedy(model, p, max_new_tokens, 2, num_kept) for p in prompts]


def test_a_row_ends_when_it_is_said_to_be_finished_and_the_others_go_on() -> None:
    whole = generate(model_with(), [[1], [2, 3]], max_new_tokens=30, temperature=0)
    found = generate(
        model_with(),
        [[1], [2, 3]],
        max_new_tokens=30,
        temperature=0,
        is_finished=lambda number, new: number == 0 and len(new) == 5,
    )
    assert found == [whole[0][:5], whole[1]]


@settings(max_examples=15)
@given(prompts=PROMPTS.filter(lambda rows: max(map(len, rows)) < MAX_SEQ_LEN - 3))
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(prompts: list[list[int]]) -> None:
    model = model_with(qk_norm=True, init_std=0.2)  # logits of about 1
    decoder = Decoder(model, prompts, 3)
    rows = [list(prompt) for prompt in prompts]
    logits = decoder.prefill()
    for token in (5, 0, 7):
        uncached = torch.cat([model.logits(torch.tensor([row]))[:, -1, :VOCAB_SIZE] for row in rows])
        torch.testing.assert_close(logits, uncached, rtol=0, atol=1e-5)
        rows = [[*row, token] for row in rows]
        logits = decoder.decode(torch.full((len(rows),), token))


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 1.2, -0.5, 0.9]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        drawn = sample(logits, temperature, generator=generator).bincount(minlength=4) / 20_000
        torch.testing.assert_close(drawn, (logits[0] / temperature).softmax(0), rtol=0, atol=0.015)


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=5), st.integers(1, 7), st.floats(0.05, 1.0))
def test_samples_stay_within_top_k_and_top_p(scores: list[float], top_k: int, top_p: float) -> None:
    logits = torch.tensor([scores])
    generator = torch.Generator().manual_seed(0)
    drawn = set(sample(logits.expand(50, -1), 1.0, top_k, top_p, generator).tolist())
    order = sorted(range(5), key=lambda i: -logits[0, i].item())[:top_k]
    probabilities = logits[0, order].double().softmax(0).tolist()
    allowed, total = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if total < top_p + 1e-5:
            allowed.add(token)
        total += probability
    assert drawn <= allowed


def test_the_same_generator_gives_the_same_tokens() -> None:
    model = model_with()
    first, second, other = (
        generate(
            model,
            torch.tensor([[1, 2], [3, 4]]),
            max_new_tokens=8,
            generator=torch.Generator().manual_seed(s),
        )
        for s in (1, 1, 2)
    )
    assert first == second != other
    assert all(token < VOCAB_SIZE for row in first for token in row)


def test_generation_restores_the_training_mode() -> None:
    model = model_with(dropout=0.5).train()
    first, second = (generate(model, [[1]], max_new_tokens=5, temperature=0) for _ in range(2))
    assert model.training
    assert first == second


def test_no_prompts_give_no_rows() -> None:
    assert generate(model_with(), [], max_new_tokens=3) == []


def test_one_error_lists_every_invalid_argument() -> None:
    model = model_with({"classifier": ClassificationHead(num_labels=2)}, attention="bidirectional")
    with pytest.raises(ConfigError) as raised:
        generate(model, [[], [1] * 17, [23]], max_new_tokens=-1, temperature=-1, top_k=0, top_p=1.5)
    errors = str(raised.value).splitlines()
    assert len(errors) == 8
