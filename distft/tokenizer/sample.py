"""A random sample of a text stream in bounded memory, to train a tokenizer on."""

import heapq
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

# sentencepiece silently drops sentences above max_sentence_length, by default 4192 bytes.
_MAX_SENTENCE_BYTES = 4000
_MAX_SENTENCE_CHARS = _MAX_SENTENCE_BYTES // 4
_WHITE_SPACE = re.compile(r"\s+(?=\S)")


def sample_sentences(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A uniform sample of the sentences of `texts`, at most `max_bytes` of UTF-8; all of them if they fit.

    The sample keeps their order and depends on the arguments alone. Memory: `max_bytes`.
    """
    kept: list[tuple[int, int, bytes]] = []  # heap of (-random key, index, sentence)
    num_bytes = 0
    for index, sentence in enumerate(sentence for text in texts for sentence in split_text(text)):
        data = sentence.encode("utf-8", "replace")
        key = int.from_bytes(blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "little")
        heapq.heappush(kept, (-key, index, data))
        num_bytes += len(data)
        while num_bytes > max_bytes and kept:
            num_bytes -= len(heapq.heappop(kept)[2])
    return [data.decode() for _, _, data in sorted(kept, key=lambda item: item[1])]


def split_text(text: str) -> Iterator[str]:
    """Split `text` into sentences, in sentencepiece's sense, of at most 4000 bytes; their join is `text`.

    A sentence begins with the white space before it, if there is any: sentencepiece drops trailing newlines.
    """
    start = 0
    while len(text) - start > _MAX_SENTENCE_CHARS:
        stop = start + _MAX_SENTENCE_CHARS
        white_spaces = [match.start() for match in _WHITE_SPACE.finditer(text, start + 1, stop)]
        if white_spaces:
            stop = white_spaces[-1]
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
