"""Encodes preferences: a prompt with a better and a worse answer, as texts or as messages of a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distft.data.batch import RaggedArray
from distft.data.compressed import read_error
from distft.data.conversation_files import checked_messages
from distft.data.encoded_once import EncodedTable
from distft.data.preferences_rows import PROMPT_LENGTHS
from distft.data.records import Record, RowErrors, missing_file, parse_rows, read_records
from distft.data.rows import Row, missing_column
from distft.errors import DataError, DistftError

if TYPE_CHECKING:
    from distft.data.dataset import Chat, DataContext
    from distft.data.preferences import PreferencesConfig

Messages = list[dict[str, Any]]
_EQUAL = "are equal, so that neither is better: correct or remove the row."


@dataclass(frozen=True, slots=True)
class Side:
    """A prompt with one of its answers."""

    tokens: list[int]  # of the joint text
    num_prompt: int  # of these, before the answer; at least 1, since nothing predicts the first token


@dataclass(frozen=True, slots=True)
class CutPair:
    """Rows of at most `seq_len` tokens, and a last one, which is a target only."""

    rows: list[list[int]]  # of the better and the worse answer
    prompt_lengths: list[int]
    is_prompt_cut: bool
    num_answers_cut: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A prompt with two answers."""

    chosen: Side
    rejected: Side
    num_prompt: int  # tokens of the prompt alone

    @property
    def is_joined(self) -> bool:
        """Whether a token of a side is of the prompt and of the answer."""
        return min(self.chosen.num_prompt, self.rejected.num_prompt) < self.num_prompt

    def cut(self, start: list[int], end: list[int], seq_len: int) -> CutPair:
        """Cuts answers at the end, then the prompt at the front; `start` and `end` are put around each row.

        Both sides lose as many tokens of the prompt, so that the answers follow the same text. At least one
        token of the prompt stays.
        """
        sides = (self.chosen, self.rejected)
        answers = [side.tokens[side.num_prompt :] + end for side in sides]
        kept = [answer[:seq_len] for answer in answers]
        rooms = [seq_len + 1 - len(answer) for answer in kept]
        lacking = [len(start) + side.num_prompt - room for side, room in zip(sides, rooms, strict=True)]
        num_cut = max(0, *lacking)
        prompts = [start + side.tokens[num_cut : side.num_prompt] for side in sides]
        if min(rooms) <= len(start) or not all(prompts):
            prompts = [[side.tokens[side.num_prompt - 1]] for side in sides]
        return CutPair(
            rows=[prompt + answer for prompt, answer in zip(prompts, kept, strict=True)],
            prompt_lengths=[len(prompt) for prompt in prompts],
            is_prompt_cut=num_cut > 0,
            num_answers_cut=sum(len(a) < len(b) for a, b in zip(kept, answers, strict=True)),
        )


def encode_preferences(config: PreferencesConfig, context: DataContext, start: Sequence[int]) -> EncodedTable:
    """The rows of the file. Raises one `DataError` with file and line of every problem."""
    errors = RowErrors(config.path)
    if config.format == "messages":
        pairs, end = list(_pairs_of_messages(config, context.chat(), errors)), []
    else:
        pairs = list(_pairs_of_texts(config, context, errors))
        end = [] if context.eos_id is None else [context.eos_id]
    errors.raise_if_any()
    if not pairs:
        raise DataError(f"{config.path} has no rows.")
    return _table(
        config.path, [pair.cut(list(start), end, context.seq_len) for pair in pairs], pairs, context
    )


def _table(
    path: str, cut_pairs: Sequence[CutPair], pairs: Sequence[Pair], context: DataContext
) -> EncodedTable:
    """Without pairs whose answers are equal as far as they are read. Raises `DataError` if all are."""
    kept = [cut for cut in cut_pairs if cut.rows[0] != cut.rows[1]]
    if not kept:
        raise DataError(
            f"{path}: the two answers of each of its {len(pairs):,} rows are equal as far as "
            f"batch.seq_len={context.seq_len} reads them: raise it."
        )
    num_prompts, num_answers = sum(c.is_prompt_cut for c in kept), sum(c.num_answers_cut for c in kept)
    notes = [
        f"{len(kept):,} pairs; to fit seq_len={context.seq_len}, {num_prompts:,} prompts were cut at the "
        f"front, {num_answers:,} answers at the end"
    ]
    if num_left_out := len(pairs) - len(kept):
        notes.append(f"{num_left_out:,} pairs are left out, whose answers are equal as far as they are read")
    if num_joined := sum(pair.is_joined for pair in pairs):
        notes.append(f"in {num_joined:,} pairs an answer begins within a token that began in the prompt")
    lengths = [length for cut in kept for length in cut.prompt_lengths]
    return EncodedTable(
        rows=RaggedArray([row for cut in kept for row in cut.rows]),
        columns={PROMPT_LENGTHS: np.array(lengths, np.int64)},
        facts={"summary": f"{path}: {'; '.join(notes)}"},
    )


def _pairs_of_texts(config: PreferencesConfig, context: DataContext, errors: RowErrors) -> Iterator[Pair]:
    records = read_records(config.path, texts=config.columns, max_rows=config.max_rows, errors=errors)
    for record in records:
        pair = _pair_of_texts(config, record, context, errors)
        if pair is not None:
            yield pair


def _pair_of_texts(
    config: PreferencesConfig, record: Record, context: DataContext, errors: RowErrors
) -> Pair | None:
    """None after one of the row's problems was added to `errors`.

    An answer is encoded together with its prompt, and begins where these tokens differ from those of the
    prompt alone, or behind them. So its tokens are those of the joint text, whatever the tokenizer puts
    before a text that it encodes alone. A token of the prompt's end and the answer's beginning is the
    answer's.
    """
    values = record.values
    assert config.prompt is not None
    prompt = context.encode(values[config.prompt])
    empty = [name for name in (config.chosen, config.rejected) if not values[name].strip()]
    for name in [config.prompt] * (not prompt) + empty:
        errors.add(record.line, f"{name!r} is empty: a pair needs a prompt and two answers.")
    if not prompt or empty:
        return None
    sides = []
    for name in (config.chosen, config.rejected):
        joint = context.encode(values[config.prompt] + values[name])
        num_prompt = max(_num_equal(prompt, joint), 1)
        if num_prompt >= len(joint):
            errors.add(record.line, f"{name!r} encodes to no tokens behind its prompt.")
        else:
            sides.append(Side(joint, num_prompt))
    if len(sides) < 2:
        return None
    if sides[0].tokens == sides[1].tokens:
        errors.add(record.line, f"{config.chosen!r} and {config.rejected!r} {_EQUAL}")
        return None
    return Pair(chosen=sides[0], rejected=sides[1], num_prompt=len(prompt))


def _pairs_of_messages(config: PreferencesConfig, chat: Chat, errors: RowErrors) -> Iterator[Pair]:
    for number, (line, row) in enumerate(_rows(config)):
        if config.max_rows is not None and number >= config.max_rows:
            return
        found = _messages_of(config, row, partial(errors.add, line))
        if found is None:
            continue
        prompt, *answers = found
        try:
            encoded = [chat.completion(prompt, answer) for answer in answers]
            sides = [Side([*before, *after], len(before)) for before, after in encoded]
            if not all(before and after for before, after in encoded):
                raise DataError("becomes a text without a prompt or an answer: does the template write it?")
        except DistftError as problem:
            errors.add(line, str(problem))
        else:
            shortest = min(side.num_prompt for side in sides)
            yield Pair(chosen=sides[0], rejected=sides[1], num_prompt=shortest)


def _rows(config: PreferencesConfig) -> Iterator[tuple[int, Row | str]]:
    try:
        yield from parse_rows(config.path, config.columns)
    except FileNotFoundError:
        raise missing_file(config.path) from None
    except OSError as error:
        raise read_error(config.path, error) from error


def _messages_of(
    config: PreferencesConfig, row: Row | str, add_problem: Callable[[str], None]
) -> tuple[Messages, Messages, Messages] | None:
    """The messages of the prompt and of the two answers; None after their problems were added.

    Without a column of prompts, the prompt is what both conversations begin with.
    """
    if isinstance(row, str):
        add_problem(row)
        return None
    problems: list[str] = []
    found: dict[str, Messages] = {}
    for column in config.columns:
        found[column], own = _checked(row, column)
        problems += own
    if not problems:
        chosen, rejected = found[config.chosen], found[config.rejected]
        num_prompt = _num_equal(chosen, rejected) if config.prompt is None else 0
        prompt = chosen[:num_prompt] if config.prompt is None else found[config.prompt]
        answers = {config.chosen: chosen[num_prompt:], config.rejected: rejected[num_prompt:]}
        if chosen == rejected:
            problems.append(f"{config.chosen!r} and {config.rejected!r} {_EQUAL}")
        elif not prompt:
            problems.append("has no prompt: the two conversations begin with different messages.")
        else:
            problems += [
                f"{name!r} must go on behind the prompt with a message of the assistant."
                for name, answer in answers.items()
                if not answer or answer[0]["role"] != "assistant"
            ]
        if not problems:
            return prompt, answers[config.chosen], answers[config.rejected]
    for problem in problems:
        add_problem(problem)
    return None


def _checked(row: Mapping[str, Any], column: str) -> tuple[Messages, list[str]]:
    """The messages in a column, and what is wrong with them."""
    if column not in row:
        return [], [missing_column(column, row)]
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        return [], [f"{column!r} must be an array of messages, objects with role and content."]
    return checked_messages(messages, of=f" of {column!r}")


def _num_equal(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of elements with which both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
