"""The interface of datasets, and the run context from which they are built. Imports no torch or NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from distft.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distft.data.batch import Batch
    from distft.data.sampler import Indices

Encode = Callable[[str], list[int]]
ClassNames = tuple[str, ...]  # by class id
# Of the one data set; None: it has none; or those of each stream, by its name.
Labels = ClassNames | Mapping[str, ClassNames] | None
DocumentMode = Literal["separate", "joined"]  # whether a row's documents see each other
Turns = Literal["all", "last"]  # of the assistant in a conversation


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTemplate:
    """Ids that stand before, between and behind the texts of a row: [CLS] and [SEP] of BERT."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def num_marks(self) -> int:
        """Tokens of a row of one text besides it."""
        return len(self.before) + len(self.behind)

    def row(self, text: Sequence[int], seq_len: int) -> list[int]:
        """A row of one text, which is cut if the row would have more than `seq_len` tokens."""
        return [*self.before, *text[: max(seq_len - self.num_marks, 0)], *self.behind]

    def pair(self, first: Sequence[int], second: Sequence[int]) -> list[int]:
        """A row of two texts."""
        return [*self.before, *first, *self.between, *second, *self.behind]

    def second_start(self, first: Sequence[int]) -> int:
        """Where the second text of a pair begins."""
        return len(self.before) + len(first) + len(self.between)


class Chat(Protocol):
    """A tokenizer with its chat template. Messages are JSON objects with role and content.

    Raises `DataError` where the template refuses messages.
    """

    fingerprint: str  # equal ones give equal tokens

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The ids of the messages, up to where the assistant begins to write."""

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        turns: Turns = "all",
    ) -> tuple[list[int], list[bool]]:
        """The ids of the messages, and which of them the assistant writes, in these of its turns."""

    def completion(
        self,
        prompt: Sequence[Mapping[str, Any]],
        completion: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[int]]:
        """The ids of `prompt`, up to where the assistant begins to write, and those that follow them."""


def _no_chat() -> Chat:
    raise ConfigError("conversations need a tokenizer, and this model reads images alone.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataContext:
    """Sizes, tokenizer and labels of the run, passed to every data config's `build`."""

    seq_len: int
    vocab_size: int  # rows of the model's embedding: the padded vocabulary
    encode: Encode
    tokenizer_fingerprint: str
    global_batch_size: int = 1
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    chat: Callable[[], Chat] = _no_chat  # raises ConfigError for a chat template that is none
    piece_id: Callable[[str], int | None] = lambda _: None  # the id of a piece, such as <mask>; None: no such
    template: TextTemplate | None = None  # of rows of whole texts; None: texts alone, pairs with eos between
    ends_sources: bool = False  # an encoder reads prompts, each with eos at its end, as T5's
    has_segments: bool = False  # the model tells the two texts of a pair apart by `Batch.segment_ids`
    reads_tokens: bool = True  # the model does
    image_shape: tuple[int, int, int] | None = None  # channels, height, width that it reads; None: none
    token_bytes: NDArray[np.int64] | None = None  # [vocab_size] UTF-8 bytes of each token, for bits per byte
    starts_word: NDArray[np.bool_] | None = None  # [vocab_size] whether each token begins a word
    label_names: Labels = None  # of a trained classifier; None: collect them from the data
    cache_dir: str | None = None  # where ranks share encoded rows; None: each process encodes for itself


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberSpread:
    """Of the numbers that the rows of a data set have as targets."""

    least: float
    most: float
    mean: float
    deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformContext:
    """What a transform of batches may use besides the batch."""

    data: DataContext
    seed: int
    num_sequences: int  # the sequences [0, num_sequences) exist
    rows: Callable[[Indices], Batch]  # the rows of any sequences, as they are without transforms
    step_share: float | None = 1.0  # mean share of a training step's sequences; None: data for evaluation
    numbers: NumberSpread | None = None  # of the targets of a regression


class SequenceDataset(Protocol):
    """Rows with random access; reading a row again gives the same row."""

    @property
    def num_sequences(self) -> int:
        """Number of rows, at least one."""

    @property
    def summary(self) -> str:
        """One line for the log: rows read, rows truncated."""

    @property
    def fingerprint(self) -> str | None:
        """Equal for two datasets with the same content, wherever it lies; None: unknown."""

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`, in that order.

        For empty `indices`, row 0 without targets: a rank without sequences runs it to take part in the
        collectives.
        """


def prompt_start(context: DataContext, *, prepend_bos: bool) -> tuple[int, ...]:
    """The ids before each prompt. Raises `DataError` for a bos that the tokenizer does not have."""
    if not prepend_bos:
        return ()
    if context.bos_id is None:
        raise DataError("prepend_bos=true, but the tokenizer has no bos: leave it out.")
    return (context.bos_id,)


def check_vocabulary(path: str, max_token_id: int, context: DataContext) -> None:
    """Raise `DataError` if `max_token_id`, read from `path`, is outside the model's vocabulary."""
    if max_token_id >= context.vocab_size:
        raise DataError(
            f"{path} contains token id {max_token_id}, but the model's vocabulary has the ids 0 to "
            f"{context.vocab_size - 1}: give the model vocab_size={max_token_id + 1} or more, or encode the "
            f"text with the model's own tokenizer."
        )
