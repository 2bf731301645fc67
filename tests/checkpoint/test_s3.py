"""Checkpoints on an S3 server: runs, the tools, and failed requests."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_cli import FROZEN, cli
from support.engine_scenarios import Scenario, Training, collectives_for, run_alone
from support.rank_pool import run_ranks
from support.s3_server import Request, S3Server
from support.small_runs import events, logged, make_text_data, pretraining, run, run_until_power_cut

from distft import storage
from distft.checkpoint.background import CheckpointSaver
from distft.checkpoint.committed import Checkpoint, find_checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.steps import committed_steps
from distft.checkpoint.store import CheckpointStore
from distft.checkpoint.target import UNFINISHED_MARKER
from distft.checkpoint.writer_fence import WRITER_FILE
from distft.collectives import SingleProcess
from distft.errors import DistftError, StorageError, UnreachableError
from distft.topology import Topology


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.make_bucket()


def _uploads_of(name: str) -> Any:
    return lambda request: request.method == "PUT" and name in request.path


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run without failures that saves on the local disk."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    run(Topology(), pretraining(data, run_dir))
    return logged(run_dir)


def _on_s3(data: Path, run_dir: Path, bucket: str, **engine: Any) -> dict[str, Any]:
    checkpoint = {"every_steps": 4, "keep_last": 2, "directory": f"{bucket}/runs/a"}
    return pretraining(data, run_dir, checkpoint=checkpoint, engine=engine or {"type": "local"})


def _run_and_return_error(topology: Topology, raw: dict[str, Any]) -> str:
    try:
        run(topology, raw)
    except DistftError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.ranks
def test_a_run_on_s3_resumes_at_another_world_size_and_keeps_its_last_commits(
    data: Path, tmp_path: Path, s3: S3Server, bucket: str, uninterrupted: dict[int, float]
) -> None:
    """Two ranks train until their second save fails, then one rank to the end."""
    with s3.failing(_uploads_of("step_00000008/rank_00001")):
        messages = run_ranks(
            _run_and_return_error,
            2,
            _on_s3(data, tmp_path, bucket, type="zero", zero_stage=2),
            env={**s3.environment, "AWS_MAX_ATTEMPTS": "2"},
        )
    for message in messages:
        assert message.startswith("UnreachableError: ")
        assert f"{bucket}/runs/a/step_00000008/rank_00001_" in message
        assert ".safetensors: writing failed" in message
        assert "Check the network" in message
    assert committed_steps(f"{bucket}/runs/a") == [4]
    assert len(Checkpoint.open(f"{bucket}/runs/a/step_00000004").manifest.files) == 2
    run(Topology(), _on_s3(data, tmp_path, bucket))
    assert logged(tmp_path) == pytest.approx(uninterrupted, abs=1e-5)
    assert [event["step"] for event in events(tmp_path) if event["kind"] == "resume"] == [4]
    kept = {f"runs/a/step_{step:08d}" for step in (8, 12)}
    keys = set(s3.keys(bucket)) - {f"runs/a/{WRITER_FILE}"}
    assert {key.rpartition("/")[0] for key in keys} == kept
    assert {re.sub(r"_\w{8}\.", ".", key.rpartition("/")[2]) for key in keys} == {
        "manifest.json",
        "rank_00000.safetensors",
        *([] if find_checkpoint(f"{bucket}/runs/a").manifest.tokenizer is None else ["tokenizer.model"]),
    }
    assert find_checkpoint(f"{bucket}/runs/a").step == 12


@pytest.mark.ranks
def test_two_ranks_resume_from_the_s3_checkpoint_of_one_process(
    data: Path, tmp_path: Path, s3: S3Server, bucket: str, uninterrupted: dict[int, float]
) -> None:
    run_until_power_cut(_on_s3(data, tmp_path, bucket), 9)
    assert committed_steps(f"{bucket}/runs/a") == [4, 8]
    raw = _on_s3(data, tmp_path, bucket, type="zero", zero_stage=3)
    assert run_ranks(_run_and_return_error, 2, raw, env=s3.environment) == ["", ""]
    assert logged(tmp_path) == pytest.approx(uninterrupted, abs=1e-5)
    assert committed_steps(f"{bucket}/runs/a") == [8, 12]


def _search_and_prune(topology: Topology, missing: str, root: str) -> list[str]:
    """The messages of a rank after a failed search and a failed pruning, both of which run on rank 0."""
    collectives = collectives_for(Scenario(stage=1), topology)
    messages = []
    try:
        CheckpointStore(missing, collectives).find_latest_valid()
    except UnreachableError as error:
        messages.append(str(error))
    try:
        CheckpointStore(root, collectives).prune(CheckpointConfig(keep_last=1))
    except UnreachableError as error:
        messages.append(str(error))
    return messages


@pytest.mark.ranks
def test_a_failed_request_of_one_rank_raises_on_all_ranks(s3: S3Server, bucket: str) -> None:
    store = CheckpointStore(f"{bucket}/run", SingleProcess())
    training = run_alone(Scenario(), 0)
    for step in (1, 2):
        training.run(step)
        store.save(training.take_snapshot())
    with s3.failing(lambda r: r.method == "DELETE", status=403, code="AccessDenied"):
        messages = run_ranks(_search_and_prune, 2, "s3://misspelt-bucket/run", store.root, env=s3.environment)
    for search_error, prune_error in messages:
        assert "no such bucket" in search_error
        assert "manifest.json: removing failed" in prune_error


def test_an_unreachable_store_ends_the_run_at_its_start(
    data: Path, tmp_path: Path, s3: S3Server, bucket: str
) -> None:
    raw = _on_s3(data, tmp_path, bucket)
    raw["checkpoint"]["directory"] = "s3://misspelt-bucket/runs/a"
    with pytest.raises(StorageError, match="no such bucket"):
        run(Topology(), raw)
    with s3.failing(lambda request: True), pytest.raises(StorageError, match="listing failed"):  # noqa: ARG005
        run(Topology(), _on_s3(data, tmp_path, bucket))


# The store


def _latest_valid_step(root: str) -> tuple[int | None, list[str]]:
    found = CheckpointStore(root, SingleProcess()).find_latest_valid()
    return None if found.checkpoint is None else found.checkpoint.step, found.damage


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("fails", ["rank_00000.safetensors", "manifest.json", "frozen_"])
def test_after_a_failed_upload_the_last_commit_is_the_latest_valid(
    s3: S3Server, bucket: str, fails: str, in_background: bool
) -> None:
    first = CheckpointStore(f"{bucket}/run", SingleProcess())
    training = run_alone(FROZEN, 1)
    if fails != "frozen_":
        first.save(training.take_snapshot())
    training.run(2)
    store = CheckpointStore(f"{bucket}/run", SingleProcess())
    store.resume_from(store.find_latest_valid())
    saver = CheckpointSaver(store, CheckpointConfig(in_background=in_background))

    def save() -> None:
        saver.save(training.take_snapshot())
        saver.wait()

    with (
        s3.failing(_uploads_of(fails)) as failure,
        pytest.raises(StorageError, match=f"{fails}.*writing failed"),
    ):
        save()
    assert failure.num_injected == 8
    assert _latest_valid_step(f"{bucket}/run") == (None if fails == "frozen_" else 1, [])
    save()
    assert _latest_valid_step(f"{bucket}/run") == (2, [])


def test_while_the_store_is_unreachable_no_commit_counts_as_damaged(s3: S3Server, bucket: str) -> None:
    store = CheckpointStore(f"{bucket}/run", SingleProcess())
    training = run_alone(Scenario(), 0)
    for step in (1, 2):
        training.run(step)
        store.save(training.take_snapshot())
    for name in ("", "step_00000002/manifest.json", "step_00000002/rank_00000.safetensors"):

        def is_affected(request: Request, name: str = name) -> bool:
            return request.method in {"GET", "HEAD"} and name in request.path

        with s3.failing(is_affected), pytest.raises(UnreachableError):
            store.find_latest_valid()
        with s3.failing(is_affected, status=403, code="AccessDenied"), pytest.raises(UnreachableError):
            store.find_latest_valid()
    found = store.find_latest_valid()
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.damage) == (2, [])
    with (
        s3.failing(lambda r: r.method == "GET" and r.path.endswith("rank_00000.safetensors")),
        pytest.raises(UnreachableError),
    ):
        found.checkpoint.read("norm.weight", "weight", 0, 3)


def test_damage_on_s3_is_found_and_the_commit_before_it_is_the_latest_valid(
    s3: S3Server, bucket: str
) -> None:
    store = CheckpointStore(f"{bucket}/run", SingleProcess())
    training = run_alone(Scenario(), 0)
    for step in (1, 2):
        training.run(step)
        store.save(training.take_snapshot())
    key = "run/step_00000002/rank_00000.safetensors"
    data = bytearray(storage.read_bytes(f"{bucket}/{key}"))
    data[-1] ^= 1
    s3.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=bytes(data))
    step, damage = _latest_valid_step(store.root)
    assert step == 1
    assert len(damage) == 1
    s3.client().delete_object(Bucket=bucket.removeprefix("s3://"), Key=key)
    step, damage = _latest_valid_step(store.root)
    assert step == 1
    assert "rank_00000.safetensors is missing" in damage[0]


def test_pruning_on_s3_deletes_unneeded_files_and_keeps_frozen_weights(s3: S3Server, bucket: str) -> None:
    training = run_alone(FROZEN, 1)
    store = CheckpointStore(f"{bucket}/run", SingleProcess())
    for step in (1, 2, 3):
        training.run(step)
        store.save(training.take_snapshot())
    storage.commit_bytes(f"{bucket}/run/step_00000000/rank_00000.safetensors", b"of a killed writer")
    assert store.prune(CheckpointConfig(keep_last=1)) == [1, 2]
    assert sorted(s3.keys(bucket)) == [
        "run/frozen_00000001/rank_00000.safetensors",
        "run/step_00000003/manifest.json",
        "run/step_00000003/rank_00000.safetensors",
    ]
    assert Checkpoint.open(store.path(3)).find_damage() == []


def test_a_failed_deletion_damages_no_commit(s3: S3Server, bucket: str) -> None:
    training = run_alone(Scenario(), 0)
    store = CheckpointStore(f"{bucket}/run", SingleProcess())
    for step in (1, 2):
        training.run(step)
        store.save(training.take_snapshot())
    with (
        s3.failing(lambda r: r.method == "DELETE", status=403, code="AccessDenied"),
        pytest.raises(StorageError, match=r"step_00000001/manifest\.json: removing failed.*delete"),
    ):
        store.prune(CheckpointConfig(keep_last=1))
    assert committed_steps(f"{bucket}/run") == [1, 2]
    assert store.prune(CheckpointConfig(keep_last=1)) == [1]
    assert committed_steps(f"{bucket}/run") == [2]


# The tools


def ranks_option(to: str, ranks: int) -> tuple[object, ...]:
    return ("--ranks", ranks) if to in ("distft", "deepspeed") else ()


@pytest.fixture
def saved(bucket: str) -> Training:
    """Three steps with frozen parameters, saved on S3 at steps 2 and 3."""
    store = CheckpointStore(f"{bucket}/run/checkpoints", SingleProcess())
    training = run_alone(FROZEN, 2)
    store.save(training.take_snapshot())
    training.run(3)
    store.save(training.take_snapshot())
    return training


def _assert_same_state(training: Training, path: str) -> None:
    source = open_source(path)
    for (name, state), values in training.whole_state().items():
        assert torch.equal(source.read(name, state, 0, values.numel()), values), (name, state)


def test_a_reshard_reads_and_writes_s3(saved: Training, bucket: str, s3: S3Server, tmp_path: Path) -> None:
    before = s3.keys(bucket)
    for target in (f"{bucket}/out", str(tmp_path / "out")):
        assert cli("reshard", f"{bucket}/run", target, "--ranks", 3) == 0
        assert cli("verify", target) == 0
        _assert_same_state(saved, target)
    back = f"{bucket}/back"
    assert cli("reshard", tmp_path / "out", back) == 0
    assert cli("diff", f"{bucket}/run", back) == 0
    after = s3.keys(bucket)
    assert {key: after[key] for key in before} == before
    assert {key.removeprefix("out/") for key in after if key.startswith("out/")} == {
        "manifest.json",
        *(f"rank_{rank:05d}.safetensors" for rank in range(3)),
    }
    assert cli("reshard", f"{bucket}/run", f"{bucket}/out") == 2
    assert cli("reshard", f"{bucket}/run", f"{bucket}/run/checkpoints/step_00000003/below") == 2


@pytest.mark.parametrize("to", ["distft", "universal", "deepspeed", "huggingface"])
def test_every_format_is_converted_to_s3_and_back(saved: Training, bucket: str, to: str) -> None:
    target = f"{bucket}/out"
    assert cli("convert", f"{bucket}/run", target, "--to", to, *ranks_option(to, 2)) == 0
    assert UNFINISHED_MARKER not in storage.list_names(target)
    assert open_source(target).format == to
    assert cli("verify", target) == 0
    assert cli("convert", target, f"{bucket}/back", "--to", "distft") == 0
    if to == "huggingface":
        assert cli("diff", f"{bucket}/run", f"{bucket}/back", "--state", "weight") == 0
    else:
        _assert_same_state(saved, f"{bucket}/back")


def test_the_other_tools_accept_urls(
    saved: Training, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"{bucket}/run/checkpoints"
    assert cli("plan", f"{bucket}/run", "--ranks", 2) == 0
    assert cli("average", f"{root}/step_00000002", f"{root}/step_00000003", "-o", f"{bucket}/mean") == 0
    assert Checkpoint.open(f"{bucket}/mean").find_damage() == []
    assert cli("prune", f"{bucket}/run", "--keep-last", 1) == 0
    assert storage.list_names(root) == ["frozen_00000002", "step_00000003"]
    capsys.readouterr()
    assert cli("verify", f"{bucket}/run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == f"{root}/step_00000003"
    _assert_same_state(saved, f"{bucket}/run")


@pytest.mark.parametrize("to", ["distft", "huggingface"])
def test_a_conversion_with_a_failed_upload_stays_unfinished_and_can_be_rerun(
    saved: Training, bucket: str, s3: S3Server, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    def is_affected(request: Request) -> bool:
        return request.method == "PUT" and "/out/" in request.path and len(s3.keys(bucket)) >= num_keys + 2

    num_keys = len(s3.keys(bucket))
    arguments = ("convert", f"{bucket}/run", f"{bucket}/out", "--to", to, *ranks_option(to, 2))
    with s3.failing(is_affected, status=403, code="AccessDenied"):
        assert cli(*arguments) == 1
    assert "writing failed: PermissionError" in capsys.readouterr().err
    assert storage.exists(f"{bucket}/out/{UNFINISHED_MARKER}")
    assert cli(*arguments) == 0
    assert not storage.exists(f"{bucket}/out/{UNFINISHED_MARKER}")
    assert cli("diff", f"{bucket}/run", f"{bucket}/out", "--state", "weight") == 0
    assert saved.step == 3


def test_the_tools_report_an_unreachable_store_in_one_line(
    saved: Training, bucket: str, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3.failing(lambda r: r.method == "GET" and r.path.endswith("rank_00000.safetensors")):
        assert cli("verify", f"{bucket}/run") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"unreachable error: {bucket}/run/")
    assert "Check the network" in error
    assert saved.step == 3
