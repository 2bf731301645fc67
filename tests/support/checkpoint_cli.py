"""Calls `distft checkpoint` on a saved training, for the tests of its commands."""

from dataclasses import dataclass
from pathlib import Path

from distft.cli.main import main
from support.engine_scenarios import Scenario, Training

FROZEN = Scenario(trainable=("blocks.*", "norm.weight"))


@dataclass(frozen=True)
class SavedTraining:
    """A training with frozen parameters, saved at steps 2 and 3; `path` is the later commit."""

    training: Training
    path: Path


def cli(*arguments: object) -> int:
    """Run `distft checkpoint` with these arguments; return its exit code."""
    return main(["checkpoint", *map(str, arguments)])
