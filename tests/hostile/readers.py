"""Readers for `Guard.run`. Each takes paths and returns plain values."""

import sys

import tokenizers

from distft.checkpoint.formats import huggingface_source
from distft.checkpoint.formats.deepspeed import reader, universal
from distft.checkpoint.formats.detect import open_source
from distft.cli.main import app
from distft.tokenizer import Tokenizer, library_tokenizer

MODULES = (
    reader,
    huggingface_source,
    universal,
    library_tokenizer,
    tokenizers,
)  # imported once, in the server


def run_cli(*arguments: str) -> int:
    """Run one command as a user would; its errors are raised, not printed. Returns the exit code."""
    try:
        app(args=list(arguments), standalone_mode=True)
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def read_checkpoint(path: str) -> dict[str, object]:
    """Open a checkpoint of any format, look for damage, and read all of its states."""
    source = open_source(path)
    found: dict[str, object] = {"format": source.format, "damage": source.find_damage()}
    total = 0.0
    for name, record in source.manifest.parameters.items():
        numel = 1
        for size in record.shape:
            numel *= size
        for state in record.states:
            total += float(source.read(name, state, 0, numel).double().sum())
    return found | {"parameters": len(source.manifest.parameters), "sum": repr(total)}


def read_tokenizer(path: str) -> dict[str, object]:
    """Load a tokenizer of any kind, encode and decode with it, and ask for all that it knows."""
    tokenizer = Tokenizer.load(path)
    texts = ["a ab abc", "a" * 40 + "c" + "x" * 40, "\u00e9 [CLS] <|endoftext|>"]
    ids = [tokenizer.encode(text) for text in texts]
    assert all(0 <= index < tokenizer.vocab_size for row in ids for index in row)
    decoded = [tokenizer.decode(row) for row in ids]
    known = [len(tokenizer.token_bytes()), len(tokenizer.starts_word()), len(tokenizer.piece_texts)]
    assert set(known) == {tokenizer.vocab_size}
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "num_ids": sum(map(len, ids)),
        "num_characters": sum(map(len, decoded)),
    }
