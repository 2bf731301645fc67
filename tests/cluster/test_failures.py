"""Of several ranks that fail together, the cause is found, and its error message kept."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RaySystemError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckTimeoutError

from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.steps import step_name
from distft.cluster.driver.failures import FailureCallback, explain, root_cause
from distft.errors import (
    ConfigError,
    DataError,
    DistftError,
    DivergedError,
    LaunchError,
    Preempted,
    Resized,
    StorageError,
    SupersededError,
    TrainingError,
)
from distft.tracker import EVENTS_FILE, HANG_EVENT, METRICS_FILE, EventLog, read_lines

LOST_PEER = TrainingError("RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:3711")
HANG_REPORT = TrainingError("rank 1 (node4, pid 12) has not answered for 12 s, in step 7, forward")
BY_DISTANCE = [
    DataError("a bad row"),
    HANG_REPORT,
    ActorDiedError(),
    TrainingError("ValueError: a bug"),
    LOST_PEER,
]


@pytest.mark.parametrize("order", list(permutations(range(5))))
def test_the_cause_is_found_whatever_its_rank(order: tuple[int, ...]) -> None:
    for first in range(5):
        errors = {rank: BY_DISTANCE[index] for rank, index in enumerate(order) if index >= first}
        assert root_cause(errors).error is BY_DISTANCE[first]


@pytest.mark.parametrize(
    ("error", "expected", "is_retryable"),
    [
        (DataError("a bad row"), DataError("a bad row"), False),
        (ConfigError("a bad key"), ConfigError("a bad key"), False),
        (Preempted("stopped"), Preempted("stopped"), False),
        (DivergedError("no finite gradient"), DivergedError("no finite gradient"), False),
        (TrainingError("no finite loss"), TrainingError("rank 3: no finite loss"), True),
        (TrainingError("rank 1: no finite loss"), TrainingError("rank 1: no finite loss"), True),
        (KeyError("x"), TrainingError("rank 3: KeyError: 'x'"), True),
        (
            WorkerHealthCheckTimeoutError("several lines\nof text"),
            LaunchError("rank 3 does not answer Ray: its process is stopped, or hangs in native code."),
            True,
        ),
        (SupersededError("another start"), SupersededError("another start"), False),
        (StorageError("no space left"), StorageError("rank 3: no space left"), True),
    ],
)
def test_a_failure_keeps_its_class_and_names_its_rank_unless_every_rank_would_raise_it(
    error: Exception, expected: DistftError, is_retryable: bool
) -> None:
    failure = root_cause({3: error})
    assert (type(failure.as_distft_error()), str(failure.as_distft_error())) == (
        type(expected),
        str(expected),
    )
    assert failure.is_retryable is is_retryable


def test_the_death_of_a_worker_is_described_in_one_line() -> None:
    message = str(explain(WorkerGroupError("several lines\nof text", {2: ActorDiedError()}), "2 workers"))
    assert message.startswith("rank 2 died")
    assert "\n" not in message
    assert "memory" in str(root_cause({0: OutOfMemoryError("several lines\nof text")}).as_distft_error())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RaySystemError("several lines\nof text"), "rank 2 died: System error: several lines"),
        (RaySystemError("ip: ::1 pid: 7"), "rank 2 died (node ::1, pid 7): System error: ip: ::1 pid: 7"),
        (RayError(), "rank 2 died: RayError"),
    ],
)
def test_a_death_of_another_kind_is_told_by_the_process_and_the_first_line_of_rays_message(
    error: RayError, expected: str
) -> None:
    assert str(root_cause({2: error}).as_distft_error()) == expected


def test_a_distft_error_comes_out_of_the_controller_unchanged() -> None:
    error = DataError("a bad row")
    assert explain(ControllerError(ControllerError(error)), "2 workers") is error


def test_rays_message_about_another_process_is_cut_to_the_error() -> None:
    error = ControllerError(
        RuntimeError("ray::Worker.run\n  File x\nModuleNotFoundError: No module named 'a'")
    )
    explained = explain(error, "2 workers")
    assert isinstance(explained, LaunchError)
    message = "Ray could not run 2 workers: RuntimeError: ModuleNotFoundError: No module named 'a'"
    assert str(explained) == message
    assert str(explain(ControllerError(RuntimeError()), "2 workers")).endswith(" 2 workers: RuntimeError: ")


def test_a_cluster_without_room_for_the_workers_is_told_with_remedies() -> None:
    explained = explain(ControllerError(WorkerGroupStartupTimeoutError(2)), "2 workers")
    assert isinstance(explained, LaunchError)
    assert str(explained) == (
        "The cluster had no free resources for 2 workers within cluster.start_timeout_s: request less, add "
        "nodes, or raise it."
    )


class FakeMailbox:
    """Records the text that a FailureCallback writes to the driver."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.write = self.workers_ended = self

    def remote(self, *arguments: str) -> None:
        assert arguments[:1] in ((), ("stderr",))
        self.written += arguments[1:]


def test_a_logged_hang_is_the_cause_whichever_rank_ray_saw_die(tmp_path: Path) -> None:
    """But not a hang before the last start of the workers."""
    about = {"reason": "silent", "step": 7, "phase": "forward", "silent_s": 12.0, "unmoved_s": 12.0}
    log = EventLog(tmp_path)
    log.write("start", step=0)
    log.write(HANG_EVENT, rank=1, host="node4", pid=12, stack=["loop.py:173 _run_step"], **about)
    log.close()
    mailbox = FakeMailbox()
    callback = FailureCallback(
        mailbox, max_failures=3, run_dir=str(tmp_path), checkpoints=str(tmp_path / "none")
    )
    callback.after_exception(None, {0: ActorDiedError()})
    assert "rank 1 (node4, pid 12) has not answered for 12.0 s, in step 7, forward" in mailbox.written[0]
    assert "loop.py:173 _run_step" in mailbox.written[0]
    log = EventLog(tmp_path)
    log.write("resume", step=5)
    log.close()
    callback.after_exception(None, {0: ActorDiedError()})
    first, second = (event for event in read_lines(tmp_path / EVENTS_FILE) if event["kind"] == "fault")
    assert (first["rank"], first["reason"].endswith("in step 7, forward")) == (1, True)
    assert (second["rank"], "died" in second["reason"]) == (0, True)


@pytest.mark.parametrize("kind", ["start", "resume", None])
def test_of_the_hangs_since_the_last_start_the_first_is_the_cause_and_all_are_told(
    tmp_path: Path, kind: str | None
) -> None:
    about = {"reason": "silent", "step": 7, "phase": "forward", "silent_s": 12.0, "host": "node4", "pid": 12}
    log = EventLog(tmp_path)
    if kind is not None:
        log.write(HANG_EVENT, rank=0, stack=["of an earlier start"], **about)
        log.write(kind, step=0)
    for rank in (3, 2):
        log.write(HANG_EVENT, rank=rank, stack=[], **about)
    log.close()
    mailbox, checkpoints = FakeMailbox(), str(tmp_path / "none")
    callback = FailureCallback(mailbox, max_failures=3, run_dir=str(tmp_path), checkpoints=checkpoints)
    callback.after_exception(None, {0: ActorDiedError()})
    fault = read_lines(tmp_path / EVENTS_FILE)[-1]
    assert (fault["kind"], fault["rank"]) == ("fault", 3)
    told = mailbox.written[0].splitlines()
    assert [line.partition(" (")[0] for line in told[:2]] == ["rank 3", "rank 2"]
    assert told[2:] == ["Starting the workers again (1 of 3)."]


class Restarts:
    """A FailureCallback, what it told the driver, and the events that it logged."""

    def __init__(self, folder: Path, max_failures: int = 2) -> None:
        self.run_dir, self.checkpoints, self.mailbox = folder / "run", folder / "checkpoints", FakeMailbox()
        self.callback = FailureCallback(
            self.mailbox,
            max_failures=max_failures,
            run_dir=str(self.run_dir),
            checkpoints=str(self.checkpoints),
        )

    def fail(self, **errors: Exception) -> None:
        self.callback.after_exception(None, {int(rank[1:]): error for rank, error in errors.items()})

    def commit(self, step: int) -> None:
        (self.checkpoints / step_name(step)).mkdir(parents=True)
        (self.checkpoints / step_name(step) / MANIFEST).touch()

    def events(self) -> list[tuple[Any, ...]]:
        keys = ("kind", "step", "rank", "attempt", "reason")
        return [tuple(event.get(key) for key in keys) for event in read_lines(self.run_dir / EVENTS_FILE)]


def test_workers_start_again_until_max_failures_in_a_row_brought_no_new_checkpoint(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    restarts.run_dir.mkdir()
    (restarts.run_dir / METRICS_FILE).write_text('{"step": 4}\n{"step": 6}\n')
    lost = TrainingError("no memory\nand more lines")
    for commit, attempt in ((None, 1), (3, 1), (None, 2), (5, 1), (5, 2)):
        if commit is not None and not (restarts.checkpoints / step_name(commit)).exists():
            restarts.commit(commit)
        restarts.fail(r1=lost)
        assert restarts.mailbox.written[-1] == (
            f"rank 1: no memory\nand more lines\nStarting the workers again ({attempt} of 2).\n"
        )
        assert restarts.events()[-1] == ("fault", 6, 1, attempt, "rank 1: no memory")
    with pytest.raises(TrainingError, match="rank 1: no memory\nand more lines"):
        restarts.fail(r1=lost)
    assert [event[3] for event in restarts.events()] == [1, 1, 2, 1, 2, 3]
    assert len(restarts.mailbox.written) == 5


def test_the_first_step_of_a_run_is_progress(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    for commit in (0, 1):
        restarts.fail(r0=TrainingError("lost"))
        restarts.commit(commit)
    restarts.fail(r0=TrainingError("lost"))
    assert [event[3] for event in restarts.events()] == [1, 1, 1]


def test_an_error_that_new_workers_would_meet_again_ends_the_run_at_once(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    with pytest.raises(DataError, match=r"^a bad row$"):
        restarts.fail(r0=LOST_PEER, r1=DataError("a bad row"))
    assert restarts.mailbox.written == []
    assert restarts.events() == []


def test_a_change_of_the_number_of_ranks_is_no_failure(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path, max_failures=1)
    for _ in range(3):
        restarts.fail(r0=LOST_PEER, r2=Resized("continues with 3 workers"))
    assert restarts.mailbox.written == ["rank 2: continues with 3 workers\n"] * 3
    assert restarts.events() == [("restart", 0, None, None, "rank 2: continues with 3 workers")] * 3


def test_a_run_directory_that_cannot_be_written_stops_no_restart(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    restarts.run_dir.touch()
    restarts.fail(r0=TrainingError("lost"))
    told, restart = restarts.mailbox.written
    assert str(restarts.run_dir) in told
    assert restart == "rank 0: lost\nStarting the workers again (1 of 2).\n"
