"""For every test: the environment, the hypothesis profile, skips for lacking devices, shared fixtures."""

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
from support.rank_pool import start_pool

if TYPE_CHECKING:
    from support.s3_server import S3Server

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # as on the ranks: another number of threads sums in another order
    "DS_ACCELERATOR": "cpu",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
REMOVED = (  # variables of a launcher, login or cluster that the user's shell may have
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RAY_ADDRESS",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)

# Folders whose tests run one after the other, in one process, from the start. They start clusters and
# launchers: two at a time overload two cores. Beside other tests they took four times as long, so those run
# at a lower priority.
SERIAL_FOLDERS = ("cluster", "launch")
NICENESS_BESIDE_SERIAL = 10

hypothesis.settings.register_profile(
    "distft", deadline=None, max_examples=30, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("distft")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-seed", type=int, help="of tests that crash or kill at random moments; default: a new one"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module imports torch, DeepSpeed or Ray."""
    if config.option.random_seed is None:  # pytest-xdist passes the options on to its processes
        config.option.random_seed = random.randrange(1 << 32)
    extensions = tempfile.TemporaryDirectory(prefix="torch_extensions_")
    config.add_cleanup(extensions.cleanup)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name, value in (ENVIRONMENT | {"TORCH_EXTENSIONS_DIR": extensions.name}).items():
        patch.setenv(name, value)
    for name in REMOVED:
        patch.delenv(name, raising=False)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's hook, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _is_serial(item))
    for item in items:
        # Tests of one file share fixtures, so they stay in one process.
        item.add_marker(pytest.mark.xdist_group("serial" if _is_serial(item) else str(item.path)))
        reasons = [reason for mark in item.iter_markers() if (reason := _missing_devices(mark))]
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))


def _is_serial(item: pytest.Item) -> bool:
    return item.path.parent.name in SERIAL_FOLDERS


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave the CPU to the serial tests, if they run beside this one; ranks and commands inherit it."""
    if "PYTEST_XDIST_WORKER" in os.environ and not _is_serial(item):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS_BESIDE_SERIAL)


def pytest_report_header(config: pytest.Config) -> str:
    return f"--random-seed={config.option.random_seed}"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the rank pool while the first tests run, if any test needs it."""
    if not session.config.option.collectonly and any(
        item.get_closest_marker("ranks") for item in session.items
    ):
        start_pool()


def _missing_devices(mark: pytest.Mark) -> str | None:
    """The reason to skip: this machine has too few devices for the mark. None if it has enough."""
    needed = {"gpu": 1, "multi_gpu": 2}.get(mark.name, 0)
    if not needed:
        return None
    import torch

    present = torch.cuda.device_count()
    return None if present >= needed else f"needs {needed} CUDA device(s), and torch sees {present}"


@pytest.fixture
def random_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test's random choices; pytest shows it if the test fails."""
    seed = int(request.config.option.random_seed)
    print(f"To repeat: pytest --random-seed={seed} '{request.node.nodeid}'")
    return seed


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3Server]":
    from support.s3_server import S3Server

    server = S3Server().start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> "S3Server":
    """An S3 server that this process finds through its environment variables, as a user's would.

    Pass its `environment` to ranks. Each test gets a new client, which does not wait between retries.
    """
    import s3fs
    from botocore.retries.standard import ExponentialBackoff

    from distft.storage.remote import s3_options

    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda backoff, context: 0.01)  # noqa: ARG005
    s3_options.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    s3_server.requests.clear()
    return s3_server
