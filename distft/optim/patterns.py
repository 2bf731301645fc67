"""Selects parameters by glob patterns over their names, or by their kind, such as the trainable ones."""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from distft.errors import ConfigError

# The selection bias of experts, which the training loop moves by a rule (`distft.train.experts`)
_MOVED_BY_RULE = ".selection_bias"


def is_moved_by_rule(name: str) -> bool:
    """Whether no gradient moves this parameter, so that it never counts as trainable."""
    return name.endswith(_MOVED_BY_RULE)


def select_trainable(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names selected by glob `patterns`, applied from first to last.

    A pattern adds the names that it matches; with a `!` in front it removes them. `["*", "!embed*"]` selects
    all but the embeddings. `@biases` and the others of `matching_names` select by kind.

    Raises `ConfigError` that lists every pattern without a match, or if no name is selected.
    """
    known = list(names)
    selected: set[str] = set()
    errors = []
    for pattern in patterns:
        matches = matching_names(pattern.removeprefix("!"), known)
        if not matches:
            errors.append(no_match_message("trainable", pattern.removeprefix("!"), known))
        if pattern.startswith("!"):
            selected.difference_update(matches)
        else:
            selected.update(name for name in matches if not is_moved_by_rule(name))
    if errors:
        raise ConfigError("\n".join(errors))
    if not selected:
        raise ConfigError(
            f"trainable={list(patterns)} leaves nothing to train of {len(known)} parameters: patterns apply "
            f"in order and a '!' removes, so begin with the parameters to train, such as '*'."
        )
    return selected


_BLOCK = re.compile(r"(?:.*\.)?blocks\.(?P<number>\d+)(?=\.)")
_RANGE = re.compile(r"@(?P<kind>first_blocks|last_blocks|blocks):(?P<first>\d+)(-(?P<last>\d+))?")
_KINDS = ("@biases", "@norms", "@embeddings", "@lora", "@first_blocks:N", "@last_blocks:N", "@blocks:N-M")


def block_of(name: str) -> str | None:
    """The block that a parameter is of, such as `blocks.3`; None: it is of none."""
    found = _BLOCK.match(name)
    return None if found is None else found.group()


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob pattern, in order; case matters.

    `@biases`, `@norms`, `@embeddings` and `@lora` (adapters) match parameters of that kind, `@last_blocks:2`
    and `@first_blocks:2` those of as many blocks, and `@blocks:2-4` those of the blocks 2, 3 and 4, from 0.
    """
    known = list(names)
    if pattern.startswith("@"):
        return _of_kind(pattern, known)
    return [name for name in known if fnmatchcase(name, pattern)]


def _of_kind(pattern: str, names: Sequence[str]) -> list[str]:
    if pattern in {"@biases", "@lora"}:
        kind = {"@biases": "bias", "@lora": "lora_"}[pattern]
        return [name for name in names if kind in name.rpartition(".")[2]]
    if pattern == "@norms":
        return [name for name in names if "norm" in name]
    if pattern == "@embeddings":
        return [name for name in names if name.endswith("embed.weight")]
    found = _RANGE.fullmatch(pattern)
    if found is None:
        return []
    blocks = {name: int(match["number"]) for name in names if (match := _BLOCK.match(name))}
    kind, first = found["kind"], int(found["first"])
    last = int(found["last"] or first)
    depth = max(blocks.values(), default=-1) + 1
    if kind != "blocks":
        first, last = (0, first - 1) if kind == "first_blocks" else (depth - first, depth - 1)
    if first < 0 or last >= depth or first > last:  # more than there is can only be a mistake
        return []
    return [name for name, number in blocks.items() if first <= number <= last]


def _num_blocks(names: Sequence[str]) -> int:
    return max((int(found["number"]) + 1 for name in names if (found := _BLOCK.match(name))), default=0)


def no_match_message(setting: str, pattern: str, names: Sequence[str]) -> str:
    """The error text for a pattern without a match: it suggests similar names."""
    if pattern.startswith("@"):
        return (
            f"{setting}: {pattern!r} matches none of the {len(names)} parameters; the kinds are "
            f"{', '.join(_KINDS)}, and the model has {_num_blocks(names)} blocks."
        )
    # Names that differ only in a number, such as the layer's, count as one suggestion.
    closest: dict[str, str] = {}
    for name in difflib.get_close_matches(pattern, names, n=len(names) or 1, cutoff=0.3):
        closest.setdefault(re.sub(r"\d+", "*", name), name)
    suggestions = list(closest.values())[:3] or list(names[:3])
    return (
        f"{setting}: pattern {pattern!r} matches none of the {len(names)} parameters; "
        f"the closest are {', '.join(map(repr, suggestions)) or 'none'}{_number_range(pattern, names)}."
    )


def _number_range(pattern: str, names: Sequence[str]) -> str:
    """Names the numbers that would match in place of the first number of `pattern`, if any."""
    number = re.search(r"\d+", pattern)
    if number is None:
        return ""
    before, after = pattern[: number.start()], pattern[number.end() :]
    known = sorted({int(digits) for name in names for digits in re.findall(r"\d+", name)})
    found = [n for n in known if matching_names(f"{before}{n}{after}", names)]
    return f"; {before}{found[0]} to {before}{found[-1]} exist" if found else ""
