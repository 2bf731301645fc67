"""Fast BPE: encodes a text word by word with a cache of words, giving the ids of sentencepiece.

If no piece of the vocabulary has a space after another character, no merge crosses the boundary before a run
of spaces, and merges on its two sides are independent. The text can be split there, and a word in the cache
needs no encoding. The same holds between letters and other characters if no piece joins them.

Unigram models are excluded. Their search is local too, but sentencepiece accumulates scores in float32 along
the whole text, and in a long one rounding decides between segmentations of nearly equal score.
"""

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from distft.tokenizer.model_proto import Algorithm, ModelProto, PieceType

META_SPACE = "\u2581"  # sentencepiece's symbol for a space
_ONLY_SPACES = re.compile(r" *\Z")
_CHUNK_BOUNDARY = re.compile(r"[^ ](?= )")
_WORDS_BY_SPACE = re.compile(r" *[^ ]+")
_WORDS_BY_SPACE_OR_LETTER = re.compile(r" *(?:[^\W\d_]+|(?:[^\w ]|[\d_])+)")
_CROSSES_SPACE = re.compile(f"[^{META_SPACE}]{META_SPACE}")
_CROSSES_LETTER = re.compile(rf"[^\W\d_][\W\d_]|(?:[^\w{META_SPACE}]|[\d_])[^\W\d_]")
_MATCHED_TYPES = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
_CHUNK_CHARS = 1 << 17  # the words of one chunk are in memory together
_MAX_CACHE_CHARS = 1 << 21  # of cached words: about 350,000 English words in 70 MB
_WARM_CACHE_CHARS = 1 << 18  # below this size most words of any text are new

_BATCH_WORDS = 400  # 2 KB of English: sentencepiece is fastest on 0.5 to 4 KB
_UNCACHED_CHUNKS = 15  # encoded without the cache after a chunk of mostly new words

EncodeAll = Callable[[list[str]], list[NDArray[np.int32]]]


def pretokenization_pattern(model: ModelProto) -> re.Pattern[str] | None:
    """Regex for the words of a text whose ids, encoded alone, are exactly those within the whole text.

    None if the model's pieces and settings do not guarantee it.
    """
    matched = [piece.text for piece in model.pieces if piece.type in _MATCHED_TYPES]
    if (
        model.algorithm != Algorithm.BPE
        or model.precompiled_charsmap
        or model.remove_extra_whitespaces
        or not model.escape_whitespaces
        or model.treat_whitespace_as_suffix
        or any(map(_CROSSES_SPACE.search, matched))
        # A run of unknown characters is one id, unless a known space or byte pieces end it at the boundary.
        or not (model.byte_fallback or META_SPACE in matched)
    ):
        return None
    if model.byte_fallback and not model.add_dummy_prefix and not any(map(_CROSSES_LETTER.search, matched)):
        return _WORDS_BY_SPACE_OR_LETTER  # separate punctuation: fewer distinct words, above all in code
    return _WORDS_BY_SPACE


class CachedWordEncoder:
    """Encodes texts word by word; `pattern` matches a word, and a cache keeps the ids of known words.

    `encode_all` is sentencepiece's own encoding; with `dummy_prefix` it prepends a space to each text.
    """

    def __init__(self, encode_all: EncodeAll, pattern: re.Pattern[str], *, dummy_prefix: bool) -> None:
        self._encode_all = encode_all
        self._pattern = pattern
        self._dummy_prefix = dummy_prefix
        self._cache: dict[str, bytes] = {}
        self._cache_chars = 0
        self._num_uncached_chars = 0  # characters still to encode without the cache

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of `text`, which must not contain U+2581."""
        if _ONLY_SPACES.match(text):
            return self._encode_all([text])[0]
        ids = []
        start = 0
        while start < len(text):
            found = _CHUNK_BOUNDARY.search(text, start + _CHUNK_CHARS)
            stop = found.end() if found and not _ONLY_SPACES.match(text, found.end()) else len(text)
            ids.append(self._encode_chunk(text[start:stop], is_first=start == 0))
            start = stop
        return np.frombuffer(b"".join(ids), dtype=np.int32)

    def _encode_chunk(self, chunk: str, *, is_first: bool) -> bytes:
        body = chunk.rstrip(" ")  # on trailing spaces the pattern would take quadratic time
        words: list[str] = self._pattern.findall(body)
        words[-1] += chunk[len(body) :]
        if self._num_uncached_chars > 0:
            self._num_uncached_chars -= len(chunk)
            batches = ["".join(words[i : i + _BATCH_WORDS]) for i in range(0, len(words), _BATCH_WORDS)]
            return b"".join(
                ids.tobytes() for ids in self._encode_all(self._without_dummy_prefix(batches, is_first))
            )
        words = self._without_dummy_prefix(words, is_first)
        if self._cache_chars > _MAX_CACHE_CHARS:
            self._cache.clear()
            self._cache_chars = 0
        new_words = [word for word in set(words) if word not in self._cache]
        if len(new_words) * 3 > len(words) and self._cache_chars > _WARM_CACHE_CHARS:
            self._num_uncached_chars = _UNCACHED_CHUNKS * len(chunk)
        for word, ids in zip(new_words, self._encode_all(new_words), strict=True):
            self._cache[word] = ids.tobytes()
            self._cache_chars += len(word)
        return b"".join(map(self._cache.__getitem__, words))

    def _without_dummy_prefix(self, texts: list[str], is_first: bool) -> list[str]:
        """`texts` without the leading space that sentencepiece's dummy prefix will add again."""
        if not self._dummy_prefix:
            return texts
        first = texts[0] if is_first else texts[0][1:]
        return [first, *(text[1:] for text in texts[1:])]
