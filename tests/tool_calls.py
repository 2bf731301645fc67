"""What tests of `distft checkpoint` have in common."""

from pathlib import Path

from engine_scenarios import Scenario, Training

from distft.cli.main import main

FROZEN = Scenario(trainable=("blocks.*", "norm.weight"))


def cli(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


def path_of(training: Training) -> Path:
    return Path(training.path)  # type: ignore[attr-defined]
