"""BPE by words: the ids that sentencepiece gives a whole text, several times as fast.

Where no piece has a space behind another character, no merge crosses the place before a run of spaces, and
the merges on its two sides do not see each other. So a text may be cut there, and a word that was met before
need not be encoded again. The same holds between letters and other characters, where no piece joins them.
Unigram models are not treated so: their search is local too, but sentencepiece adds scores in float32 along
the whole text, and over a long one the rounding decides between near-equal cuts.
"""

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from distft.tokenizer.proto import Algorithm, ModelDescription, PieceType

SPACE = "\u2581"  # how sentencepiece writes a space
_ONLY_SPACES = re.compile(r" *\Z")
_PLACE_TO_CUT = re.compile(r"[^ ](?= )")
_SPACED = re.compile(r" *[^ ]+")
_SPACED_OR_LETTERS = re.compile(r" *(?:[^\W\d_]+|(?:[^\w ]|[\d_])+)")
_ACROSS_SPACES = re.compile(f"[^{SPACE}]{SPACE}")
_ACROSS_LETTERS = re.compile(rf"[^\W\d_][\W\d_]|(?:[^\w{SPACE}]|[\d_])[^\W\d_]")
_MATCHED = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
_SLAB_CHARS = 1 << 17  # words of one slab are in memory together
_MAX_KNOWN_CHARS = 1 << 21  # of the words remembered: about 350,000 English words in 70 MB

_CHUNK_WORDS = 400  # 2 KB of English: sentencepiece is quickest on 0.5 to 4 KB
_WARM_CHARS = 1 << 18  # fewer known, and most words are new in any text
_SKIPPED_SLABS = 15  # then one is tried by words again

EncodeAll = Callable[[list[str]], list[NDArray[np.int32]]]


def word_pattern(model: ModelDescription) -> re.Pattern[str] | None:
    """What a word is, such that words by themselves get exactly the ids that they have in a whole text.

    None where the model's pieces and settings do not prove it.
    """
    matched = [piece.text for piece in model.pieces if piece.type in _MATCHED]
    if (
        model.algorithm != Algorithm.BPE
        or model.charsmap
        or model.remove_extra_whitespaces
        or not model.escape_whitespaces
        or model.treat_whitespace_as_suffix
        or any(map(_ACROSS_SPACES.search, matched))
        # A run of unknown characters becomes one id; a known space or byte pieces end the run at a cut.
        or not (model.byte_fallback or SPACE in matched)
    ):
        return None
    if model.byte_fallback and not model.add_dummy_prefix and not any(map(_ACROSS_LETTERS.search, matched)):
        return _SPACED_OR_LETTERS  # punctuation apart: fewer different words, above all in code
    return _SPACED


class WordEncoder:
    """Encodes texts word by word and remembers words, which are what `pattern` matches.

    `encode_all` is sentencepiece's own; with `dummy_prefix` it puts a space before each text it is given.
    """

    def __init__(self, encode_all: EncodeAll, pattern: re.Pattern[str], *, dummy_prefix: bool) -> None:
        self._encode_all = encode_all
        self._pattern = pattern
        self._dummy_prefix = dummy_prefix
        self._known: dict[str, bytes] = {}
        self._known_chars = 0
        self._chars_to_skip = 0  # text that brings few words again goes in chunks, without the memory

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of `text`, which holds no U+2581."""
        if _ONLY_SPACES.match(text):
            return self._encode_all([text])[0]
        slabs = []
        start = 0
        while start < len(text):
            cut = _PLACE_TO_CUT.search(text, start + _SLAB_CHARS)
            stop = cut.end() if cut and not _ONLY_SPACES.match(text, cut.end()) else len(text)
            slabs.append(self._encode_slab(text[start:stop], is_first=start == 0))
            start = stop
        return np.frombuffer(b"".join(slabs), dtype=np.int32)

    def _encode_slab(self, slab: str, *, is_first: bool) -> bytes:
        body = slab.rstrip(" ")  # the pattern would try the spaces at the end once for each of them
        words: list[str] = self._pattern.findall(body)
        words[-1] += slab[len(body) :]
        if self._chars_to_skip > 0:
            self._chars_to_skip -= len(slab)
            chunks = ["".join(words[i : i + _CHUNK_WORDS]) for i in range(0, len(words), _CHUNK_WORDS)]
            return b"".join(ids.tobytes() for ids in self._encode_all(self._bare(chunks, is_first)))
        words = self._bare(words, is_first)
        if self._known_chars > _MAX_KNOWN_CHARS:
            self._known.clear()
            self._known_chars = 0
        fresh = [word for word in set(words) if word not in self._known]
        if len(fresh) * 3 > len(words) and self._known_chars > _WARM_CHARS:
            self._chars_to_skip = _SKIPPED_SLABS * len(slab)
        for word, ids in zip(fresh, self._encode_all(fresh), strict=True):
            self._known[word] = ids.tobytes()
            self._known_chars += len(word)
        return b"".join(map(self._known.__getitem__, words))

    def _bare(self, cuts: list[str], is_first: bool) -> list[str]:
        """`cuts` without the space that sentencepiece will put before each of them itself."""
        if not self._dummy_prefix:
            return cuts
        first = cuts[0] if is_first else cuts[0][1:]
        return [first, *(cut[1:] for cut in cuts[1:])]
