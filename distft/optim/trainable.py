"""Which parameters learn."""

from collections.abc import Iterable, Sequence

from distft.errors import ConfigError
from distft.optim.patterns import matching, no_match


def select_trainable(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that glob `patterns` choose, read from the first to the last.

    A pattern adds what it matches; behind a `!` it takes it out again. `["*", "!embed*"]` is all but the
    embeddings. Raises `ConfigError` for every pattern that matches no name, and where nothing is chosen.
    """
    known = list(names)
    chosen: set[str] = set()
    faults = []
    for pattern in patterns:
        found = matching(pattern.removeprefix("!"), known)
        if not found:
            faults.append(no_match("trainable", pattern.removeprefix("!"), known))
        if pattern.startswith("!"):
            chosen.difference_update(found)
        else:
            chosen.update(found)
    if faults:
        raise ConfigError("\n".join(faults))
    if not chosen:
        raise ConfigError(
            f"trainable={list(patterns)} leaves nothing to train of {len(known)} parameters: "
            f"patterns are read in order, a '!' takes out, so begin with what is to learn, such as '*'."
        )
    return chosen
