"""Searches on real Ray: killed and stopped ones that go on, trials that fail, and a fork to more ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import yaml
from support.commands import call_python
from support.ports import free_port
from support.small_runs import events, logged, run
from support.two_nodes import two_nodes

from distft.checkpoint.committed import Checkpoint
from distft.cluster.tune.run_process import failure_reason
from distft.config import load_yaml
from distft.run.audit import audit_run
from distft.search.journal import JOURNAL_FILE, trials_of
from distft.search.journal_lines import FIRST_REPEAT
from distft.search.space import ChoiceConfig, LogUniformConfig, explored, random_point
from distft.search.status import read_status
from distft.topology import Topology
from distft.tracker import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
DIVERGES = 1.0e30  # as a learning rate


def configuration(run_dir: str, search: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "run_dir": run_dir,
        "device": "cpu",
        "model": {
            "type": "deep_averaging",
            "max_seq_len": 64,
            "d_model": 8,
            "num_layers": 1,
            "d_hidden": 16,
            "direction": "bidirectional",
            "tie_embeddings": False,
        },
        "tokenizer": "data/tokenizer.model",
        "data": {"type": "labelled", "path": "data/train.jsonl"},
        "validation": {"type": "split", "share": 0.25},
        "objective": {"type": "classification", "pooling": "mean"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 8, "seq_len": 64},
        "engine": {"type": "local", "compile": False},
        "optim": {"peak_lr": 0.01, "schedule": {"type": "constant"}},
        "train": {"max_steps": 400, "log_every_steps": 100, "max_skipped_in_a_row": 2},
        "evaluation": {"every_steps": 50},
        "checkpoint": {"every_steps": 50},
        "search": dict(search),
        **changes,
    }


@pytest.fixture
def start(project: Path, environment: Mapping[str, str]) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts `distft tune` in a session of its own, which is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start_search(raw: dict[str, Any], **variables: str) -> "subprocess.Popen[str]":
        (project / "search.yaml").write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "distft", "tune", "search.yaml"]
        process = subprocess.Popen(
            command,
            cwd=project,
            env={**environment, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_search
    for process in started:
        kill_all(process)


def kill_all(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to the driver, Ray's processes and the runs, as by a power cut."""
    if process.poll() is None:
        driver = psutil.Process(process.pid)
        for one in [*driver.children(recursive=True), driver]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    if process.stdout is not None and not process.stdout.closed:
        process.communicate()


def wait_until(process: "subprocess.Popen[str]", is_so: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 240
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


def journal(directory: Path) -> list[dict[str, Any]]:
    return read_lines(directory / JOURNAL_FILE)


def num_values(directory: Path, number: int) -> int:
    """How many values of a trial are told."""
    trial = trials_of(journal(directory)).get(number)
    return 0 if trial is None else len(trial.history())


def test_a_search_that_is_stopped_and_killed_ends_with_the_table_of_its_runs(
    project: Path, environment: Mapping[str, str], start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    rates = [0.01, DIVERGES, 0.05]
    search = {"space": {"optim.peak_lr": rates}, "sampler": {"type": "grid"}, "max_concurrent": 1}
    raw = configuration("runs/killed", search)
    directory = project / "runs/killed"

    process = start(raw)  # Ctrl-C in its first trial
    wait_until(process, lambda: num_values(directory, 0) > 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert "the same command goes on" in output
    saved = events(directory / "trials/00000")[-1]
    assert saved["status"] == "preempted"

    process = start(raw)  # killed, with all of its processes, in the third one
    wait_until(process, lambda: num_values(directory, 2) > 1)
    kill_all(process)
    assert list(directory.glob(".ray_*")), "Ray Tune's files are left"
    assert "1 waiting of 3 trials; stopped: the same `distft tune`" in read_status(directory).summary
    with (directory / JOURNAL_FILE).open("a") as file:
        file.write('\n{"kind": "trial", "number": 1000000000, "values": {}}\n')

    process = start(raw)
    output = process.communicate(timeout=240)[0]
    assert "lines are damaged and left out" in output or "line is damaged and left out" in output
    assert list(directory.glob(".ray_*")) == []
    assert process.returncode == 0, output
    assert "trial 1 failed: Steps" in output

    trials = json.loads((directory / "search.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["completed", "completed", "failed"]
    assert "gradients that are not finite" in trials[2]["reason"]
    by_number = {trial["number"]: trial for trial in trials}
    for number in (0, 2):
        _require_values_of_a_plain_run(project, directory, by_number[number])
    starts = [line["number"] for line in journal(directory) if line["kind"] == "start"]
    assert starts.count(1) == 1  # what has ended is not run again
    assert load_yaml(directory / "best.yaml")["optim"]["peak_lr"] == trials[0]["values"]["optim.peak_lr"]
    assert "report.html" in output
    assert (directory / "report.html").stat().st_size > 100_000

    _require_that_it_is_over(project, environment, directory, trials)


def test_a_trial_whose_node_is_lost_goes_on_elsewhere_and_no_value_counts_twice(
    project: Path, environment: Mapping[str, str], start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    search = {"space": {"optim.peak_lr": [0.01, 0.05]}, "sampler": {"type": "grid"}}
    train = {"max_steps": 1600, "log_every_steps": 200}
    raw = configuration("runs/lost", search, train=train)
    directory = project / "runs/lost"
    with two_nodes(environment, free_port()) as (address, kill_second_node):
        process = start(raw, RAY_ADDRESS=address)
        wait_until(process, lambda: min(num_values(directory, number) for number in (0, 1)) > 2)
        assert max(num_values(directory, number) for number in (0, 1)) < 30, "both trials are still running"
        kill_second_node()
        output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    starts = [line["number"] for line in journal(directory) if line["kind"] == "start"]
    assert sorted(starts) in ([0, 0, 1], [0, 1, 1])
    for trial in json.loads((directory / "search.json").read_text())["trials"]:
        _require_values_of_a_plain_run(project, directory, trial, last_step=1600)


def test_hyperband_pauses_trials_and_goes_on_with_the_better_ones(
    project: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    # Four evaluations a trial: brackets of three whole trials, and of three of which one goes on after two.
    rates = [0.02, 0.03, 0.04, 1e-6, 1e-5, 0.05]
    search = {
        "space": {"optim.peak_lr": rates},
        "sampler": {"type": "grid"},
        "scheduler": {"type": "hyperband", "reduction_factor": 2},
        "repeat_best": {"count": 1, "seeds": [5]},
    }
    directory = project / "runs/paused"
    train = {"max_steps": 200, "log_every_steps": 50}
    process = start(configuration("runs/paused", search, train=train))
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    trials = {t["number"]: t for t in json.loads((directory / "search.json").read_text())["trials"]}
    states = [trials[number]["state"] for number in range(len(rates))]
    assert states == ["completed", "completed", "completed", "stopped", "completed", "completed"]
    assert trials[3]["step"] == 100
    starts = [line["number"] for line in journal(directory) if line["kind"] == "start"]
    assert starts.count(4) + starts.count(5) > 2, "at least one was paused, and went on from its checkpoint"
    for number in (3, 4):
        assert audit_run(str(directory / f"trials/{number:05d}"))[0].is_exact
    for number, trial in trials.items():
        steps = [step for step, _ in trial["history"]]
        assert steps == [50, 100, 150, 200][: trial["step"] // 50], number
    best = max(trials.values(), key=lambda trial: trial["num_runs"])
    assert best["num_runs"] == 2
    again = logged(directory / f"trials/{FIRST_REPEAT + best['number']:07d}/seed_5", "validation/accuracy")
    assert best["metric"] == pytest.approx((best["history"][-1][1] + again[200]) / 2)


def _require_that_it_is_over(
    project: Path, environment: Mapping[str, str], directory: Path, trials: list[dict[str, Any]]
) -> None:
    """The same command changes nothing, the status tells the table, and other settings are refused."""
    again = call_python("-m", "distft", "tune", "search.yaml", env=environment, cwd=project)
    assert again.returncode == 0, again.stderr
    assert "All trials of this search have ended" in again.stdout
    assert json.loads((directory / "search.json").read_text())["trials"] == trials
    status = call_python("-m", "distft", "tune", "status", "runs/killed", env=environment, cwd=project)
    assert "2 completed, 1 failed of 3 trials" in status.stdout
    changed = call_python(
        "-m",
        "distft",
        "tune",
        "search.yaml",
        "search.mode=min",
        "batch.seq_len=32",
        env=environment,
        cwd=project,
    )
    assert changed.returncode == 2
    assert "search.mode was 'auto' and is now 'min'" in changed.stderr
    assert "batch.seq_len was 64 and is now 32" in changed.stderr


def _require_values_of_a_plain_run(
    project: Path, directory: Path, found: Mapping[str, Any], last_step: int = 400
) -> None:
    """The trial has the values that its settings give when they are trained at once, in one process."""
    number = found["number"]
    settings = load_yaml(directory / f"trials/{number:05d}/trial.yaml")
    plain = {**settings, "run_dir": str(directory / f"plain_{number}")}
    for key in ("tokenizer", "data"):
        plain[key] = _absolute(project, plain[key])
    run(Topology(), plain)
    expected = logged(directory / f"plain_{number}", "validation/accuracy")
    assert found["history"] == [[step, value] for step, value in expected.items()]
    assert found["step"] == last_step
    assert audit_run(str(directory / f"trials/{number:05d}"))[0].is_exact


def _absolute(project: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(project, item) if key == "path" else item for key, item in value.items()}
    return str(project / value)


def population_seeds(space: Mapping[str, Any]) -> tuple[int, int]:
    """Seeds by which two trials begin on one rank, and whichever forks first does so to two ranks."""
    first = next(s for s in range(999) if all(random_point(space, s, n)["ranks"] == 1 for n in (0, 1)))
    values = random_point(space, first, 0)

    def is_good(seed: int) -> bool:
        forks = [explored(values, space, 0.0, Random(f"{seed} {number} 1")) for number in (0, 1)]
        return all(fork["ranks"] == 2 for fork in forks)

    return first, next(seed for seed in range(999) if is_good(seed))


def test_a_population_forks_from_one_rank_to_two(project: Path, environment: Mapping[str, str]) -> None:
    space = {
        "optim.peak_lr": LogUniformConfig(low=1e-3, high=0.1),
        "ranks": ChoiceConfig(values=[1, 2]),
    }
    sampler_seed, population_seed = population_seeds(space)
    raw = configuration(
        "runs/population",
        {
            "space": {key: one.model_dump() for key, one in space.items()},
            "sampler": {"type": "random", "seed": sampler_seed},
            "num_trials": 2,
            "scheduler": {
                "type": "population",
                "interval_steps": 20,
                "quantile": 0.5,
                "resample_probability": 0.0,
                "seed": population_seed,
                "synchronous": True,
            },
        },
        engine={"type": "zero", "zero_stage": 1, "compile": False},
        train={"max_steps": 40, "log_every_steps": 10},
        evaluation={"every_steps": 20},
    )
    (project / "population.yaml").write_text(yaml.safe_dump(raw))
    done = call_python("-m", "distft", "tune", "population.yaml", env=environment, cwd=project, timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = project / "runs/population"
    forks = [line for line in journal(directory) if line["kind"] == "fork"]
    assert forks, done.stdout
    fork = forks[0]
    run_dir = directory / f"trials/{fork['number']:05d}/fork_0001"
    told = events(run_dir)
    resumed = next(event for event in told if event["kind"] == "resume")
    assert resumed["world_size"] == 2
    assert resumed["changed"] == "optim.peak_lr"
    step = resumed["step"]
    name = f"checkpoints/step_{step:08d}"
    parent = Checkpoint.open(str(directory / f"trials/{fork['parent']:05d}" / name))
    first = Checkpoint.open(str(run_dir / name))
    assert first.manifest.parameters == parent.manifest.parameters  # the same bytes, by their fingerprints
    assert first.manifest.progress == parent.manifest.progress
    assert first.manifest.run_id != parent.manifest.run_id
    assert first.find_damage() == []
    last = Checkpoint.open(str(run_dir / "checkpoints/step_00000040"))
    assert len([file for file in last.manifest.files if file.name.startswith("rank_")]) == 2
    audit = audit_run(str(run_dir))[0]
    assert (audit.is_exact, audit.num_lost_steps, audit.world_sizes) == (True, 0, (2,))
    trials = json.loads((directory / "search.json").read_text())["trials"]
    assert {trial["state"] for trial in trials} == {"completed"}


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("step 1 | loss 2\nconfig error: a is wrong: b.\n", "a is wrong: b."),
        ("rank 1: training error: a hang\nTraceback (most recent call last):\n  x\n", "a hang"),
        ("Traceback:\n  File x\nValueError: no\n", "ValueError: no"),
        ("Killed\n", "Killed"),
        ("", ""),
    ],
)
def test_the_reason_of_a_failure_is_the_last_error_of_the_log(log: str, reason: str) -> None:
    assert failure_reason(log) == reason
