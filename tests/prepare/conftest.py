"""A small vocabulary and a small corpus."""

import inspect
import json
import tempfile
import textwrap
from pathlib import Path

import pytest

from distft.tokenizer import TokenizerTrainConfig, train_tokenizer

TEXT = inspect.getsource(textwrap) + inspect.getsource(tempfile)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small.model"
    train_tokenizer([TEXT], TokenizerTrainConfig(algorithm="bpe", vocab_size=500), path)
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A JSONL file of 120 documents, 80 KB."""
    path = tmp_path / "corpus" / "rows.jsonl"
    path.parent.mkdir()
    rows = [f"{TEXT[start : start + 700]} number {start}" for start in range(0, 120 * 193, 193)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path
