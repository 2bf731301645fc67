"""Where a run starts: its latest valid checkpoint, or the beginning."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.manifest import Manifest
from distft.checkpoint.store import CheckpointStore, LatestValid
from distft.collectives import Collectives, all_or_none
from distft.config import Settings, redact
from distft.errors import CheckpointError, ConfigError
from distft.run.config import RunConfig
from distft.run.inputs import RunInputs

# Settings that a resume may not change: they define what the model sees, and when.
_FIXED_ON_RESUME = (
    ("batch", "global_batch_size"),
    ("batch", "seq_len"),
    ("data",),
    ("objective",),
    ("model",),
    ("seed",),
    ("trainable",),
)
_SECTIONS_TO_COMPARE = ("optim", "train", "engine", "batch")


def find_resume_checkpoint(
    store: CheckpointStore, inputs: RunInputs, collectives: Collectives
) -> LatestValid:
    """The checkpoint to resume from; for a new run there is none, and `init_from` has been verified.

    Called by all ranks together. Raises `CheckpointError` if every checkpoint of the run is damaged, and
    `ConfigError` if the run may not resume.
    """
    config = inputs.config
    found = store.find_latest_valid()
    if found.checkpoint is None and found.damage:
        raise CheckpointError(
            f"Every checkpoint in {store.root} is damaged, so the run cannot resume. Restore one, choose "
            "another run_dir, or delete them to start from the beginning.\n" + "\n".join(found.damage)
        )
    if found.checkpoint is None:
        _verify_init_from(inputs, collectives)
        return found
    if not config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume is false, but {store.root} contains a run at step {found.checkpoint.step}: "
            "choose another run_dir, delete this one, or set checkpoint.resume=true."
        )
    require_resumable(found.checkpoint.manifest, config, inputs.train.fingerprint)
    store.resume_from(found)
    return found


def _verify_init_from(inputs: RunInputs, collectives: Collectives) -> None:
    """Read every byte, as before a resume. Ranks divide the files of a distft checkpoint among them."""
    source = inputs.init_from
    if isinstance(source, Checkpoint):
        source.verify(collectives)
    elif source is not None:
        with all_or_none(collectives, CheckpointError):
            if collectives.rank == 0:
                require_undamaged(source)


def require_resumable(saved: Manifest, config: RunConfig, data_fingerprint: str | None) -> None:
    """Raise one `ConfigError` with all settings that changed since the checkpoint but may not.

    A setting that this version added is no change as long as it has its default. Data with the same content
    (`data_fingerprint`) may have moved.
    """
    before = _with_new_defaults(saved.config, config)
    now = config.model_dump(mode="json")
    if saved.data_fingerprint is not None and saved.data_fingerprint == data_fingerprint:
        before["data"], now["data"] = _without_paths(before.get("data")), _without_paths(now["data"])
    changes = []
    for keys in _FIXED_ON_RESUME:
        changes += _describe_changes(".".join(keys), _lookup(before, keys), _lookup(now, keys))
    if changes:
        changes.append(
            f"{config.run_dir} contains checkpoints of another run. Restore the old values, choose another "
            "run_dir, or start from its weights alone with init_from."
        )
        raise ConfigError("\n".join(changes))


def _with_new_defaults(saved: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """`saved` with the defaults of settings that did not exist when it was written.

    A section is read by the class that it has in `config`, so no name in `saved` is imported.
    """
    completed = dict(saved)
    for section in ("data", "objective", "model", *_SECTIONS_TO_COMPARE):
        now, before = getattr(config, section), saved.get(section)
        if isinstance(now, Settings) and isinstance(before, Mapping):
            with contextlib.suppress(ValidationError):  # another type, or a setting that no longer exists
                completed[section] = type(now).model_validate(before).model_dump(mode="json")
    return completed


def _without_paths(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _without_paths(value) for key, value in data.items() if key != "path"}
    return [_without_paths(item) for item in data] if isinstance(data, list) else data


def changed_settings(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Dotted keys of the settings that may change on resume and did, for the `resume` event."""
    saved, now = _with_new_defaults(saved, config), redact(config.model_dump(mode="json"))
    return sorted(
        f"{section}.{key}"
        for section in _SECTIONS_TO_COMPARE
        for key in {*saved.get(section, {}), *now[section]}
        if saved.get(section, {}).get(key) != now[section].get(key)
    )


def _describe_changes(key: str, before: Any, after: Any) -> list[str]:
    """A line for each setting below `key` that differs."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = dict.fromkeys([*before, *after])
        return [
            line
            for name in names
            for line in _describe_changes(f"{key}.{name}", before.get(name), after.get(name))
        ]
    return [] if before == after else [f"{key} was {before!r} and is now {after!r}."]


def _lookup(raw: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw
