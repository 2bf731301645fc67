"""Packages that a training process must not import: they are seconds of its start, and of each recovery."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.small_runs import pretraining

COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}  # 1.5 s
UNUSED = COMPILER | {
    "ray",
    "pandas",
    "pyarrow",
    "transformers",
    "wandb",
    "tensorboard",
    "torch.distributed.fsdp",
}


def imported_by_training(config: Path, *overrides: str) -> set[str]:
    """The names of all modules in the process of a run when it ends."""
    code = (
        f"import sys; from distft.cli.main import main; code = main({['train', str(config), *overrides]}); "
        "print(*sys.modules, file=sys.__stdout__); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    raw = pretraining(data, tmp_path / "run", train={"max_steps": 2})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_local_run_imports_no_compiler_and_no_deepspeed(config: Path) -> None:
    imported = imported_by_training(config, "engine={type: local, compile: false}")
    assert "torch" in imported
    assert imported & (UNUSED | {"deepspeed"}) == set()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_zero_run_imports_no_compiler(config: Path, zero_stage: int) -> None:
    imported = imported_by_training(
        config, f"engine={{type: zero, zero_stage: {zero_stage}, compile: false}}"
    )
    assert "deepspeed" in imported
    assert imported & UNUSED == set()


def test_a_short_run_with_the_default_settings_imports_no_compiler(config: Path) -> None:
    assert imported_by_training(config) & COMPILER == set()
