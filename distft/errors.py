"""The errors that distft raises on purpose, and their exit codes.

error                             exit  raised by
DistftError
├── ConfigError                      2  every package that reads settings or options, before a GPU is used
├── DataError                        2  data, prepare, tokenizer: unusable text, labels or token shards
├── StorageError                     1  storage, tracker: full disk, missing or damaged bytes
│   └── UnreachableError             1  storage: no access to a store (network, service, credentials)
├── CheckpointError                  2  checkpoint: missing, incomplete, damaged, or wrong for this run
│   ├── UnsupportedFormatError       2  checkpoint.formats: no checkpoint of a format that distft reads
│   └── SupersededError              2  checkpoint: a later start of the same run writes its checkpoints
├── TrainingError                    1  train, watch, cluster, prepare: a hang, a crash
│   └── DivergedError                2  train: gradients that are not finite, for too many steps
├── Preempted                       75  train: stopped on request (SIGTERM, Ctrl-C), after saving
│   └── Resized                     75  train: stopped to continue at once on other ranks or nodes
├── Interrupted                    130  run, cluster: ended at once by a second Ctrl-C, without saving
└── LaunchError                      1  cluster, rendezvous: workers not placed, not started, or lost

Exit code 2: the user has to change something first; the same command would fail again. Exit code 1: the same
command may work again. Exit code 75 (EX_TEMPFAIL of sysexits.h): the same command continues the run.
Exit code 130 (as shells give after Ctrl-C): the same command continues a run from its last checkpoint.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_MOST_NAMES = 12  # in a message


class DistftError(Exception):
    """Base class of every error that distft raises on purpose."""

    exit_code = 1


class ConfigError(DistftError):
    """The settings or options are wrong. The message lists every problem, one per line."""

    exit_code = 2


class DataError(DistftError):
    """Text, labels, or token shards are missing, damaged, or of the wrong kind."""

    exit_code = 2


class StorageError(DistftError):
    """A file cannot be written or read: the disk is full, or bytes are missing or damaged."""


class UnreachableError(StorageError):
    """A store cannot be accessed now: network, service, credentials, permissions.

    It says nothing about the files in the store: do not treat them as damaged or missing.
    """


class CheckpointError(DistftError):
    """A checkpoint is missing, incomplete, damaged, or does not fit this run."""

    exit_code = 2


class UnsupportedFormatError(CheckpointError):
    """The path has no checkpoint, or one in a format that distft does not read; nothing is damaged."""


class SupersededError(CheckpointError):
    """A later start of the same run writes its checkpoints, so this one must stop writing."""


class TrainingError(DistftError):
    """Work failed: a hung rank, a killed process."""


class DivergedError(TrainingError):
    """Too many steps had gradients that are not finite; they would have them again after a restart."""

    exit_code = 2


class Preempted(DistftError):
    """The run stopped on request and saved its state; the same command continues it."""

    exit_code = 75


class Resized(Preempted):
    """The run stopped and saved, to continue at once with another number of ranks or on other nodes."""


class Interrupted(DistftError):
    """Ctrl-C ended the run at once; the message says which step is safe and how to go on."""

    exit_code = 130


class LaunchError(DistftError):
    """Workers could not be placed, started, or kept alive."""


class ErrorCollector:
    """Collects the user's errors (exit code 2) from independent checks, to report all of them at once."""

    def __init__(self) -> None:
        self._errors: list[DistftError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep a user's error that the block raises, and end the block. Other exceptions propagate."""
        try:
            yield
        except DistftError as error:
            if error.exit_code != ConfigError.exit_code:
                raise
            self._errors.append(error)

    def __contains__(self, message: str) -> bool:
        return any(str(error) == message for error in self._errors)

    def raise_if_any(self) -> None:
        """Raise one error with all collected messages, without repetitions, of the first error's class."""
        if self._errors:
            messages = dict.fromkeys(str(error) for error in self._errors)
            raise type(self._errors[0])("\n".join(messages)) from self._errors[0]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """ " Did you mean 'x'?" with the most similar known name; empty if none is similar."""
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {similar[0]!r}?" if similar else ""


def suggest_name(name: str, known: Sequence[str]) -> str:
    """ " Did you mean 'x'?" with the most similar known name; a list of known names if none is similar."""
    if hint := did_you_mean(name, known):
        return hint
    if not known:
        return " No name is valid here."
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return f" Known names: {', '.join(known[:_MOST_NAMES])}{more}."
