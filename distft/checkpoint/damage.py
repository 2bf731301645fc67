"""Finds damage of a checkpoint in any format, by the checksums of files and the fingerprints of states."""

from collections.abc import Callable

from distft import storage
from distft.checkpoint.fingerprint import fingerprint, fingerprint_text
from distft.checkpoint.sources import CheckpointSource, read_chunks, stored_states
from distft.errors import CheckpointError, DistftError, UnreachableError

_CHANGED = "differs from what was saved."


def find_damaged_states(
    source: CheckpointSource, on_progress: Callable[[int], None] | None = None
) -> list[str]:
    """A message for each state that cannot be read, or whose fingerprint differs from the saved one."""
    found = []
    for name, record in source.manifest.parameters.items():
        for state in stored_states(source, name):
            try:
                with storage.unreadable_as_unreachable(source.path):
                    chunks = read_chunks(source, name, state, on_progress)
                    total = sum(fingerprint(values, start) for start, values in chunks)
            except UnreachableError:
                raise
            except (DistftError, FileNotFoundError) as error:
                found.append(f"{state} of {name} cannot be read: {error}")
                continue
            saved = record.states[state].fingerprint
            if saved is not None and saved != fingerprint_text(total):
                found.append(f"{state} of {name} {_CHANGED}")
    return found


def find_all_damage(source: CheckpointSource, on_progress: Callable[[int], None] | None = None) -> list[str]:
    """A message for each damaged file, then one for each state that differs from what was saved."""
    files = source.find_damage()
    states = find_damaged_states(source, on_progress)
    if files:  # these explain why a state cannot be read
        states = [state for state in states if state.endswith(_CHANGED)]
    return [*files, *states]


def require_undamaged(source: CheckpointSource) -> None:
    """Raise `CheckpointError` if files are damaged; the message names the affected states."""
    if source.find_damage():
        damage = "\n".join(find_all_damage(source))
        raise CheckpointError(f"The checkpoint is damaged; use another:\n{damage}")
