"""A random part of a text stream, in bounded memory: what a tokenizer is trained on."""

import heapq
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

_MAX_PIECE_BYTES = 4000  # sentencepiece drops longer sentences without a word at its own default of 4192
_MAX_PIECE_CHARS = _MAX_PIECE_BYTES // 4
_BREAK = re.compile(r"\s+(?=\S)")


def sample_text(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Pieces of `texts`, evenly drawn, of at most `max_bytes` UTF-8 bytes in all; everything where it fits.

    The pieces keep their order, and depend on nothing but the arguments. At most `max_bytes` are held.
    """
    kept: list[tuple[int, int, bytes]] = []  # a heap whose top has the largest draw
    num_bytes = 0
    for index, piece in enumerate(piece for text in texts for piece in cut_text(text)):
        data = piece.encode("utf-8", "replace")
        draw = int.from_bytes(blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "little")
        heapq.heappush(kept, (-draw, index, data))
        num_bytes += len(data)
        while num_bytes > max_bytes and kept:
            num_bytes -= len(heapq.heappop(kept)[2])
    return [data.decode() for _, _, data in sorted(kept, key=lambda item: item[1])]


def cut_text(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most 4000 bytes, at white space where there is some; nothing is lost.

    White space goes to the head of the next piece: sentencepiece drops line ends from a sentence's tail.
    """
    start = 0
    while len(text) - start > _MAX_PIECE_CHARS:
        stop = start + _MAX_PIECE_CHARS
        breaks = [match.start() for match in _BREAK.finditer(text, start + 1, stop)]
        if breaks:
            stop = breaks[-1]
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
