from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distft.data.dataset import DataContext
from distft.data.shard_layout import ShardLayout
from distft.data.shard_writer import ShardWriter
from distft.data.targets import NEXT_TOKEN
from distft.data.tokens import TokensConfig
from distft.errors import DataError


def write_shards(directory: Path, tokens: Iterable[int], fingerprint: str = "a") -> str:
    writer = ShardWriter(
        directory, ShardLayout(vocab_size=100, tokenizer_fingerprint=fingerprint, shard_tokens=1000)
    )
    ids = np.array(list(tokens))
    writer.append(ids, np.array([0]), len(ids))
    writer.commit()
    return str(directory)


def context(**changes) -> DataContext:
    settings = {"seq_len": 4, "vocab_size": 100, "encode": list, "tokenizer_fingerprint": "a"}
    return DataContext(**{**settings, **changes})


@pytest.fixture
def two_sources(tmp_path: Path) -> list[str]:
    return [
        write_shards(tmp_path / "low", [i % 50 for i in range(401)]),
        write_shards(tmp_path / "high", [50 + i % 50 for i in range(41)]),
    ]


def test_a_batch_mixes_sources_by_weight(two_sources: list[str]) -> None:
    low, high = two_sources
    config = TokensConfig(sources=[{"path": low, "weight": 3}, {"path": high, "weight": 1}], data_seed=5)
    feed = config.build(context())
    batch = feed.batch(0, 16)
    is_high = (batch.input_ids >= 50).all(1)
    assert is_high.sum() == 4
    for i in range(16):
        single = feed.batch(i, i + 1)
        assert torch.equal(single.input_ids[0], batch.input_ids[i])
        assert torch.equal(single.targets[NEXT_TOKEN][0], batch.targets[NEXT_TOKEN][i])


def test_an_evaluation_reads_every_row_once_and_ignores_weights(two_sources: list[str]) -> None:
    low, high = two_sources
    config = TokensConfig(sources=[{"path": low, "weight": 3}, {"path": high, "weight": 1}])
    feed = config.build_for_evaluation(context())
    assert feed.num_sequences == 110
    ids = feed.batch(0, 110).input_ids.flatten()
    assert ids.tolist() == [i % 50 for i in range(400)] + [50 + i % 50 for i in range(40)]


def test_data_seed_determines_the_order(two_sources: list[str]) -> None:
    orders = [
        TokensConfig(sources=[{"path": two_sources[0]}], data_seed=seed).build(context()).batch(0, 100)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(orders[0].input_ids, orders[1].input_ids)
    assert not torch.equal(orders[0].input_ids, orders[2].input_ids)


def test_one_error_reports_the_problems_of_all_sources(two_sources: list[str], tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", range(20), fingerprint="b")
    paths = [two_sources[0], other, str(tmp_path / "nothing")]
    config = TokensConfig(sources=[{"path": path} for path in paths])
    with pytest.raises(DataError) as raised:
        config.build(context())
    message = str(raised.value)
    assert "made with tokenizer b, but this run uses a" in message
    assert f"{tmp_path / 'nothing'} does not exist" in message
    assert two_sources[0] not in message


def test_shards_with_a_token_outside_the_models_vocabulary_cannot_be_opened(
    two_sources: list[str],
) -> None:
    with pytest.raises(DataError, match=r"token id 90.*ids 0 to 89.*vocab_size=91"):
        TokensConfig(sources=[{"path": two_sources[1]}]).build(context(vocab_size=90))


def test_weights_with_too_long_a_period_are_refused_at_validation() -> None:
    with pytest.raises(ValidationError, match="round the weights"):
        TokensConfig(sources=[{"path": "a", "weight": 0.3333333}, {"path": "b", "weight": 0.1}])
