"""The texts of a model's new tokens: where they end, and piece by piece as they come."""

from collections.abc import Collection, Sequence

from distft.tokenizer import Tokenizer

_CONTEXT = 8  # tokens before the first new one, so that a space between them is not lost


def start_of_nothing(tokenizer: Tokenizer) -> list[int]:
    """A token to continue where there is no text: the end of another document, if the tokenizer has one."""
    for token in (tokenizer.eos_id, tokenizer.bos_id):
        if token is not None:
            return [token]
    return tokenizer.encode("\n")[-1:] or [0]


class TextStream:
    """Turns new tokens into pieces of text, which together are the text of all."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()) -> None:
        """`before`: the tokens of the prompt; no piece has one of the texts `stop`, or what follows it."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(before[-_CONTEXT:])
        self._start = 0  # of the tokens that are decoded together
        self._end = len(self._ids)  # of those whose text has been taken
        self._held = ""  # text that may be the beginning of a stop text
        self._is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token: none while it may be half a character or stop text."""
        if token < self._tokenizer.vocab_size:
            self._ids.append(token)
        return self._released(self._new_text(is_last=False), is_last=False)

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        return self._released(self._new_text(is_last=True), is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._start : self._end])
        text = self._tokenizer.decode(self._ids[self._start :])
        # A character whose other bytes follow, or one of bytes that are no UTF-8, ends in U+FFFD.
        if len(text) <= len(known) or (text.endswith("\ufffd") and not is_last):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text[len(known) :]

    def _released(self, new: str, *, is_last: bool) -> str:
        if self._is_stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self._is_stopped = bool(found)
        end = min(found) if found else len(text) - (0 if is_last else self._num_held(text))
        self._held = text[end:]
        return text[:end]

    def _num_held(self, text: str) -> int:
        """Characters at the end of the text with which a stop text begins."""
        longest = max(map(len, self._stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(s.startswith(text[-size:]) for s in self._stop)), 0)


class Stops:
    """The texts of continuations, up to the first stop text, or to a token that ends them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str] = (),
        ends: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._stop = stop
        self._ends = ends
        # A token has a byte of text or none; those without any are rare.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 16

    def is_finished(self, number: int, new: list[int]) -> bool:
        """Whether the last tokens end the text or complete a stop text. Looks at a few tokens, not at all."""
        if new[-1] in self._ends or not self._stop:
            return new[-1] in self._ends
        before = [*self._prompts[number], *new[: -self._tail]][-self._tail :]
        text = self._continuation(before, new[-self._tail :])
        return any(stop in text for stop in self._stop)

    def cut(self, number: int, new: list[int]) -> str:
        """The text of the new tokens of a prompt, before the first stop text and without its end."""
        text = self._continuation(self._prompts[number], new[:-1] if new and new[-1] in self._ends else new)
        return text[: min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=len(text))]

    def _continuation(self, before: Sequence[int], new: Sequence[int]) -> str:
        """The text that `new` adds: alone it would lose the space that models put before each text."""
        known = [token for token in (*before, *new) if token < self._tokenizer.vocab_size]
        first = [token for token in before if token < self._tokenizer.vocab_size]
        whole, start = self._tokenizer.decode(known), self._tokenizer.decode(first)
        if whole.startswith(start):
            return whole[len(start) :]
        return self._tokenizer.decode(known[len(first) :])
