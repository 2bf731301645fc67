"""NEFTune: uniform noise on the embeddings of tokens in training, as a function of a key per row."""

import math
from typing import Any

import pytest
import torch
from support.tiny_models import SIZES, build_any
from torch import Tensor, nn

from distft.config import parse
from distft.keyed_random import row_keys
from distft.model.dropout import embedding_noise
from distft.run.config import RunConfig

ROWS = torch.arange(4)
KINDS: dict[str, dict[str, Any]] = {
    "transformer": SIZES,
    "bert": {**SIZES, "attention": "bidirectional", "positions": "learned", "embedding_norm": True},
    "cnn": {"type": "cnn", "vocab_size": 61, "max_seq_len": 24, "d_model": 32, "tie_embeddings": False},
    "deep_averaging": {"type": "deep_averaging", "vocab_size": 61, "max_seq_len": 24, "d_model": 32},
    "rnn": {"type": "rnn", "vocab_size": 61, "max_seq_len": 24, "d_model": 32, "num_layers": 1},
}


def config_of(kind: str, **settings: Any) -> Any:
    raw = {"run_dir": "x", "data": {"type": "labelled", "path": "x"}, "optim": {"peak_lr": 1}}
    raw |= {"batch": {"global_batch_size": 1, "micro_batch_size": 1, "seq_len": 4}, "train": {"max_steps": 1}}
    config: RunConfig = parse(RunConfig, {**raw, "model": {**KINDS[kind], **settings}})
    return config.model


def test_noise_is_uniform_in_the_bounds_of_the_paper() -> None:
    lengths = torch.tensor([100, 50, 10, 1])
    noise = embedding_noise((4, 100, 250), 5.0, row_keys(1, ROWS), lengths)
    for row, length in zip(noise, lengths.tolist(), strict=True):
        most = 5 / math.sqrt(length * 250)
        assert 0.999 * most < row.abs().max() <= most
        # mean and standard deviation of 25,000 uniform numbers, to four standard errors
        assert abs(row.mean().item()) < 4 * most / math.sqrt(3 * row.numel())
        assert row.std().item() == pytest.approx(most / math.sqrt(3), rel=0.02)
    assert abs(torch.corrcoef(noise.flatten(1)[:2])[0, 1].item()) < 4 / math.sqrt(25_000)


def test_neither_other_rows_nor_padding_change_the_noise() -> None:
    keys, lengths = row_keys(5, ROWS), torch.tensor([5, 3, 7, 2])
    whole = embedding_noise((4, 7, 9), 1.0, keys, lengths)
    part = embedding_noise((2, 5, 9), 1.0, keys[1:3], lengths[1:3])
    assert torch.equal(part, whole[1:3, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_added_to_what_the_table_of_tokens_gives(kind: str) -> None:
    """As a hook on the embedding module adds it in other libraries; and in training alone."""
    model = build_any(config_of(kind, neftune_alpha=5.0))
    keys, lengths = row_keys(3, ROWS), torch.tensor([6, 3, 6, 5])
    ids = torch.randint(0, 61, (4, 6), generator=torch.Generator().manual_seed(0))
    plain = model.logits(ids, lengths=lengths, dropout_keys=keys)
    noisy = model.train().logits(ids, lengths=lengths, dropout_keys=keys)
    unlike = model.logits(ids, lengths=lengths, dropout_keys=keys + 1)

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        return output + embedding_noise((4, 6, 32), 5.0, keys, lengths)

    handle = model.eval().get_submodule("embed").register_forward_hook(add)
    expected = model.logits(ids, lengths=lengths)
    handle.remove()
    real = torch.arange(6) < lengths[:, None]
    torch.testing.assert_close(noisy[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(noisy[real], plain[real], atol=1e-3)
    assert not torch.allclose(noisy[real], unlike[real], atol=1e-3)


def test_noise_and_dropout_are_drawn_independently_and_go_together() -> None:
    config = config_of("transformer", neftune_alpha=5.0, dropout=0.3)
    model = build_any(config).train()
    ids, keys = torch.zeros(4, 6, dtype=torch.int64), row_keys(3, ROWS)
    together = model.logits(ids, dropout_keys=keys)
    alone = [model.logits(ids[i : i + 1], dropout_keys=keys[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), together)
    without = build_any(config.model_copy(update={"neftune_alpha": 0.0})).train()
    assert not torch.allclose(without.logits(ids, dropout_keys=keys), together, atol=1e-3)
