"""Names and paths of a run's files. Finds wrong paths without torch, which takes 2 s to import."""

import os
from pathlib import Path

from distft import storage
from distft.checkpoint.formats.detect import detect_format
from distft.data.tokens import TokensConfig
from distft.errors import CheckpointError, ConfigError, DataError, ErrorCollector
from distft.run.config import RunConfig

TOKENIZER_FILE = "tokenizer.model"  # in a checkpoint, and beside token shards
CONFIG_FILE = "config.yaml"  # of a run, in its directory


def check_paths(config: RunConfig) -> None:
    """Raise one error if nothing is at the path of the checkpoint or the tokenizer, with all wrong paths.

    Without either of them `read_inputs` checks nothing more. A wrong `run_dir` alone raises nothing here: it
    is reported together with what `read_inputs` finds in the data.
    """
    errors = ErrorCollector()
    with errors.collect():
        require_writable(config.run_dir)
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
        errors.raise_if_any()


def require_writable(run_dir: str) -> None:
    """Raise `ConfigError` if `run_dir` cannot be created or written to; creates nothing."""
    path = Path(run_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(
            f"run_dir={run_dir} cannot be a directory: {existing} is a file. Choose another run_dir."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run_dir={run_dir} cannot be written: no write permission in {existing}. Choose another run_dir."
        )


def find_tokenizer(config: RunConfig, init_from: str | None) -> str:
    """Path of the run's tokenizer: of the setting, else in the checkpoint, else next to the token shards."""
    if config.tokenizer is not None:
        return config.tokenizer
    candidates = []
    if init_from is not None:
        candidates.append(storage.join(init_from, TOKENIZER_FILE))
    if isinstance(config.data, TokensConfig):
        shards = config.data.sources[0].path
        if not storage.exists(shards):
            raise DataError(
                f"data.sources.0.path={shards} does not exist: name a directory that `distft tokenize` made, "
                "such as its output's train/."
            )
        candidates += [storage.join(shards, TOKENIZER_FILE), storage.join(shards, "..", TOKENIZER_FILE)]
    for candidate in candidates:
        if storage.exists(candidate):
            return candidate
    tried = f" (tried {', '.join(candidates)})" if candidates else ""
    raise ConfigError(f"tokenizer is not set, and none was found{tried}: set tokenizer to a .model file.")


def _require_checkpoint(init_from: str) -> None:
    try:
        detect_format(init_from)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None


def _require_tokenizer(config: RunConfig) -> None:
    if config.tokenizer is None and config.init_from is not None:
        return  # it may be in the checkpoint, whose directory is known when it has been opened
    path = find_tokenizer(config, None)
    if not storage.exists(path):
        from distft.tokenizer import Tokenizer

        Tokenizer.load(path)  # raises the error
