"""Two starts of one run overlap: no order of their file operations loses a commit or mixes two."""

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.faulty_disk import FaultyDisk, temporary_files_in
from support.s3_server import S3Server

from distft import storage
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import MANIFEST, Progress
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.steps import committed_steps
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.errors import SupersededError
from distft.storage.local import LocalStorage, LocalWriter

KEEP_ONE = CheckpointConfig(keep_last=1)
LAST_STEP = 4  # of the new start
_STRIDE = 31  # of the places that are tried; 1 tries all of 8,000, in ten minutes
_READS = ("list_names", "exists", "version", "size", "open_read")


def snapshot(step: int, writer: int) -> CheckpointSnapshot:
    """State of a trainable and a frozen parameter, which tells the step and who wrote it."""
    return CheckpointSnapshot(
        progress=Progress(step=step),
        fragments=[
            Fragment("moves", WEIGHT, 0, torch.tensor([float(step), float(writer)])),
            Fragment("stays", WEIGHT, 0, torch.tensor([float(writer)])),
        ],
        parameters={"moves": ParameterInfo((2,), True, step), "stays": ParameterInfo((1,), False, 0)},
        metadata=RunMetadata(run_id="test", config={}, written_by={}),
        attachments={"tokenizer.model": b"of writer %d" % writer},
    )


@dataclass
class Start:
    """One start of the run: its saves and prunings, and what came of them."""

    root: str
    writer: int
    is_newest: bool = True
    store: CheckpointStore = field(init=False)
    committed: dict[int, dict[str, bytes]] = field(default_factory=dict)  # step -> path -> content
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.store = CheckpointStore(self.root, SingleProcess())

    def claim(self) -> int:
        """As `distft.run.resume.claim_run`: the step that it resumes from."""
        found = self.store.find_latest_valid()
        self.store.become_writer()
        while not self.store.is_still_latest(found):
            found = self.store.find_latest_valid()
        self.store.resume_from(found)
        assert found.checkpoint is not None
        assert found.damage == []
        return found.checkpoint.step

    def save_from(self, step: int, last_step: int = LAST_STEP) -> None:
        while step < last_step:
            step += 1
            path = self.store.save(snapshot(step, self.writer))
            if self.is_newest:
                self.committed[step] = {name: storage.read_bytes(name) for name in needed_files(path)}
            for pruned in self.store.prune(KEEP_ONE):
                self.committed.pop(pruned, None)


@dataclass
class _Actor:
    thread: threading.Thread
    may_go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    num_operations: int = 0


class Stage:
    """Runs functions as threads of which one at a time does one file operation, in a chosen order."""

    def __init__(self, root: Path, works: Sequence[Callable[[], None]]) -> None:
        self._root = str(root)
        self._actors = [_Actor(threading.Thread(target=self._run, args=(i, w))) for i, w in enumerate(works)]
        self._disk = FaultyDisk(root)
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Stage":
        record = self._disk.record

        def wait_and_record(kind: str, path: str, **options: Any) -> bool:
            if path.startswith(self._root) and kind != "fsync":
                self._gate()
            return record(kind, path, **options)

        self._patch.setattr(self._disk, "record", wait_and_record)
        for name in _READS:
            self._patch.setattr(LocalStorage, name, self._gated(getattr(LocalStorage, name)))
        self._disk.__enter__()
        for actor in self._actors:
            actor.thread.start()
            actor.waits.acquire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number in range(len(self._actors)):
            self.finish(number)
        self._disk.__exit__()
        self._patch.undo()

    def advance(self, number: int, num_operations: int = 1) -> bool:
        """Let an actor do its next operations; returns whether it has more."""
        actor = self._actors[number]
        for _ in range(num_operations):
            if not actor.thread.is_alive():
                return False
            actor.may_go.release()
            actor.waits.acquire()
            if actor.thread.is_alive() and actor.num_operations < 0:
                actor.thread.join()
        return actor.thread.is_alive()

    def finish(self, number: int) -> int:
        """Let an actor go on to its end; returns how many operations it has done in all."""
        while self.advance(number):
            pass
        return -self._actors[number].num_operations

    def _run(self, number: int, work: Callable[[], None]) -> None:
        actor = self._actors[number]
        threading.current_thread().__dict__["actor"] = actor
        self._gate()
        try:
            work()
        finally:
            actor.num_operations *= -1  # the end
            actor.waits.release()

    def _gate(self) -> None:
        actor = threading.current_thread().__dict__.get("actor")
        if actor is not None:  # not in a helper thread of an actor
            actor.num_operations += 1
            actor.waits.release()
            actor.may_go.acquire()

    def _gated(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def read(storage: LocalStorage, path: str) -> Any:
            self._gate()
            return real(storage, path)

        return read


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # noqa: ARG005


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that an earlier start has saved at step 1, and at step 2 with other frozen weights."""
    root = tmp_path_factory.mktemp("prepared")
    for writer in (1, 2):
        start = Start(str(root), writer)
        start.store.become_writer()
        start.store.save(snapshot(writer, writer))
    return root


def overlap(prepared: Path, root: Path) -> tuple[Start, Start, Stage]:
    """An old start that is about to save step 3, and a new start of the same run."""
    shutil.copytree(prepared, root)
    old, new = Start(str(root), 8, is_newest=False), Start(str(root), 9)

    def run_old() -> None:
        try:
            old.save_from(2, 3)
        except Exception as error:
            old.error = error

    def run_new() -> None:
        try:
            new.save_from(new.claim())
        except Exception as error:
            new.error = error

    old.claim()
    return old, new, Stage(root, [run_old, run_new])


def assert_nothing_is_lost(new: Start, order: str) -> None:
    assert new.error is None, order
    found = CheckpointStore(new.root, SingleProcess()).find_latest_valid()
    assert found.damage == [], order
    assert found.checkpoint is not None, order
    assert found.checkpoint.step == LAST_STEP, order
    for step in committed_steps(new.root):
        checkpoint = Checkpoint.open(new.store.path(step))
        assert checkpoint.find_damage() == [], order
        writer = checkpoint.read("moves", WEIGHT, 1, 2).item()
        assert checkpoint.read("moves", WEIGHT, 0, 1).item() == step, order
        assert checkpoint.read("stays", WEIGHT, 0, 1).item() == writer, order
        tokenizer = storage.read_bytes(storage.join(checkpoint.path, "tokenizer.model"))
        assert tokenizer == b"of writer %d" % writer, order
    assert_commits_are_unchanged(new, order)


def assert_commits_are_unchanged(new: Start, order: str) -> None:
    for files in new.committed.values():
        for name, content in files.items():
            assert storage.read_bytes(name) == content, order


def needed_files(commit: str) -> list[str]:
    checkpoint = Checkpoint.open(commit)
    beside = [storage.join(commit, name) for name in (MANIFEST, "tokenizer.model")]
    return beside + [checkpoint.file_path(number) for number in range(len(checkpoint.manifest.files))]


@pytest.fixture(scope="module")
def num_operations(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """Of the old start alone, and of the new start behind it."""
    _, _, stage = overlap(prepared, tmp_path_factory.mktemp("alone") / "run")
    with stage:
        stage.advance(1, 1)
        new = stage.finish(1)
    _, _, stage = overlap(prepared, tmp_path_factory.mktemp("alone") / "run")
    with stage:
        old = stage.finish(0)
    return old, new


def test_the_new_start_loses_nothing_wherever_the_old_one_was_suspended_and_goes_on(
    prepared: Path, tmp_path: Path, num_operations: tuple[int, int]
) -> None:
    """The old start stops before any operation, and goes on to its end before any of the new one."""
    num_old, num_new = num_operations
    assert min(num_operations) > 20
    for suspended in range(num_old):
        for resumed in range(suspended % _STRIDE, num_new + 1, _STRIDE):
            root = tmp_path / "run"
            old, new, stage = overlap(prepared, root)
            with stage:
                stage.advance(0, suspended)
                stage.advance(1, resumed)
                stage.finish(0)
                stage.finish(1)
            order = f"old stops at {suspended}, goes on at {resumed} of the new"
            assert_nothing_is_lost(new, order)
            assert old.error is None or isinstance(old.error, SupersededError), order
            assert not temporary_files_in(root)
            shutil.rmtree(root)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 15)), max_size=60))
def test_no_order_of_operations_loses_a_commit(
    prepared: Path, tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, int]]
) -> None:
    old, new, stage = overlap(prepared, tmp_path_factory.mktemp("order") / "run")
    with stage:
        for actor, number in turns:
            stage.advance(actor, number)
        stage.finish(0)
    assert_nothing_is_lost(new, str(turns))
    assert old.error is None or isinstance(old.error, SupersededError), turns


@pytest.mark.parametrize("stops_at", [3, LAST_STEP])
def test_an_old_start_that_is_suspended_right_before_it_renames_its_manifest_commits_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    """After every look that it takes. The new start saves the same step, or has deleted it by then."""
    root = tmp_path / "run"
    shutil.copytree(prepared, root)
    old, new = Start(str(root), 8, is_newest=False), Start(str(root), 9)
    old.claim()
    publish, manifest = LocalWriter.publish, root / "step_00000003" / MANIFEST
    has_begun = False

    def wait_and_publish(writer: LocalWriter) -> None:
        nonlocal has_begun
        if writer.path == manifest and not has_begun:
            has_begun = True
            new.save_from(new.claim(), stops_at)
        publish(writer)

    monkeypatch.setattr(LocalWriter, "publish", wait_and_publish)
    with pytest.raises(SupersededError):
        old.save_from(2, 3)
    assert_commits_are_unchanged(new, "old goes on")
    new.save_from(stops_at)
    assert_nothing_is_lost(new, "old goes on last")
    assert committed_steps(str(root)) == [LAST_STEP]


@pytest.mark.parametrize(
    ("look", "is_overtaken"),
    [
        pytest.param(0, True, id="before it writes"),
        pytest.param(2, True, id="before its manifest"),
        pytest.param(2, False, id="before its manifest, the new start being slow"),
        pytest.param(4, True, id="before it deletes"),
    ],
)
def test_on_s3_an_old_start_that_goes_on_after_a_look_at_the_claim_overwrites_and_deletes_nothing(
    s3: S3Server, look: int, is_overtaken: bool
) -> None:
    """The new start runs right after a look; the old one goes on behind all of it, or behind its claim."""
    root = f"{s3.make_bucket()}/run"
    for writer in (1, 2):
        start = Start(root, writer)
        start.store.become_writer()
        start.store.save(snapshot(writer, writer))
    old, new = Start(root, 8, is_newest=False), Start(root, 9)
    old.claim()
    check, num_looks, resumed_from = old.store._fence.check, 0, -1

    def look_and_wait() -> None:
        nonlocal num_looks, resumed_from
        check()
        num_looks += 1
        if num_looks == look + 1:
            resumed_from = new.claim()
            if is_overtaken:
                new.save_from(resumed_from)

    old.store._fence.check = look_and_wait  # type: ignore[method-assign]
    with pytest.raises(SupersededError):
        old.save_from(2, 3)
    if not is_overtaken:
        new.save_from(resumed_from)
    assert new.committed.keys() == {LAST_STEP}
    assert new.store.valid_steps() == [LAST_STEP]
    new.store.prune(KEEP_ONE)  # the old start may have committed a step that the new one had deleted
    assert committed_steps(root) == [LAST_STEP]
    assert_nothing_is_lost(new, f"new runs after look {look} of the old start at the claim")
