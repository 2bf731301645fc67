"""S3 specifics: retries, multipart uploads, credentials, threads. `test_files` covers common behaviour."""

import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.s3_server import CUT, HALF, Request, S3Server

from distft import storage
from distft.errors import StorageError, UnreachableError
from distft.storage import remote

NUM_ATTEMPTS = 8
MIB = 1 << 20


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.make_bucket()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """The smallest part size that S3 accepts, so that a small file needs several parts."""
    monkeypatch.setattr(remote, "_PART_BYTES", 5 * MIB)
    monkeypatch.setattr(remote, "_IN_MEMORY_BYTES", 5 * MIB)
    return 5 * MIB


def _every_request(request: Request) -> bool:  # noqa: ARG001
    return True


def test_writes_and_deletes_of_another_client_are_visible_at_once(s3: S3Server, bucket: str) -> None:
    url, name = f"{bucket}/run/a.bin", bucket.removeprefix("s3://")
    assert not storage.exists(url)
    assert storage.list_names(f"{bucket}/run") == []
    s3.client().put_object(Bucket=name, Key="run/a.bin", Body=b"12345")
    assert storage.exists(url)
    assert storage.is_directory(f"{bucket}/run")
    assert storage.list_names(f"{bucket}/run") == ["a.bin"]
    assert storage.size(url) == 5
    s3.client().put_object(Bucket=name, Key="run/a.bin", Body=b"1234567")
    assert storage.size(url) == 7
    assert storage.read_bytes(url) == b"1234567"
    s3.client().delete_object(Bucket=name, Key="run/a.bin")
    assert not storage.exists(url)
    assert not storage.exists(f"{bucket}/run")


def test_a_large_file_is_uploaded_in_parts_with_few_in_memory(s3: S3Server, bucket: str) -> None:
    content = os.urandom(MIB) * 65
    s3.most_parts_at_once = 0
    with storage.open_write(f"{bucket}/large.bin") as file:
        for start in range(0, len(content), 10_000_000):
            file.write(content[start : start + 10_000_000])
    parts = [request for request in s3.requests if request.part_number is not None]
    assert sorted(p.part_number or 0 for p in parts) == [1, 2, 3, 4, 5]
    assert max(p.num_bytes for p in parts) < 16.1 * MIB
    assert s3.most_parts_at_once <= 4
    assert storage.checksum_of(f"{bucket}/large.bin") == storage.checksum_of_bytes(content)
    assert storage.read_range(f"{bucket}/large.bin", 33 * MIB - 5, 33 * MIB + 5) == content[MIB - 5 : MIB + 5]
    assert s3.unfinished_uploads(bucket) == []


@pytest.mark.usefixtures("small_parts")
def test_part_size_grows_to_stay_below_the_maximum_number_of_parts(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_MAX_PARTS", 2)
    storage.commit_bytes(f"{bucket}/large.bin", bytes(14 * MIB))
    assert {request.part_number for request in s3.requests} == {None, 1, 2}
    assert storage.size(f"{bucket}/large.bin") == 14 * MIB


def _use_every_operation(bucket: str, content: bytes) -> None:
    url = f"{bucket}/run/a.bin"
    storage.commit_bytes(url, content)
    assert storage.read_bytes(url) == bytes(storage.read_view(url)) == content
    assert storage.read_range(url, 10, 90) == content[10:90]
    assert storage.exists(url)
    assert storage.size(url) == len(content)
    assert storage.list_names(f"{bucket}/run") == ["a.bin"]
    storage.remove_tree(f"{bucket}/run")
    assert not storage.is_directory(f"{bucket}/run")


@pytest.mark.parametrize("status", [500, 503, CUT])
@pytest.mark.usefixtures("small_parts")
def test_a_failed_request_is_retried(s3: S3Server, bucket: str, status: int) -> None:
    failures: dict[Any, int] = {}

    def each_request_twice(request: Request) -> bool:
        key = (request.method, request.path, *map(str, request.query.items()))
        failures[key] = failures.get(key, 0) + 1
        return failures[key] % 3 != 0

    with s3.failing(
        each_request_twice, status=status, code="SlowDown" if status == 503 else "InternalError"
    ) as fault:
        _use_every_operation(bucket, secrets.token_bytes(11 * MIB))
    assert fault.num_injected > 20


def test_a_truncated_response_is_requested_again(s3: S3Server, bucket: str) -> None:
    content = secrets.token_bytes(100_000)
    storage.commit_bytes(f"{bucket}/a.bin", content)
    for read in (
        lambda: storage.read_bytes(f"{bucket}/a.bin"),
        lambda: storage.read_range(f"{bucket}/a.bin", 0, 100_000),
    ):
        with s3.failing(
            lambda r: r.method == "GET" and r.path.endswith("a.bin"), status=HALF, times=2
        ) as fault:
            assert read() == content
        assert fault.num_injected == 2


OPERATIONS: dict[str, Callable[[str], Any]] = {
    "writing": lambda url: storage.commit_bytes(url, b"new"),
    "reading": lambda url: storage.read_range(url, 0, 2),
    "listing": storage.list_names,
    "looking it up": storage.read_bytes,
    "removing": storage.remove,
}


@pytest.mark.parametrize("action", OPERATIONS)
@pytest.mark.parametrize(
    ("status", "code", "num_attempts", "cause", "remedy"),
    [
        (500, "InternalError", NUM_ATTEMPTS, "", "AWS_ENDPOINT_URL_S3"),
        (403, "AccessDenied", 1, "PermissionError", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_persistent_failure_is_an_unreachable_error_with_a_remedy(
    s3: S3Server,
    bucket: str,
    action: str,
    status: int,
    code: str,
    num_attempts: int,
    cause: str,
    remedy: str,
) -> None:
    url = f"{bucket}/a.bin"
    storage.commit_bytes(url, b"old")

    def is_affected(request: Request) -> bool:
        return action != "removing" or request.method == "DELETE"

    with s3.failing(is_affected, status=status, code=code) as fault, pytest.raises(StorageError) as caught:
        OPERATIONS[action](url)
    assert isinstance(caught.value, UnreachableError)
    text = str(caught.value)
    assert text.startswith(f"{url}: {action} failed: ")
    assert cause in text
    assert remedy in text
    assert fault.num_injected == num_attempts
    assert storage.read_bytes(url) == b"old"


def test_settings_of_botocore_and_fsspec_override_the_number_of_attempts_and_time_outs(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    _forget_clients()
    with s3.failing(_every_request) as fault, pytest.raises(UnreachableError):
        storage.commit_bytes(f"{bucket}/a", b"x")
    assert fault.num_injected == 2

    has_raised = threading.Event()

    def hang(request: Request) -> bool:  # noqa: ARG001
        has_raised.wait(timeout=60)
        return False

    user_settings = {"config_kwargs": {"read_timeout": 0.3, "retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", user_settings)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    _forget_clients()
    with s3.failing(hang):
        with pytest.raises(UnreachableError, match="ReadTimeoutError"):
            storage.commit_bytes(f"{bucket}/a", b"x")
        has_raised.set()


def _forget_clients() -> None:
    import s3fs

    remote.s3_options.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_dead_endpoint_and_missing_credentials_are_unreachable_errors(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.make_bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    _forget_clients()
    with pytest.raises(UnreachableError, match=r"NoCredentialsError.*Check the credentials"):
        storage.list_names(bucket)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # the port of `discard`: nobody listens
    _forget_clients()
    with pytest.raises(UnreachableError, match=r"EndpointConnectionError.*127\.0\.0\.1:9.*Check the network"):
        storage.list_names(bucket)


def test_a_missing_bucket_is_an_error_and_is_not_created(s3: S3Server) -> None:
    url = "s3://misspelt-bucket/run"
    storage.make_directory(url)
    for use in (storage.list_names, storage.list_sizes, lambda url: storage.commit_bytes(f"{url}/a", b"x")):
        with pytest.raises(UnreachableError, match=r"s3://misspelt-bucket/run.*no such bucket"):
            use(url)
    assert "misspelt-bucket" not in [found["Name"] for found in s3.client().list_buckets()["Buckets"]]


def test_a_refused_deletion_is_an_error(s3: S3Server, bucket: str) -> None:
    storage.commit_bytes(f"{bucket}/run/a", b"x")
    refusal = b"<DeleteResult><Error><Key>run/a</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    with (
        s3.failing(lambda r: r.method == "POST" and "delete" in r.query, status=200, body=refusal),
        pytest.raises(UnreachableError, match=r"some files are still there.*delete"),
    ):
        storage.remove_tree(f"{bucket}/run")


@pytest.mark.parametrize("is_aborted", [True, False])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_interrupted_upload_leaves_the_old_content(
    s3: S3Server, bucket: str, small_parts: int, before: bytes | None, is_aborted: bool
) -> None:
    url = f"{bucket}/run/a.bin"
    if before is not None:
        storage.commit_bytes(url, before)

    def is_affected(request: Request) -> bool:
        return request.part_number == 3 or (request.method == "DELETE" and not is_aborted)

    with (
        s3.failing(is_affected) as fault,
        pytest.raises(UnreachableError, match=r"run/a\.bin: writing failed"),
    ):
        storage.commit_bytes(url, bytes(4 * small_parts))
    assert fault.num_injected >= NUM_ATTEMPTS
    assert {1, 2, 3} <= {request.part_number for request in s3.requests}
    assert storage.list_names(f"{bucket}/run") == ([] if before is None else ["a.bin"])
    assert before is None or storage.read_bytes(url) == before
    assert s3.unfinished_uploads(bucket) == ([] if is_aborted else ["run/a.bin"])
    storage.commit_bytes(url, bytes(4 * small_parts))
    assert storage.size(url) == 4 * small_parts


def test_a_writer_killed_during_an_upload_leaves_the_old_content_and_no_local_file(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    url = f"{bucket}/a.bin"
    storage.commit_bytes(url, b"old")
    program = (
        "import sys; from distft import storage; from distft.storage import remote\n"
        "remote._PART_BYTES = remote._IN_MEMORY_BYTES = 5 << 20\n"
        "storage.commit_bytes(sys.argv[1], bytes(21 << 20))\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", program, url], env=environment)

    def kill(request: Request) -> bool:
        if request.part_number == 2:
            os.kill(child.pid, signal.SIGKILL)
        return request.part_number == 2

    with s3.failing(kill):
        assert child.wait(timeout=60) == -signal.SIGKILL
    assert storage.read_bytes(url) == b"old"
    assert list(tmp_path.iterdir()) == []


def test_threads_write_and_read_concurrently(bucket: str) -> None:
    contents = [secrets.token_bytes(200_000) for _ in range(12)]

    def write_and_read(number: int) -> bool:
        storage.commit_bytes(f"{bucket}/{number}", contents[number])
        return storage.read_bytes(f"{bucket}/{number}") == contents[number]

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(write_and_read, range(12)))
    assert len(storage.list_names(bucket)) == 12


def test_a_child_forked_while_a_thread_writes_can_read_and_write(bucket: str) -> None:
    storage.commit_bytes(f"{bucket}/parent", b"from the parent")
    done = threading.Event()

    def keep_writing() -> None:
        while not done.is_set():
            storage.commit_bytes(f"{bucket}/thread", secrets.token_bytes(100_000))

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads
            child = multiprocessing.get_context("fork").Process(target=_copy_in_child, args=(bucket,))
            child.start()
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        done.set()
        thread.join()
    assert storage.read_bytes(f"{bucket}/child") == b"from the parent"


def _copy_in_child(bucket: str) -> None:
    storage.copy(f"{bucket}/parent", f"{bucket}/child")
    os._exit(0)
