"""Hostile files of torch, DeepSpeed and transformers: each ends in an error of distft or is read right."""

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.checkpoint.formats.huggingface_config import HuggingFaceModelSpec, make_config
from distft.checkpoint.formats.huggingface_tensors import map_tensors
from distft.checkpoint.safetensors_header import safetensors_header
from distft.model.config import ModelConfig
from hostile.guard import Guard, Outcome

READ = "hostile.readers:read_checkpoint"
READ_STATES = {"format": "deepspeed", "damage": [], "parameters": 1, "sum": "15.0"}
SECRET = "the content of another file"
MODEL_STATES = "mp_rank_00_model_states.pt"

Build = Callable[[Path], None]
TORCH_FILES: dict[str, Build] = {}
MODELS: dict[str, Build] = {}


def torch_file(build: Build) -> Build:
    """Register what makes `mp_rank_00_model_states.pt` in a directory hostile."""
    TORCH_FILES[build.__name__] = build
    return build


def model(build: Build) -> Build:
    """Register what makes a directory of transformers hostile."""
    MODELS[build.__name__] = build
    return build


def states(**changes: Any) -> dict[str, Any]:
    """What a DeepSpeed run of stage 0 saves."""
    return {
        "module": {"weight": torch.arange(6.0).reshape(2, 3)},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 3,
        "global_samples": 6,
        "dp_world_size": 1,
        "mp_world_size": 1,
        **changes,
    }


def write_states(folder: Path, **changes: Any) -> None:
    torch.save(states(**changes), folder / MODEL_STATES)


def write_pickle(folder: Path, opcodes: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """A run's states whose pickle is `opcodes`; beside its own storage there is storage 9, of 64 bytes."""
    write_states(folder)
    path = folder / MODEL_STATES
    with zipfile.ZipFile(path) as archive:
        weight = archive.read(f"{path.stem}/data/0")
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", opcodes)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", weight)
        archive.writestr("archive/data/9", bytes(64))
        archive.writestr("archive/version", "3\n")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


def integer(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def in_states(value: bytes) -> bytes:
    """The pickle of a run's states, with `value` in them under a name of the script."""
    buffer = io.BytesIO()
    torch.save(states(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        before = archive.read("archive/data.pkl")
    return before.removesuffix(b".") + text("custom") + value + b"s."


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("9") + text("cpu") + b"K\x10tQ"


def tensor(shape: bytes, stride: bytes) -> bytes:
    arguments = STORAGE + b"K\x00(" + shape + b"t(" + stride + b"t\x89}"
    return call("torch._utils", "_rebuild_tensor_v2", arguments)


@torch_file
def calls_a_shell(folder: Path) -> None:
    write_pickle(folder, in_states(call("posix", "system", text(f"touch {folder / 'was_here'}"))))


@torch_file
def loads_a_local_file(folder: Path) -> None:
    write_pickle(folder, in_states(call("torch", "load", text(str(folder.parent / "secret")))))


@torch_file
def loads_a_url(folder: Path) -> None:
    url = text("http://127.0.0.1:9/weights.pt")
    write_pickle(folder, in_states(call("torch.hub", "load_state_dict_from_url", url)))


@torch_file
def maps_a_local_file_as_a_storage(folder: Path) -> None:
    arguments = text(str(folder.parent / "secret")) + b"\x89K\x10"
    write_pickle(folder, in_states(call("torch.storage", "UntypedStorage.from_file", arguments)))


@torch_file
def gives_a_tensor_another_path(folder: Path) -> None:
    """In the weights, which are read: with the state that a `StoredTensor` would take."""
    secret = text(str(folder.parent / "secret"))
    fields = b"](" + secret + b"K\x00ctorch\nuint8\n(K\x10t(K\x01te"
    weight = tensor(b"K\x04", b"K\x01") + fields + b"b"
    module = b"}" + text("weight") + weight + b"s"
    write_pickle(folder, in_states(b"N").removesuffix(b".") + text("module") + module + b"s.")


@torch_file
def names_a_function_in_a_class(folder: Path) -> None:
    write_pickle(folder, in_states(call("collections", "OrderedDict.fromkeys", b"K\x01")))


@torch_file
def has_a_byte_array_of_gigabytes(folder: Path) -> None:
    write_pickle(folder, in_states(call("builtins", "bytearray", integer(1_700_000_000))))


@torch_file
def has_bytes_of_gigabytes(folder: Path) -> None:
    write_pickle(folder, in_states(b"cbuiltins\nbytes\n(" + integer(1_700_000_000) + b"t\x81"))


@torch_file
def has_a_tensor_of_gigabytes(folder: Path) -> None:
    write_pickle(folder, in_states(call("torch", "Tensor", integer(1 << 33))))


@torch_file
def has_a_storage_of_gigabytes(folder: Path) -> None:
    write_pickle(folder, in_states(call("torch.storage", "UntypedStorage", integer(1 << 33))))


@torch_file
def has_a_new_storage_of_gigabytes(folder: Path) -> None:
    arguments = b"(" + integer(1 << 33) + b"t\x81"
    write_pickle(folder, in_states(b"ctorch.storage\nUntypedStorage\n" + arguments))


@torch_file
def encodes_its_bytes_again_and_again(folder: Path) -> None:
    value = call("_codecs", "encode", text("x" * 1000) + text("latin1"))
    for _ in range(30):
        value = b"c_codecs\nencode\n(" + value + text("hex") + b"tR"
    write_pickle(folder, in_states(value))


@torch_file
def copies_a_text_a_thousand_times(folder: Path) -> None:
    first = b"c_codecs\nencode\nq\x01(" + text("x" * 1_000_000) + b"q\x02" + text("latin1") + b"q\x03tR"
    write_pickle(folder, in_states(b"](" + first + b"h\x01h\x02h\x03\x86R" * 3000 + b"e"))


@torch_file
def has_a_memo_of_gigabytes(folder: Path) -> None:
    write_pickle(folder, in_states(text("x") + b"r" + struct.pack("<I", (1 << 31) - 1)))


@torch_file
def doubles_a_list_forty_times(folder: Path) -> None:
    value = b"](" + text("x") + b"eq\x00"
    for _ in range(40):
        value = b"](" + value + b"h\x00eq\x00"
    write_pickle(folder, in_states(value))


@torch_file
def doubles_a_list_from_the_outside(folder: Path) -> None:
    lists = b"".join(b"]q" + bytes([number]) for number in range(40))
    fills = b"".join(b"h%c(h%ch%ce" % (n, n + 1, n + 1) for n in range(39))
    write_pickle(folder, in_states(b"(" + lists + fills + b"t"))


@torch_file
def has_a_key_that_takes_for_ever_to_hash(folder: Path) -> None:
    key = text("x") + b"q\x00"
    for _ in range(60):
        key += b"h\x00\x86q\x00"
    write_pickle(folder, in_states(b"}" + key + b"K\x01s"))


@torch_file
def has_a_set_that_takes_for_ever_to_hash(folder: Path) -> None:
    key = text("x") + b"q\x00"
    for _ in range(60):
        key += b"h\x00\x86q\x00"
    write_pickle(folder, in_states(call("builtins", "set", b"](" + key + b"e")))


@torch_file
def contains_itself(folder: Path) -> None:
    write_pickle(folder, in_states(b"]q\x00(h\x00e"))


@torch_file
def is_nested_a_hundred_thousand_times(folder: Path) -> None:
    write_pickle(folder, in_states(b"](" * 100_000 + b"e" * 100_000))


@torch_file
def repeats_one_element_a_trillion_times(folder: Path) -> None:
    write_pickle(folder, in_states(tensor(integer(1 << 40), b"K\x00")))


@torch_file
def has_a_tensor_that_ends_behind_its_storage(folder: Path) -> None:
    write_pickle(folder, in_states(tensor(integer(1 << 40), b"K\x01")))


@torch_file
def has_a_tensor_of_negative_size(folder: Path) -> None:
    write_pickle(folder, in_states(tensor(integer(-4), b"K\x01")))


@torch_file
def has_more_dimensions_than_strides(folder: Path) -> None:
    write_pickle(folder, in_states(tensor(b"K\x02" * 30, b"K\x00")))


@torch_file
def has_a_deflated_pickle(folder: Path) -> None:
    opcodes = in_states(b"]" * 300_000_000)
    write_pickle(folder, opcodes, compression=zipfile.ZIP_DEFLATED)
    assert (folder / MODEL_STATES).stat().st_size < 1 << 20


def numpy_value(code: str, state: bytes, data: bytes) -> bytes:
    kind = call("numpy", "dtype", text(code) + b"\x89\x88") + state
    raw = call("_codecs", "encode", text(data.decode("latin1")) + text("latin1"))
    return call("numpy._core.multiarray", "scalar", kind + raw)


@torch_file
def has_a_numpy_object(folder: Path) -> None:
    write_pickle(folder, in_states(numpy_value("O", b"", bytes(8))))


@torch_file
def has_numpy_numbers_taken_for_pointers(folder: Path) -> None:
    objects = call("numpy", "dtype", text("O8") + b"\x89\x88")
    fields = b"(" + text("a") + b"t}" + text("a") + objects + b"K\x00\x86s"
    state = b"(K\x03" + text("|") + b"N" + fields + b"K\x08K\x01K\x00tb"
    write_pickle(folder, in_states(numpy_value("V8", state, b"\x41" * 8)))


@torch_file
def has_a_numpy_array_of_another_size(folder: Path) -> None:
    kind = call("numpy", "dtype", text("f8") + b"\x89\x88")
    raw = call("_codecs", "encode", text("x" * 8) + text("latin1"))
    make = call("numpy._core.multiarray", "_reconstruct", b"cnumpy\nndarray\n(K\x00t" + raw)
    write_pickle(
        folder, in_states(make + b"(K\x01(" + integer(1 << 40) + b"t" + kind + b"\x89" + raw + b"tb")
    )


@torch_file
def has_a_class_of_a_module_beside_it(folder: Path) -> None:
    (folder / "hostile_module.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    write_pickle(folder, in_states(b"chostile_module\nThing\n)\x81"))


@torch_file
def has_two_pickles(folder: Path) -> None:
    write_states(folder)
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(folder / MODEL_STATES, "a") as archive,
    ):
        archive.writestr(f"{MODEL_STATES.removesuffix('.pt')}/data.pkl", in_states(b"N"))


@torch_file
def has_records_larger_than_the_file(folder: Path) -> None:
    write_pickle(folder, in_states(tensor(b"K\x04", b"K\x01")))
    path = folder / MODEL_STATES
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<II", 64, 64), struct.pack("<II", 1 << 30, 1 << 30)))


@torch_file
def says_that_twenty_million_ranks_wrote_it(folder: Path) -> None:
    write_states(folder, dp_world_size=20_000_000, param_shapes=[])


@torch_file
def has_numbers_in_place_of_everything(folder: Path) -> None:
    torch.save(dict.fromkeys(states(), 7), folder / MODEL_STATES)


@torch_file
def has_half_of_its_keys(folder: Path) -> None:
    torch.save({"module": {"weight": torch.ones(2)}}, folder / MODEL_STATES)


@torch_file
def is_in_the_old_format(folder: Path) -> None:
    torch.save(states(), folder / MODEL_STATES, _use_new_zipfile_serialization=False)


@torch_file
def is_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / MODEL_STATES)


@torch_file
def never_ends(folder: Path) -> None:
    (folder / MODEL_STATES).symlink_to("/dev/zero")


@torch_file
def is_a_directory(folder: Path) -> None:
    (folder / MODEL_STATES).mkdir()


@torch_file
def is_empty(folder: Path) -> None:
    (folder / MODEL_STATES).touch()


@torch_file
def is_a_git_lfs_pointer(folder: Path) -> None:
    (folder / MODEL_STATES).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@torch_file
def has_a_latest_tag_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    write_states(folder.parent / "elsewhere")
    (folder / "latest").write_text("../elsewhere")


for absolute in ("/abs", "../../x", "a/../../x", "a\0b", ""):

    def named(folder: Path, name: str = absolute) -> None:
        write_states(folder, module={name: torch.ones(2)})

    TORCH_FILES[f"has_a_parameter_named_{absolute!a}"] = named


def read(guard: Guard, folder: Path, function: str = READ) -> Outcome:
    (folder.parent / "secret").write_text(SECRET)
    outcome = guard.run(function, str(folder), directories=[folder])
    assert SECRET not in outcome.message + repr(outcome.returned) + outcome.output
    return outcome


@pytest.mark.parametrize("name", TORCH_FILES)
def test_a_hostile_torch_file_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "global_step3"
    folder.mkdir()
    TORCH_FILES[name](folder)
    outcome = read(guard, folder)
    outcome.check()
    if name == "has_a_memo_of_gigabytes":  # of which torch makes a dict: no harm
        assert outcome.returned == READ_STATES
    else:
        outcome.check_refused(str(folder))
    assert outcome.added_mb < 250
    assert outcome.seconds < 10
    assert "weights_only=False" not in outcome.message
    assert "malicious" not in outcome.message
    assert not (folder / "was_here").exists()


def test_a_torch_file_that_is_not_hostile_is_read(guard: Guard, tmp_path: Path) -> None:
    write_states(tmp_path)
    outcome = read(guard, tmp_path)
    outcome.check()
    assert outcome.returned == READ_STATES


CONFIG = ModelConfig(
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
def has_a_config_that_is_a_pipe(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@model
def has_a_config_without_end(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@model
def has_a_config_that_is_a_directory(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@model
def has_weights_that_are_a_pipe(folder: Path) -> None:
    write_model(folder)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@model
def has_weights_without_end(folder: Path) -> None:
    write_model(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


@model
def has_weights_that_are_a_directory(folder: Path) -> None:
    write_model(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@model
def has_weights_behind_git_lfs(folder: Path) -> None:
    write_model(folder)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@model
def has_an_index_behind_git_lfs(folder: Path) -> None:
    index(folder, "x")
    (folder / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@model
def has_pickled_weights_only(folder: Path) -> None:
    write_model(folder)
    (folder / WEIGHTS).unlink()
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(1)}, buffer)
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_of_transformers_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    MODELS[name](folder)
    outcome = read(guard, folder)
    outcome.check_refused()
    assert outcome.added_mb < 250
    assert outcome.seconds < 10
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
