"""Small commits of a trainable and a frozen parameter, written without an engine."""

from pathlib import Path

import torch

from distft import storage
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import Progress
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.steps import rank_file_name
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.tokenizer.files import SENTENCEPIECE_FILE as TOKENIZER_FILE

KEEP_ONE = CheckpointConfig(keep_last=1)
RANK_FILE = rank_file_name(0)


def snapshot(step: int, frozen: float = 0.0) -> CheckpointSnapshot:
    return CheckpointSnapshot(
        progress=Progress(step=step),
        fragments=[
            Fragment("moves", WEIGHT, 0, torch.tensor([float(step), 0.5])),
            Fragment("stays", WEIGHT, 0, torch.tensor([frozen])),
        ],
        parameters={"moves": ParameterInfo((2,), True, step), "stays": ParameterInfo((1,), False, 0)},
        metadata=RunMetadata(run_id="test", config={}, written_by={}),
        attachments={TOKENIZER_FILE: b"a model"},
    )


def new_start(root: Path | str) -> CheckpointStore:
    """A start that has claimed the run and resumes from its newest valid commit."""
    store = CheckpointStore(str(root), SingleProcess())
    store.become_writer()
    store.resume_from(store.find_latest_valid())
    return store


def saved(root: Path, *steps: int) -> CheckpointStore:
    store = new_start(root)
    for step in steps:
        store.save(snapshot(step))
    return store


def names(path: Path | str) -> set[str]:
    return set(storage.list_names(str(path)))


def frozen_directories(root: Path) -> set[str]:
    return {name for name in names(root) if name.startswith("frozen_")}


def put(directory: Path, *files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in files:
        (directory / name).write_bytes(b"of somebody")
    return directory
