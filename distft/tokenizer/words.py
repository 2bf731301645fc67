"""BPE by words: the ids that sentencepiece gives a whole text, several times as fast.

Where no piece has a space behind another character, no merge crosses the place before a run of spaces, and
the merges on its two sides do not see each other. So a text may be cut there, and a word that was met before
need not be encoded again. Unigram models are not treated so: their search is local too, but sentencepiece
adds scores in float32 along the whole text, and over a long one the rounding decides between near-equal cuts.
"""

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from distft.tokenizer.proto import Algorithm, ModelDescription, PieceType

SPACE = "\u2581"  # how sentencepiece writes a space
_WORD = re.compile(r" *[^ ]+(?: +\Z)?")
_ONLY_SPACES = re.compile(r" *\Z")
_PLACE_TO_CUT = re.compile(r"[^ ](?= )")
_CROSSING = re.compile(f"[^{SPACE}]{SPACE}")
_MATCHED = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
_SLAB_CHARS = 1 << 17  # words of one slab are in memory together
_MAX_KNOWN_CHARS = 1 << 21  # of the words remembered: about 350,000 English words in 70 MB

_CHUNK_WORDS = 400  # 2 KB of English: sentencepiece is quickest on 0.5 to 4 KB
_WARM_CHARS = 1 << 18  # fewer known, and most words are new in any text
_SKIPPED_SLABS = 15  # then one is tried by words again

EncodeAll = Callable[[list[str]], list[NDArray[np.int32]]]


def can_go_by_words(model: ModelDescription) -> bool:
    """Whether `WordEncoder` gives exactly the ids of whole texts: the pieces and settings prove it."""
    return (
        model.algorithm == Algorithm.BPE
        and not model.charsmap
        and not model.remove_extra_whitespaces
        and model.escape_whitespaces
        and not model.treat_whitespace_as_suffix
        and not any(p.type in _MATCHED and _CROSSING.search(p.text) for p in model.pieces)
        # A run of unknown characters becomes one id; a known space or byte pieces end the run at a cut.
        and (model.byte_fallback or any(p.type is PieceType.NORMAL and p.text == SPACE for p in model.pieces))
    )


class WordEncoder:
    """Encodes texts word by word and remembers words.

    `encode_all` is sentencepiece's own; with `dummy_prefix` it puts a space before each text it is given.
    """

    def __init__(self, encode_all: EncodeAll, *, dummy_prefix: bool) -> None:
        self._encode_all = encode_all
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
        words: list[str] = _WORD.findall(slab)
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
