"""Settings of sentences whose words have a label each, such as names or parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distft.config import PathText, Settings
from distft.data.dataset import ClassNames, DataContext, TextTemplate, check_vocabulary
from distft.data.targets import IGNORE_INDEX
from distft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distft.data.encoded_once import EncodedTable
    from distft.data.feed import Feed
    from distft.data.records import RowErrors
    from distft.data.sentences import Sentence
    from distft.data.token_label_rows import TokenLabelRows

_SAMPLE = 100  # sentences that tell whether the tokenizer wants a space before a word


class TokenLabelsConfig(Settings):
    """A file of sentences: JSONL with lists of words and labels, or CoNLL's columns."""

    type: Literal["token_labels"] = "token_labels"
    path: PathText  # .jsonl, or .conll, .iob, .iob2, .bio, .txt or .tsv; may be compressed
    tokens: str = "tokens"  # JSONL: column with the list of words
    labels: str | None = "labels"  # JSONL: column with the list of their labels; null: unlabelled
    token_column: int = 0  # CoNLL: column of the word, from 0; from the end if it is negative
    label_column: int = -1  # CoNLL: column of the label
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training. Labels get their ids here unless `context` has label names."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        return Feed.for_training(
            rows,
            seed=self.data_seed,
            shuffle=self.shuffle,
            label_names=names,
            document_start=None if context.template is None else context.template.before,
        )

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every sentence once, in file order."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        return Feed.for_evaluation(rows, label_names=names)

    def open(self, context: DataContext) -> tuple[TokenLabelRows, ClassNames | None]:
        """Read and encode the file: the rows, and the names of the labels, if they have labels.

        Raises `DataError` with file and line of every problem.
        """
        from distft.data.encoded_once import encoded_once
        from distft.data.token_label_rows import TokenLabelRows

        settings = {
            **self.model_dump(exclude={"shuffle", "data_seed"}),
            "seq_len": context.seq_len,
            "vocab_size": context.vocab_size,
            "tokenizer": context.tokenizer_fingerprint,
            "template": None if context.template is None else asdict(context.template),
            "label_names": context.label_names,
            "unk_id": context.unk_id,
        }
        table = encoded_once(context.cache_dir, self.path, settings, lambda: self._encode(context))
        names = table.facts["label_names"]
        rows = TokenLabelRows(table.rows, pad_id=context.pad_id or 0, summary=table.facts["summary"])
        return rows, None if names is None else tuple(names)

    def read(self, errors: RowErrors | None = None) -> list[Sentence]:
        """The file's sentences. Raises `DataError` with file and line of every problem.

        With `errors`, those of sentences go there instead.
        """
        from distft.data.sentences import read_sentences

        return read_sentences(
            self.path,
            tokens=self.tokens,
            labels=self.labels,
            token_column=self.token_column,
            label_column=self.label_column,
            max_rows=self.max_rows,
            errors=errors,
        )

    def _encode(self, context: DataContext) -> EncodedTable:
        from distft.data.batch import RaggedArray
        from distft.data.encoded_once import EncodedTable
        from distft.data.labelled_rows import LabelNames
        from distft.data.records import RowErrors
        from distft.data.token_label_rows import describe

        errors = RowErrors(self.path)
        sentences = self.read(errors)
        names = None if self.labels is None else self._label_names(sentences, context)
        words = _Words(context, sentences, errors)
        known = {} if names is None else {name: number for number, name in enumerate(names)}
        rows, num_words, num_kept, max_id = [], 0, 0, 0
        for sentence in sentences:
            ids, firsts = words.row(sentence)
            labels = [IGNORE_INDEX] * len(ids)
            own = sentence.labels if names is not None else [""] * len(firsts)
            for label, first in zip(own, firsts, strict=False):
                if names is not None and label not in known:
                    errors.add(sentence.line, LabelNames(names).unknown_label_message(label))
                labels[first] = known.get(label, 0)
            rows.append([*ids, *labels])
            max_id = max(max_id, *ids, 0)
            num_words += len(sentence.words)
            num_kept += len(firsts)
        errors.raise_if_any()
        if names is not None and context.label_names is None and len(names) < 2:
            raise DataError(
                f"{self.path}: all words have the label {names[0]!r}: token labels need two or more."
            )
        check_vocabulary(self.path, max_id, context)
        summary = describe(self.path, sentences, names, num_cut=num_words - num_kept, seq_len=context.seq_len)
        return EncodedTable(
            rows=RaggedArray(rows), columns={}, facts={"label_names": names, "summary": summary}
        )

    def _label_names(self, sentences: Sequence[Sentence], context: DataContext) -> ClassNames:
        from distft.data.labelled_rows import LabelNames

        if context.label_names is not None:
            assert isinstance(context.label_names, tuple)  # of this stream
            return context.label_names
        return LabelNames.from_labels(label for sentence in sentences for label in sentence.labels).names


class _Words:
    """Encodes sentences word by word, so that no token is of two words."""

    def __init__(self, context: DataContext, sentences: Sequence[Sentence], errors: RowErrors) -> None:
        self._context, self._errors = context, errors
        self._template = context.template or TextTemplate()
        self._ids: dict[str, list[int]] = {}  # of words with what precedes them
        self._max_tokens = context.seq_len - self._template.num_marks
        if self._max_tokens < 1:
            raise ConfigError(
                f"batch.seq_len={context.seq_len} has no room for a word and the tokens around: set it to "
                f"{self._template.num_marks + 1} or more."
            )
        self._space = self._space_before_words(sentences[:_SAMPLE])

    def row(self, sentence: Sentence) -> tuple[list[int], list[int]]:
        """The row's tokens, and where the first one of each word is; words beyond `seq_len` are left out."""
        ids: list[int] = []
        firsts = []
        for number, own in enumerate(self._pieces(sentence.words, self._space)):
            if not own:
                self._errors.add(
                    sentence.line, f"its word {number + 1}, {sentence.words[number]!r}, encodes to no tokens."
                )
            if len(ids) + max(len(own), 1) > self._max_tokens:
                break
            firsts.append(len(self._template.before) + len(ids))
            ids += own or [0]  # after the error above the row has no use
        return [*self._template.before, *ids, *self._template.behind], firsts

    def _pieces(self, words: Sequence[str], space: str) -> list[list[int]]:
        pieces = []
        for number, word in enumerate(words):
            text = space * (number > 0) + word
            if text not in self._ids:
                unknown = [] if self._context.unk_id is None else [self._context.unk_id]
                self._ids[text] = self._context.encode(text) or unknown
            pieces.append(self._ids[text])
        return pieces

    def _space_before_words(self, sentences: Sequence[Sentence]) -> str:
        """A space, unless the tokens of sentences are rather those of words without it, as BERT's are."""
        fits = {" ": 0, "": 0}
        for sentence in sentences:
            whole = self._context.encode(" ".join(sentence.words))
            for space in fits:
                fits[space] += [*chain.from_iterable(self._pieces(sentence.words, space))] == whole
        return max(fits, key=fits.__getitem__)
