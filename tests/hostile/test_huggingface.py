"""Hostile model directories of transformers: each ends in an error of distft, or is read right."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.checkpoint.formats.huggingface_config import HuggingFaceModelSpec, make_config
from distft.checkpoint.formats.huggingface_tensors import map_tensors
from distft.checkpoint.safetensors_header import safetensors_header
from distft.model.transformer_config import TransformerConfig
from hostile.checkpoints import LFS_POINTER, NO_FILES, READ, Build, read, read_hostile
from hostile.guard import Guard

CONFIG = TransformerConfig(
    vocab_size=11, d_model=8, num_layers=2, num_heads=2, max_seq_len=16, tie_embeddings=True, d_ff=16
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def config_json(**changes: Any) -> str:
    spec = HuggingFaceModelSpec(architecture="llama", model=CONFIG, head="language_model", label_names=None)
    return json.dumps(make_config(spec, dtype="float32", special_ids={}) | changes)


def write_model(folder: Path, **changes: Any) -> None:
    """A small Llama of zeros."""
    tensors = map_tensors(CONFIG, "llama", "language_model").tensors.values()
    header = safetensors_header((t.name, torch.float32, t.shape) for t in tensors)
    (folder / WEIGHTS).write_bytes(header + bytes(4 * sum(t.numel for t in tensors)))
    (folder / "config.json").write_text(config_json(**changes))


def write_header(folder: Path, header: bytes | dict[str, Any], *, length: int | None = None) -> None:
    """A model whose header is replaced; its data has 64 bytes."""
    write_model(folder)
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    number = (len(data) if length is None else length).to_bytes(8, "little")
    (folder / WEIGHTS).write_bytes(number + data + bytes(64))


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes | dict[str, Any]] = {
    "negative_shape": {"x": entry((-4,))},
    "shape_of_booleans": {"x": entry((True,), (0, 4))},
    "shape_of_texts": {"x": entry(("4",))},
    "shape_beyond_64_bits": {"x": entry((1 << 62, 1 << 62), (0, 16))},
    "shape_of_a_million_sizes": {"x": entry([1] * 1_000_000, (0, 4))},
    "negative_offset": {"x": entry((4,), (-16, 0))},
    "offsets_backwards": {"x": entry((4,), (16, 0))},
    "one_offset": {"x": entry((4,), (0,))},
    "offset_beyond_64_bits": {"x": entry((4,), (1 << 70, (1 << 70) + 16))},
    "overlap": {"x": entry(), "y": entry((4,), (8, 24))},
    "the_same_place_twice": {"x": entry(), "y": entry()},
    "size_of_another_dtype": {"x": entry((4,), (0, 8))},
    "dtype_that_is_a_number": {"x": entry(dtype=32)},
    "no_entries": {"x": {}},
    "list": b"[1, 2]",
    "not_json": b"{x",
    "not_utf8": b'{"\xff\xfe": 1}',
    "deep": b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "infinity": b'{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 16]}}',
    "digits": b'{"x": {"dtype": "F32", "shape": [' + b"9" * 100_000 + b'], "data_offsets": [0, 16]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_header(folder, HEADERS[name])
    outcome = read(guard, folder)
    outcome.check()
    assert outcome.returned is None or outcome.returned["parameters"] == 20
    told = outcome.message + repr(outcome.returned)
    assert "model.safetensors is not a safetensors file" in told
    assert len(told) < 5000


@pytest.mark.parametrize("length", [0, 1, 60, 5000, 1 << 30, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_of_any_length_takes_no_more_memory_than_the_file(
    guard: Guard, tmp_path: Path, length: int
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_header(folder, {"x": entry()}, length=length)
    outcome = read(guard, folder)
    outcome.check()
    assert outcome.added_mb < 100
    assert "is not a safetensors file" in outcome.message + repr(outcome.returned)


def test_a_header_of_a_sparse_gigabyte_is_not_read(guard: Guard, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_header(folder, {"x": entry()}, length=1 << 30)
    os.truncate(folder / WEIGHTS, 2 << 30)
    outcome = read(guard, folder)
    outcome.check()
    assert outcome.added_mb < 100


MODELS: dict[str, Build] = {}


def model(build: Build) -> Build:
    """Register what makes a directory of transformers hostile."""
    MODELS[build.__name__] = build
    return build


def index(folder: Path, file: Any) -> None:
    write_model(folder)
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))


for number, name in enumerate(
    (
        "/etc/passwd",
        "../model.safetensors",
        "a/../../model.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "file:///etc/passwd",
        "http://127.0.0.1:9/x",
        "memory://x",
        "a\0b",
        "x" * 5000,
        7,
        None,
        ["x"],
    )
):

    def indexed(folder: Path, file: Any = name) -> None:
        index(folder, file)

    MODELS[f"has_an_index_that_names_{number}"] = indexed


CONFIGS: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": "two"},
    {"num_hidden_layers": -1},
    {"hidden_size": 1 << 62},
    {"num_attention_heads": 1 << 27, "hidden_size": 1 << 28, "head_dim": 1 << 28},
    {"hidden_size": None},
    {"num_attention_heads": 0},
    {"vocab_size": 1e300},
    {"max_position_embeddings": [1]},
    {"rms_norm_eps": "NaN"},
    {"rope_parameters": {"rope_theta": {"rope_theta": 1}}},
    {"rope_parameters": {"rope_theta": "x"}},
    {"rope_scaling": 7},
    {"architectures": [["LlamaForCausalLM"]]},
    {"architectures": "LlamaForCausalLM"},
    {"model_type": ["llama"]},
    {"model_type": "../llama"},
    {"auto_map": {"AutoModel": "modeling.Hostile"}},
    {"architectures": ["LlamaForSequenceClassification"], "id2label": {"x": "y"}},
    {"layer_types": {"a": 1}, "model_type": "qwen2"},
    {"tie_word_embeddings": "perhaps"},
]
for number, value in enumerate(CONFIGS):

    def configured(folder: Path, changes: Any = value) -> None:
        write_model(folder, **changes)
        (folder / "modeling.py").write_text("raise SystemExit('code of the model ran')\n")

    MODELS[f"has_a_config_with_{number}_{next(iter(value))}"] = configured


@model
def has_a_deep_config(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").write_text('{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}")


@model
def has_a_config_that_is_a_list(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").write_text("[]")


@model
def has_weights_behind_git_lfs(folder: Path) -> None:
    write_model(folder)
    (folder / WEIGHTS).write_text(LFS_POINTER)


@model
def has_an_index_behind_git_lfs(folder: Path) -> None:
    index(folder, "x")
    (folder / INDEX).write_text(LFS_POINTER)


@model
def has_pickled_weights_only(folder: Path) -> None:
    write_model(folder)
    (folder / WEIGHTS).unlink()
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(1)}, buffer)
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())


for file in ("config.json", WEIGHTS):
    for kind, make in NO_FILES.items():

        def replaced(folder: Path, file: str = file, make: Build = make) -> None:
            write_model(folder)
            (folder / file).unlink()
            make(folder / file)

        MODELS[f"has_a_{file}_that_is_{kind}"] = replaced


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_of_transformers_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    outcome = read_hostile(guard, tmp_path / "model", MODELS[name])
    outcome.check_refused()
    assert len(outcome.message) < 5000


def test_a_model_that_is_not_hostile_is_read(guard: Guard, tmp_path: Path) -> None:
    write_model(tmp_path)
    outcome = read(guard, tmp_path)
    outcome.check()
    assert outcome.returned == {"format": "huggingface", "damage": [], "parameters": 20, "sum": "0.0"}


def test_the_links_of_a_hub_cache_are_followed(guard: Guard, tmp_path: Path) -> None:
    """The user's file system made them; no file names them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_model(blobs)
    for name in ("config.json", WEIGHTS):
        (snapshot / name).symlink_to(blobs / name)
    outcome = guard.run(READ, str(snapshot), directories=[snapshot, blobs])
    outcome.check()
    assert outcome.returned["damage"] == []
