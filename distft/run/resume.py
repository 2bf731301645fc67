"""Where a run starts: its latest valid checkpoint, or the beginning."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.fragments import EMA, WEIGHT
from distft.checkpoint.manifest import Manifest, Progress
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.store import CheckpointStore, LatestValid
from distft.collectives import Collectives, all_or_none
from distft.config import Settings, redact
from distft.config.component import trusting
from distft.data.dataset import Labels
from distft.errors import CheckpointError, ConfigError
from distft.run.adapter_base import base_of
from distft.run.config import RunConfig
from distft.run.data_context import data_context
from distft.run.model import saved_label_names
from distft.run.paths import naming_settings
from distft.run.run_inputs import RunInputs
from distft.tracker import EVENTS_FILE, LEDGER_EVENT, read_lines
from distft.train.early_stopping import has_stalled

# Settings that a resume may not change: they define what the model sees, and when.
_FIXED_ON_RESUME = (
    ("batch", "global_batch_size"),
    ("batch", "seq_len"),
    ("data",),
    ("objective",),
    ("model",),
    ("seed",),
    ("trainable",),
    ("lora",),
    ("phases",),
)
_SECTIONS_TO_COMPARE = ("optim", "train", "engine", "batch")


def claim_run(
    store: CheckpointStore,
    inputs: RunInputs,
    collectives: Collectives,
    *,
    launch: str | None,
) -> LatestValid:
    """Choose what to resume from, and take over writing from earlier starts unless nothing is left to do.

    A start that is refused leaves an earlier one alone, so it looks before it claims; what an earlier one
    commits in between is found after the claim. Called by all ranks together; `launch` is that of
    `CheckpointStore.become_writer`. Raises the errors of `find_resume_checkpoint`, and `SupersededError`.
    """
    found = find_resume_checkpoint(store, inputs, collectives)
    if found.checkpoint is not None and is_over(found.checkpoint.manifest.progress, inputs):
        return found
    store.become_writer(launch)
    while not store.is_still_latest(found):
        found = find_resume_checkpoint(store, inputs, collectives)
    return found


def is_over(progress: Progress, inputs: RunInputs) -> bool:
    """Whether nothing is left to train."""
    return progress.step >= inputs.total_steps or has_stalled(
        inputs.config.train.early_stopping, progress.best_of_run
    )


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
            f"No checkpoint in {store.root} can be used, so the run cannot resume. Mend what is named here, "
            "restore a checkpoint, or choose another run_dir to start from the beginning.\n"
            + "\n".join(found.damage)
        )
    if found.checkpoint is None:
        with all_or_none(collectives, ConfigError):
            if collectives.rank == 0:
                require_never_saved(config.run_dir, store.root)
        _verify_init_from(inputs, collectives)
        base = base_of(inputs, store.root)
        if base is not None:
            store.refer_to(base)
        store.resume_from(found)
        return found
    if not config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume is false, but {store.root} contains a run at step {found.checkpoint.step}: "
            "choose another run_dir, delete this one, or set checkpoint.resume=true."
        )
    require_resumable(found.checkpoint.manifest, config, inputs.train.fingerprint)
    require_same_optimizer(found.checkpoint.manifest, inputs)
    require_same_labels(found.checkpoint, inputs)
    store.resume_from(found)
    return found


def require_never_saved(run_dir: str, root: str) -> None:
    """Raise `ConfigError` if the events of a run tell of a checkpoint, although there is none at `root`.

    Otherwise a disk that is not mounted would make the run start from the beginning and drop its metrics.
    """
    events = Path(run_dir) / EVENTS_FILE
    saved = [event for event in read_lines(events) if event.get("kind") in {"save", "resume", LEDGER_EVENT}]
    if saved:
        path = next((event["path"] for event in reversed(saved) if "path" in event), root)
        raise ConfigError(
            f"{events} tells of a checkpoint of step {saved[-1].get('step')} ({path}), but {root} has none. "
            "Is its disk mounted, and is checkpoint.directory as it was? To start from the beginning, choose "
            f"another run_dir, or delete {run_dir}."
        )


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
    now = redact(config.model_dump(mode="json"))  # as it is saved
    if saved.data_fingerprint is not None and saved.data_fingerprint == data_fingerprint:
        before["data"], now["data"] = _without_paths(before.get("data")), _without_paths(now["data"])
    changes = []
    splits = any((given.get("validation") or {}).get("type") == "split" for given in (before, now))
    for keys in (*_FIXED_ON_RESUME, *([("validation",)] if splits else [])):  # a split changes the data
        changes += describe_changes(".".join(keys), _lookup(before, keys), _lookup(now, keys))
    if changes:
        changes.append(
            f"{config.run_dir} contains checkpoints of another run. Restore the old values, choose another "
            "run_dir, or start from its weights alone with init_from."
        )
        raise ConfigError("\n".join(changes))


def parameters_with_other_states(saved: Manifest, inputs: RunInputs) -> list[str]:
    """Trainable parameters whose states in the checkpoint are not those of the run's optimizer."""
    rules = inputs.config.optim.rules(inputs.shapes)
    trained = {
        name: set(record.states) - {WEIGHT, EMA}
        for name, record in saved.parameters.items()
        if name in inputs.trainable and record.trainable and record.updates
    }
    return [name for name, states in trained.items() if states != set(rules[name].moments)]


def require_same_optimizer(saved: Manifest, inputs: RunInputs) -> None:
    """Raise `ConfigError` if the optimizer keeps other states than the one of the checkpoint did."""
    names = parameters_with_other_states(saved, inputs)
    if not names or inputs.config.checkpoint.allow_other_optimizer:
        return
    now = inputs.config.optim.rules(inputs.shapes)[names[0]].moments
    before = [state for state in saved.parameters[names[0]].states if state not in {WEIGHT, EMA}]
    raise ConfigError(
        f"optim.type={getattr(inputs.config.optim, 'type', '')}: of {len(names)} parameters, such as "
        f"{names[0]}, it keeps {', '.join(now) or 'no state'}, and the checkpoint in "
        f"{inputs.config.run_dir} has {', '.join(before) or 'none'}. Restore the optimizer, choose another "
        "run_dir, or set checkpoint.allow_other_optimizer=true: then all its states and update counts start "
        "anew."
    )


def require_same_labels(checkpoint: CheckpointSource, inputs: RunInputs) -> None:
    """Raise if the data's labels are no longer those of the heads: each output means one label.

    A new label is a `DataError` with file and line, one that is gone a `ConfigError`.
    """
    before, now = saved_label_names(checkpoint), inputs.label_names
    if before == now:
        return
    # With the saved names, reading the data tells where each other label is.
    context = data_context(inputs.tokenizer, inputs.model, inputs.config, before)
    with naming_settings("data", inputs.config.data):
        inputs.config.data.build(context)
    raise ConfigError(
        f"The labels of the data changed since the heads were made: they were {_shown_labels(before)} and "
        f"are {_shown_labels(now)}. Restore the data, or start another run_dir, from the weights alone with "
        "init_from."
    )


def _shown_labels(label_names: Labels) -> str:
    if isinstance(label_names, Mapping):
        return "; ".join(f"{stream}: {_shown_labels(names)}" for stream, names in label_names.items())
    return ", ".join(map(repr, label_names or ())) or "none"


def _with_new_defaults(saved: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """`saved` with the defaults of settings that did not exist when it was written.

    Each section is read as the field of `RunConfig` reads it. Names in `saved` are imported only if `config`,
    which the user gave, has them too.
    """
    now = redact(config.model_dump(mode="json"))  # as `saved` was written
    completed = dict(saved)
    for name in [name for name in now if name not in saved or saved[name] != now[name]]:
        given = {name: saved[name]} if name in saved else {}
        trust = set(_external_types(now[name])).issuperset(_external_types(given))
        # Of the section alone: what `RunConfig` checks of several together may be stricter by now.
        field = RunConfig.model_fields[name]
        definition: dict[str, Any] = {name: (field.annotation, field)}
        section = create_model(name, __base__=Settings, **definition)
        with contextlib.suppress(ValidationError):  # a setting that no longer exists
            completed |= section.model_validate(given, context=trusting(trust)).model_dump(mode="json")
    return completed


def _external_types(raw: Any) -> Iterator[str]:
    """The names of classes outside distft, `module:Class`, in a configuration."""
    if isinstance(raw, Mapping):
        name = raw.get("type")
        if isinstance(name, str) and ":" in name:
            yield name
    if isinstance(raw, Mapping | list | tuple):
        for item in raw.values() if isinstance(raw, Mapping) else raw:
            yield from _external_types(item)


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
        for key in _comparable(saved.get(section), now[section])
        if saved[section].get(key) != now[section].get(key)
    )


def _comparable(before: Any, now: Mapping[str, Any]) -> set[str]:
    """The settings of a section to compare: of another type only those that both types have."""
    if not isinstance(before, Mapping):
        return set()
    if before.get("type") != now.get("type"):
        return before.keys() & now.keys()
    return before.keys() | now.keys()


def describe_changes(key: str, before: Any, after: Any) -> list[str]:
    """A line for each setting below `key` that differs."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = dict.fromkeys([*before, *after])
        return [
            line
            for name in names
            for line in describe_changes(f"{key}.{name}", before.get(name), after.get(name))
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for index, pair in pairs for line in describe_changes(f"{key}.{index}", *pair)]
    return [] if before == after else [f"{key} was {_shown(before)} and is now {_shown(after)}."]


def _shown(value: Any) -> str:
    """A setting's value; of a list of sections their number."""
    is_sections = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    return f"{len(value)} entries" if is_sections else repr(value)


def _lookup(raw: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw
