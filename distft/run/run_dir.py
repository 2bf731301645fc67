"""The run directory: writes config.yaml, starts the trackers, and logs the events of a start."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distft import storage
from distft.checkpoint.manifest import Progress
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.store import LatestValid
from distft.collectives import Collectives, all_or_none
from distft.config import dump_yaml
from distft.errors import ConfigError, StorageError
from distft.run.model import new_parameter_prefixes
from distft.run.paths import CONFIG_FILE, CONFIG_HEADER
from distft.run.resume import changed_settings
from distft.run.run_inputs import RunInputs
from distft.tracker import (
    EVENTS_FILE,
    LEDGER_EVENT,
    Trackers,
    build_trackers,
    last_logged_step,
    read_lines,
)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run's id and trackers."""

    run_id: str
    trackers: Trackers  # log nothing on ranks other than 0

    def announce_stop(self) -> None:
        """Tell that the run was asked to stop. Any thread may call this."""
        self.trackers.event(
            "stop_requested",
            next="saving after this step; a second Ctrl-C stops at once, without saving",
        )


def open_run_dir(
    inputs: RunInputs,
    latest: LatestValid,
    collectives: Collectives,
    device: torch.device,
    *,
    total_steps: int,
) -> RunRecord:
    """Create or reopen the run's directory for a start from `latest`. Called by all ranks together."""
    config, resumed = inputs.config, latest.checkpoint
    run_id = secrets.token_hex(4) if resumed is None else resumed.manifest.run_id
    run_id = collectives.broadcast(run_id)
    trackers = Trackers()
    last_world_size = None
    discarded_steps = 0  # logged by an earlier start after the commit from which this one resumes
    with all_or_none(collectives, ConfigError):
        if collectives.rank == 0:
            trackers = build_trackers(config.trackers, max_steps=total_steps)
    with all_or_none(collectives, StorageError):  # such as a full disk
        if collectives.rank == 0:
            run_dir = Path(config.run_dir)
            # That of the last start, not of the manifest: several starts may resume from one commit.
            last_world_size = _last_world_size(run_dir)
            discarded_steps = last_logged_step(run_dir) - (0 if resumed is None else resumed.step)
            settings = CONFIG_HEADER + dump_yaml(config, redacted=True)
            storage.commit_bytes(run_dir / CONFIG_FILE, settings.encode())
            trackers.start(
                run_id,
                config.model_dump(mode="json"),
                run_dir,
                resume_step=None if resumed is None else resumed.step,
            )
    for damage in latest.damage:
        trackers.event("damaged_checkpoint", reason=damage)
    trackers.event(
        "start" if resumed is None else "resume",
        step=0 if resumed is None else resumed.step,
        world_size=collectives.world_size,
        engine=config.engine.type,
        device=str(device),
        **({"discarded_steps": discarded_steps} if discarded_steps > 0 else {}),
        **_origin(inputs, latest),
    )
    for note in inputs.notes:
        trackers.event("note", note=note)
    if resumed is None:
        _describe_data(inputs, trackers)
    else:
        trackers.event(LEDGER_EVENT, step=resumed.step, **ledger_fields(resumed.manifest.progress))
        if last_world_size not in {None, collectives.world_size}:
            trackers.event("resize", before=last_world_size, after=collectives.world_size)
    return RunRecord(run_id, trackers)


def _describe_data(inputs: RunInputs, trackers: Trackers) -> None:
    """Log what labelled texts or completions are like, once: their labels, lengths, and what is cut."""
    for use, feed in (("training", inputs.train), ("validation", inputs.validation)):
        if feed is not None:
            for line in feed.summary.splitlines():
                trackers.event("data", use=use, summary=line)


def _last_world_size(run_dir: Path) -> int | None:
    """The number of ranks of the last start; None if no start is recorded."""
    starts = [
        event for event in read_lines(run_dir / EVENTS_FILE) if event.get("kind") in {"start", "resume"}
    ]
    return starts[-1].get("world_size") if starts else None


def ledger_fields(progress: Progress) -> dict[str, Any]:
    """Sequence-usage fields of the audit event."""
    return {
        "sequences_seen": progress.sequences_seen,
        "used": progress.used,
        "used_again": progress.used_again,
    }


def _origin(inputs: RunInputs, latest: LatestValid) -> dict[str, str]:
    """Event fields: the source of a new run's weights, or the settings that a resume changed."""
    if latest.checkpoint is None:
        return {} if inputs.init_from is None else _origin_in_checkpoint(inputs, inputs.init_from)
    changed = changed_settings(latest.checkpoint.manifest.config, inputs.config)
    return {"changed": ", ".join(changed)} if changed else {}


def _origin_in_checkpoint(inputs: RunInputs, init_from: CheckpointSource) -> dict[str, str]:
    """The checkpoint, the model's parameters that it does not give, and its own that the model lacks."""
    new_prefixes = new_parameter_prefixes(
        init_from, inputs.heads, inputs.label_names, inputs.config.objective
    )
    parameters = init_from.manifest.parameters
    new = [name for name in inputs.shapes if name.startswith(new_prefixes) or name not in parameters]
    unused = [name for name in parameters if name not in inputs.shapes and not parameters[name].is_buffer]
    fields = {
        "init_from": init_from.path,
        "new_parameters": _grouped(new),
        "unused_parameters": _grouped(unused),
    }
    return {name: text for name, text in fields.items() if text}


def _grouped(names: Sequence[str]) -> str:
    """Names of parameters, those of one head or block together: `generator.* (26), lm_head.weight`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        first, *rest = name.split(".")
        is_numbered = len(rest) > 1 and rest[0].isdecimal()  # such as blocks.3
        groups.setdefault(f"{first}.{rest[0]}" if is_numbered else first, []).append(name)
    return ", ".join(
        own[0] if len(own) == 1 else f"{group}.* ({len(own):,} parameters)" for group, own in groups.items()
    )
