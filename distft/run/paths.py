"""Names and paths of a run's files. Finds wrong paths without torch, which takes 2 s to import."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distft import storage
from distft.checkpoint.formats.detect import detect_format
from distft.data.streams import StreamsConfig
from distft.data.tokens import TokensConfig
from distft.errors import CheckpointError, ConfigError, DataError, ErrorCollector
from distft.run.config import RunConfig
from distft.tokenizer.files import LIBRARY_FILE, SENTENCEPIECE_FILE, find_tokenizer_file
from distft.tracker.jsonl import EVENTS_FILE, METRICS_FILE, read_lines

CONFIG_FILE = "config.yaml"  # of a run, in its directory
CONFIG_HEADER = "# Written by distft at each start of this run.\n"


def check_paths(config: RunConfig) -> None:
    """Raise one error if nothing is at the path of the checkpoint or the tokenizer, with all wrong paths.

    The error also lists what is wrong in the files of the data, as far as it shows without a tokenizer. Other
    faults alone raise nothing here: `read_inputs` reports them together with all that it finds.
    """
    errors = ErrorCollector()
    require_outputs(config, errors)
    is_init_from_missing = config.init_from is not None
    with errors.collect():
        if config.init_from is not None:
            _require_checkpoint(config.init_from)
            is_init_from_missing = False
    is_tokenizer_missing = False
    if config.tokenizer is not None or not is_init_from_missing:  # otherwise it may be the checkpoint's
        is_tokenizer_missing = True
        with errors.collect():
            _require_tokenizer(config)
            is_tokenizer_missing = False
    if is_init_from_missing or is_tokenizer_missing:
        check_data_files(config, errors)
        errors.raise_if_any()


def require_outputs(config: RunConfig, errors: ErrorCollector) -> None:
    """Collect an error for each of the run's directories that cannot be created or written to."""
    for setting, directory in (
        ("run_dir", config.run_dir),
        ("checkpoint.directory", config.checkpoint.directory),
    ):
        local = None if directory is None else storage.local_path(directory)
        if local is not None:
            with errors.collect():
                _require_writable(setting, local)
                if setting == "run_dir":
                    _require_own(local)


def _require_own(run_dir: Path) -> None:
    """Raise `ConfigError` if a start would replace a file in `run_dir` that distft has not written."""
    if any(event.get("kind") for event in read_lines(run_dir / EVENTS_FILE, limit=10)):
        return  # a run's directory
    foreign = [name for name in (METRICS_FILE, EVENTS_FILE) if _is_nonempty_file(run_dir / name)]
    config = run_dir / CONFIG_FILE
    if _is_nonempty_file(config):
        with config.open("rb") as file:
            if file.read(len(CONFIG_HEADER)) != CONFIG_HEADER.encode():
                foreign.append(CONFIG_FILE)
    if foreign:
        raise ConfigError(
            f"run_dir={run_dir} has a {' and a '.join(foreign)} that no run of distft wrote, and a start "
            "would replace: choose another run_dir, such as a new directory below it."
        )


def _is_nonempty_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _require_writable(setting: str, directory: Path) -> None:
    name = f"{setting}={directory}"
    try:
        path = directory.absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise ConfigError(
                f"{name} cannot be a directory: {existing} is a file. Choose another {setting}."
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{name} cannot be written: no write permission in {existing}. Choose another {setting}."
            )
        if not os.statvfs(existing).f_blocks:
            # /proc and /sys have no blocks and claim to be writable; so do network file systems, rightly.
            os.rmdir(tempfile.mkdtemp(dir=existing))  # noqa: PTH106 - of the directory just made
    except OSError as error:
        raise ConfigError(f"{name} cannot be created: {error.strerror}. Choose another {setting}.") from None


def data_of_streams(setting: str, data: Any) -> dict[str, Any]:
    """The data under `setting`, or those of its streams, by the dotted key that gives each."""
    if not isinstance(data, StreamsConfig):
        return {setting: data}
    return {f"{setting}.streams.{name}.data": stream.data for name, stream in data.streams.items()}


def data_paths(setting: str, data: Any) -> dict[str, str]:
    """The paths of the data under `setting`, by the dotted key that gives each."""
    if isinstance(data, StreamsConfig):
        return {
            key: path
            for of_stream, own in data_of_streams(setting, data).items()
            for key, path in data_paths(of_stream, own).items()
        }
    if isinstance(data, TokensConfig):
        return {f"{setting}.sources.{i}.path": source.path for i, source in enumerate(data.sources)}
    path = getattr(data, "path", None)
    return {f"{setting}.path": path} if isinstance(path, str) else {}


@contextmanager
def naming_settings(setting: str, data: Any) -> Iterator[None]:
    """Put the setting that gives a path before the first message about that path."""
    try:
        yield
    except DataError as error:
        lines = str(error).splitlines()
        for key, path in data_paths(setting, data).items():
            for index, line in enumerate(lines):
                if line.startswith((f"{path} ", f"{path}:", f"{path}/")):
                    lines[index] = f"{key}: {line}"
                    break
        raise type(error)("\n".join(lines)) from error


def check_data_files(config: RunConfig, errors: ErrorCollector) -> None:
    """Collect what is wrong with the files of the data, as far as it shows without a tokenizer.

    Shards are opened, which checks that all are there with the right size; other files must exist.
    """
    for setting, data in (("data", config.data), ("validation", config.validation)):
        for key, path in data_paths(setting, data).items():
            with errors.collect(), naming_settings(setting, data):
                if ".sources." in key:
                    from distft.data.shards import TokenShards

                    TokenShards.open(path)
                elif not storage.exists(path):
                    raise DataError(f"{path} does not exist: name a file of rows.")


def find_tokenizer(config: RunConfig, init_from: str | None) -> str:
    """Path of the run's tokenizer: of the setting, else in the checkpoint, else next to the token shards."""
    if config.tokenizer is not None:
        return config.tokenizer
    directories = [] if init_from is None else [init_from]
    key, shards = next(
        ((key, path) for key, path in data_paths("data", config.data).items() if ".sources." in key), ("", "")
    )
    if shards:
        if not storage.exists(shards):
            raise DataError(f"{key}: {shards} does not exist: make token shards with `distft tokenize`.")
        directories += [shards, _above(shards)]
    for directory in directories:
        name = find_tokenizer_file(directory)
        if name is not None:
            return storage.join(directory, name)
    tried = f" (tried {SENTENCEPIECE_FILE} and {LIBRARY_FILE} in {', '.join(directories)})" * bool(
        directories
    )
    raise ConfigError(
        f"tokenizer is not set, and none was found{tried}: set tokenizer to a .model or tokenizer.json file."
    )


def _require_checkpoint(init_from: str) -> None:
    try:
        detect_format(init_from)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None


def _above(path: str) -> str:
    """The directory that `path` is in: a link's target counts, and in a URL `..` has no meaning."""
    return storage.parent(path) if storage.is_url(path) else storage.join(path, "..")


def _require_tokenizer(config: RunConfig) -> None:
    if config.tokenizer is None and config.init_from is not None:
        return  # it may be in the checkpoint, whose directory is known when it has been opened
    if config.model is not None and not config.model.reads_tokens:
        return
    path = find_tokenizer(config, None)
    if not storage.exists(path):
        from distft.tokenizer import Tokenizer

        Tokenizer.load(path)  # raises the error
