"""One environment, one hypothesis profile and the reasons to skip, for every test."""

import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
from distributed import start_pool

if TYPE_CHECKING:
    from s3_server import S3Server

    from distft.model.config import ModelConfig

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the ranks' own setting: sums in another order are other sums
    "DS_ACCELERATOR": "cpu",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
FOREIGN = (  # what a launcher, a login or a cluster may have left in the user's shell
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

ONE_AT_A_TIME = ("cluster", "launch")

hypothesis.settings.register_profile(
    "distft", deadline=None, max_examples=30, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("distft")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module imports torch, DeepSpeed or Ray."""
    extensions = tempfile.TemporaryDirectory(prefix="torch_extensions_")
    config.add_cleanup(extensions.cleanup)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name, value in (ENVIRONMENT | {"TORCH_EXTENSIONS_DIR": extensions.name}).items():
        patch.setenv(name, value)
    for name in FOREIGN:
        patch.delenv(name, raising=False)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # At the end they have the machine to themselves: beside other tests they take four times as long.
    items.sort(key=lambda item: item.path.parent.name in ONE_AT_A_TIME)
    for item in items:
        # A file's tests share fixtures, so they stay in one process. What starts clusters and launchers goes
        # one after the other: two at a time are too much for two cores.
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group("clusters" if folder in ONE_AT_A_TIME else str(item.path)))
        lacking = next((reason for mark in item.iter_markers() if (reason := _lack(mark))), None)
        if lacking is not None:
            item.add_marker(pytest.mark.skip(reason=lacking))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Warm the pool of ranks up while the first tests run, if there is a test that wants it."""
    if not session.config.option.collectonly and any(
        item.get_closest_marker("ranks") for item in session.items
    ):
        start_pool()


def _lack(mark: pytest.Mark) -> str | None:
    """What this machine lacks of what the mark needs, or None."""
    needed = {"gpu": 1, "multi_gpu": 2}.get(mark.name, 0)
    if not needed:
        return None
    import torch

    present = torch.cuda.device_count()
    return None if present >= needed else f"needs {needed} CUDA device(s), and torch sees {present}"


@pytest.fixture
def tiny_model_config() -> "ModelConfig":
    """A Transformer with every kind of weight twice, and sizes that differ, so that a mixed-up axis shows."""
    from distft.model.config import ModelConfig

    return ModelConfig(
        vocab_size=61, max_seq_len=32, d_model=24, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=40
    )


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3Server]":
    from s3_server import S3Server

    server = S3Server().start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> "S3Server":
    """A running S3 server that this process, and ranks given its `environment`, find as users' do.

    Each test has a new client of it, which does not wait between attempts.
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
