"""Sentencepiece model files that are none, or made to cost much: a clear error in little time and memory."""

import io
import struct
import tracemalloc
from time import process_time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.errors import DataError
from distft.tokenizer.model_proto import parse_model_proto
from distft.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer


def field(number: int, value: bytes) -> bytes:
    length, size = bytearray(), len(value)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes([*length, size]) + value


def piece(text: bytes = b"a", score: float = 0.0, kind: int | None = None) -> bytes:
    return field(
        1, field(1, text) + b"\x15" + struct.pack("<f", score) + (bytes([24, kind]) if kind else b"")
    )


BAD = {
    "empty": (b"", "it has no pieces"),
    "a piece type of 7": (piece(kind=7), "type of piece 0 is 7: it must be 1 to 6"),
    "an algorithm of 9": (piece() + field(2, b"\x18\x09"), "model_type is 9: it must be 1 to 4"),
    "a byte piece of other text": (piece(b"abc", kind=6), r"piece 0 is of type BYTE, but its text is 'abc'"),
    "a piece without text": (piece(b""), "piece 0 has 0 bytes of text"),
    "a long piece": (piece(b"a" * (1 << 17)), "piece 0 has 131,072 bytes of text"),
    "the same piece twice": (piece() + piece(), "both 'a'"),
    "a score that is no number": (piece(score=float("nan")), "piece 0 has the score nan"),
    "pieces that are a number": (b"\x08\x05", "pieces is the number 5"),
    "a field beyond the end": (b"\x0a\xff\x01a", "runs past the end"),
    "an end within a field": (b"\x0a", "ends within a field"),
    "a field number of 0": (b"\x02\x01a", "field number 0"),
    "a group": (b"\x0b", "wire type 3"),
    "a special id that is no piece": (piece() + b"\xca\x3e\x02\x10\x09", "the id of eos is not that"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_model_that_is_none_is_told(kind: str) -> None:
    model, message = BAD[kind]
    with pytest.raises(DataError, match=message):
        SentencePieceTokenizer(model)


def test_a_long_number_costs_no_time_and_a_short_file_no_memory() -> None:
    tracemalloc.start()
    began = process_time()
    for model in (b"\x80" * (4 << 20) + b"\x01", b"\x0a" + b"\xff" * 8 + b"\x01", b"\x0a\x00" * (1 << 20)):
        with pytest.raises(DataError, match="not a sentencepiece model"):
            parse_model_proto(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert process_time() - began < 5  # the number alone took minutes
    assert peak < 4 * (4 << 20)  # of a file of 4 MiB


def small_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox"] * 20), model_writer=model, vocab_size=20, minloglevel=2
    )
    return model.getvalue()


MODEL = small_model()


@given(
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8),
    length=st.integers(0, len(MODEL)),
)
@settings(deadline=None, max_examples=150)
def test_changed_bytes_give_a_model_or_our_own_error(changes: list[tuple[int, int]], length: int) -> None:
    model = bytearray(MODEL[:length] if length % 3 == 0 else MODEL)
    for position, value in changes:
        if position < len(model):
            model[position] = value
    try:
        tokenizer = SentencePieceTokenizer(bytes(model))
        ids = tokenizer.encode("the quick brown fox")
    except DataError:
        return
    assert all(0 <= token < tokenizer.vocab_size == len(tokenizer.model_proto.pieces) for token in ids)
    assert isinstance(tokenizer.decode(ids), str)


def test_fingerprints_tell_normalizers_apart() -> None:
    """Equal fingerprints must mean equal encodings; these models have the same pieces."""
    changes = {"charsmap": (2, b"x"), "dummy prefix": (3, 0), "spaces": (4, 0), "escaping": (5, 0)}
    found = {parse_model_proto(MODEL).fingerprint((0, 1, 2))}
    for number, value in changes.values():
        spec = field(number, value) if isinstance(value, bytes) else bytes([number << 3, value])
        found.add(parse_model_proto(MODEL + field(3, spec)).fingerprint((0, 1, 2)))
    found.add(parse_model_proto(MODEL).fingerprint((0, 2, 1)))
    found.add(parse_model_proto(MODEL + bytes([0xCA, 0x3E, 2, 0x20, 1])).fingerprint((0, 1, 2)))
    assert len(found) == len(changes) + 3
