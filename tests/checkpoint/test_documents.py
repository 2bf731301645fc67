"""docs/checkpoints.md: its reader works, and it lists every key and every command."""

import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from support.engine_scenarios import Scenario, run_alone

from distft.checkpoint.committed import Checkpoint
from distft.cli.checkpoint_verbs import checkpoint_app

TEXT = Path("docs/checkpoints.md").read_text()


def test_the_reader_in_the_document_reads_every_weight(tmp_path: Path) -> None:
    training = run_alone(Scenario(trainable=("blocks.1.*",)), 2)
    path = training.save(str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    weights = names["read_weights"](path)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == training.shapes
    checkpoint = Checkpoint.open(path)
    for name, weight in weights.items():
        expected = checkpoint.read(name, "weight", 0, prod(training.shapes[name]))
        assert torch.equal(weight.flatten(), expected), name


def test_the_manifest_has_the_keys_that_the_document_lists(tmp_path: Path) -> None:
    manifest = Checkpoint.open(run_alone(Scenario(), 1).save(str(tmp_path))).manifest
    table = TEXT.split("| Key | What it is |")[1].split("\n\n")[0]
    listed = {
        key
        for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", cell)
    }
    assert listed == {*type(manifest).model_fields, "checksum"}


def test_the_document_names_every_command() -> None:
    for command in checkpoint_app.registered_commands:
        assert f"distft checkpoint {command.name} " in TEXT
