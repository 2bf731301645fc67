"""A manifest comes when all that it promises is there, and says of each weight what the file has."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from support.checkpoint_cli import FROZEN, SavedTraining, cli
from support.engine_scenarios import run_alone
from support.faulty_disk import FaultyDisk, Operation
from support.huggingface_models import make_hf_model

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.steps import find_checkpoint_directory
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.tokenizer.files import SENTENCEPIECE_FILE as TOKENIZER_FILE


def put_in_place(operations: list[Operation]) -> list[str]:
    """Names of the files, in the order in which they got their content."""
    return [Path(operation.path).name for operation in operations if operation.kind == "replace"]


def test_a_save_puts_its_manifest_in_place_after_all_else(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), SingleProcess())
    store.become_writer()
    snapshot = replace(run_alone(FROZEN, 1).take_snapshot(), attachments={TOKENIZER_FILE: b"a model"})
    with FaultyDisk(tmp_path) as disk:
        store.save(snapshot)
    names = put_in_place(disk.operations)
    assert TOKENIZER_FILE in names
    assert names.index(MANIFEST) == len(names) - 1


def test_a_reshard_puts_its_manifest_in_place_after_all_else(finished_run: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(find_checkpoint_directory(str(finished_run)))
    target = tmp_path / "target"
    with FaultyDisk(target) as disk:
        write_distft(source, str(target), world_size=2)
    names = put_in_place(disk.operations)
    assert TOKENIZER_FILE in names
    assert names.index(MANIFEST) == len(names) - 1
    assert Checkpoint.open(str(target)).find_damage() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_conversion_keeps_the_dtype_and_the_bits_of_each_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    make_hf_model("llama").to(dtype).save_pretrained(tmp_path / "model")
    source = HuggingFaceCheckpoint.open(str(tmp_path / "model"))
    write_distft(source, str(tmp_path / "converted"), world_size=2)
    written = Checkpoint.open(str(tmp_path / "converted"))
    assert written.find_damage() == []
    for name, record in written.manifest.parameters.items():
        assert record.states[WEIGHT].dtype == str(dtype).removeprefix("torch.")
        values, expected = (s.read(name, WEIGHT, 0, prod(record.shape)) for s in (written, source))
        assert values.dtype == expected.dtype == dtype
        assert torch.equal(values, expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_conversion_to_deepspeed_keeps_the_dtype_of_the_forward_pass(
    saved: SavedTraining, tmp_path: Path, dtype: str
) -> None:
    """Otherwise the script that goes on would load weights of another dtype than it trains with."""
    assert cli("convert", saved.path, tmp_path / "a", "--to", "deepspeed", "--dtype", dtype) == 0
    assert cli("convert", tmp_path / "a", tmp_path / "b", "--to", "deepspeed", "--ranks", 2) == 0
    assert open_source(str(tmp_path / "b")).manifest.written_by["param_dtype"] == dtype
