"""Hostile files of torch: each ends in an error of distft, or is read right."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile.checkpoints import LFS_POINTER, NO_FILES, Build, read, read_hostile
from hostile.guard import Guard

READ_STATES = {"format": "deepspeed", "damage": [], "parameters": 1, "sum": "15.0"}
MODEL_STATES = "mp_rank_00_model_states.pt"
GIGABYTES = 1_700_000_000


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


def wrapped(value: bytes, times: int, wrap: Callable[[bytes], bytes]) -> bytes:
    for _ in range(times):
        value = wrap(value)
    return value


def numpy_value(code: str, state: bytes, data: bytes) -> bytes:
    kind = call("numpy", "dtype", text(code) + b"\x89\x88") + state
    raw = call("_codecs", "encode", text(data.decode("latin1")) + text("latin1"))
    return call("numpy._core.multiarray", "scalar", kind + raw)


def numpy_pointers() -> bytes:
    objects = call("numpy", "dtype", text("O8") + b"\x89\x88")
    fields = b"(" + text("a") + b"t}" + text("a") + objects + b"K\x00\x86s"
    state = b"(K\x03" + text("|") + b"N" + fields + b"K\x08K\x01K\x00tb"
    return numpy_value("V8", state, b"\x41" * 8)


def numpy_array_of_another_size() -> bytes:
    kind = call("numpy", "dtype", text("f8") + b"\x89\x88")
    raw = call("_codecs", "encode", text("x" * 8) + text("latin1"))
    make = call("numpy._core.multiarray", "_reconstruct", b"cnumpy\nndarray\n(K\x00t" + raw)
    return make + b"(K\x01(" + integer(1 << 40) + b"t" + kind + b"\x89" + raw + b"tb"


def copied_text() -> bytes:
    first = b"c_codecs\nencode\nq\x01(" + text("x" * 1_000_000) + b"q\x02" + text("latin1") + b"q\x03tR"
    return b"](" + first + b"h\x01h\x02h\x03\x86R" * 3000 + b"e"


def lists_doubled_from_the_outside() -> bytes:
    lists = b"".join(b"]q" + bytes([number]) for number in range(40))
    fills = b"".join(b"h%c(h%ch%ce" % (n, n + 1, n + 1) for n in range(39))
    return b"(" + lists + fills + b"t"


SLOW_KEY = wrapped(text("x") + b"q\x00", 60, lambda key: key + b"h\x00\x86q\x00")
ENCODED = call("_codecs", "encode", text("x" * 1000) + text("latin1"))
# Values among the states of a run; those that are functions get the directory.
VALUES: dict[str, bytes | Callable[[Path], bytes]] = {
    "calls_a_shell": lambda folder: call("posix", "system", text(f"touch {folder / 'was_here'}")),
    "loads_a_local_file": lambda folder: call("torch", "load", text(str(folder.parent / "secret"))),
    "loads_a_url": call("torch.hub", "load_state_dict_from_url", text("http://127.0.0.1:9/weights.pt")),
    "maps_a_local_file_as_a_storage": lambda folder: call(
        "torch.storage", "UntypedStorage.from_file", text(str(folder.parent / "secret")) + b"\x89K\x10"
    ),
    "names_a_function_in_a_class": call("collections", "OrderedDict.fromkeys", b"K\x01"),
    "has_a_byte_array_of_gigabytes": call("builtins", "bytearray", integer(GIGABYTES)),
    "has_bytes_of_gigabytes": b"cbuiltins\nbytes\n(" + integer(GIGABYTES) + b"t\x81",
    "has_a_tensor_of_gigabytes": call("torch", "Tensor", integer(1 << 33)),
    "has_a_storage_of_gigabytes": call("torch.storage", "UntypedStorage", integer(1 << 33)),
    "has_a_new_storage_of_gigabytes": b"ctorch.storage\nUntypedStorage\n(" + integer(1 << 33) + b"t\x81",
    "encodes_its_bytes_again_and_again": wrapped(
        ENCODED, 30, lambda value: b"c_codecs\nencode\n(" + value + text("hex") + b"tR"
    ),
    "copies_a_text_a_thousand_times": copied_text(),
    "has_a_memo_of_gigabytes": text("x") + b"r" + struct.pack("<I", (1 << 31) - 1),
    "doubles_a_list_forty_times": wrapped(
        b"](" + text("x") + b"eq\x00", 40, lambda value: b"](" + value + b"h\x00eq\x00"
    ),
    "doubles_a_list_from_the_outside": lists_doubled_from_the_outside(),
    "has_a_key_that_takes_for_ever_to_hash": b"}" + SLOW_KEY + b"K\x01s",
    "has_a_set_that_takes_for_ever_to_hash": call("builtins", "set", b"](" + SLOW_KEY + b"e"),
    "contains_itself": b"]q\x00(h\x00e",
    "is_nested_a_hundred_thousand_times": b"](" * 100_000 + b"e" * 100_000,
    "repeats_one_element_a_trillion_times": tensor(integer(1 << 40), b"K\x00"),
    "has_a_tensor_that_ends_behind_its_storage": tensor(integer(1 << 40), b"K\x01"),
    "has_a_tensor_of_negative_size": tensor(integer(-4), b"K\x01"),
    "has_more_dimensions_than_strides": tensor(b"K\x02" * 30, b"K\x00"),
    "has_a_numpy_object": numpy_value("O", b"", bytes(8)),
    "has_numpy_numbers_taken_for_pointers": numpy_pointers(),
    "has_a_numpy_array_of_another_size": numpy_array_of_another_size(),
}
TORCH_FILES: dict[str, Build] = {}


def torch_file(build: Build) -> Build:
    """Register what makes `mp_rank_00_model_states.pt` in a directory hostile."""
    TORCH_FILES[build.__name__] = build
    return build


for name, value in VALUES.items():

    def valued(folder: Path, value: bytes | Callable[[Path], bytes] = value) -> None:
        write_pickle(folder, in_states(value if isinstance(value, bytes) else value(folder)))

    TORCH_FILES[name] = valued


@torch_file
def gives_a_tensor_another_path(folder: Path) -> None:
    """In the weights, which are read: with the state that a `StoredTensor` would take."""
    secret = text(str(folder.parent / "secret"))
    fields = b"](" + secret + b"K\x00ctorch\nuint8\n(K\x10t(K\x01te"
    weight = tensor(b"K\x04", b"K\x01") + fields + b"b"
    module = b"}" + text("weight") + weight + b"s"
    write_pickle(folder, in_states(b"N").removesuffix(b".") + text("module") + module + b"s.")


@torch_file
def has_a_deflated_pickle(folder: Path) -> None:
    opcodes = in_states(b"]" * 300_000_000)
    write_pickle(folder, opcodes, compression=zipfile.ZIP_DEFLATED)
    assert (folder / MODEL_STATES).stat().st_size < 1 << 20


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
def is_empty(folder: Path) -> None:
    (folder / MODEL_STATES).touch()


@torch_file
def is_a_git_lfs_pointer(folder: Path) -> None:
    (folder / MODEL_STATES).write_text(LFS_POINTER)


@torch_file
def has_a_latest_tag_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    write_states(folder.parent / "elsewhere")
    (folder / "latest").write_text("../elsewhere")


for kind, make in NO_FILES.items():

    def replaced(folder: Path, make: Build = make) -> None:
        make(folder / MODEL_STATES)

    TORCH_FILES[f"is_{kind}"] = replaced


for absolute in ("/abs", "../../x", "a/../../x", "a\0b", ""):

    def named(folder: Path, name: str = absolute) -> None:
        write_states(folder, module={name: torch.ones(2)})

    TORCH_FILES[f"has_a_parameter_named_{absolute!a}"] = named


@pytest.mark.parametrize("name", TORCH_FILES)
def test_a_hostile_torch_file_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "global_step3"
    outcome = read_hostile(guard, folder, TORCH_FILES[name])
    if name == "has_a_memo_of_gigabytes":  # of which torch makes a dict: no harm
        assert outcome.returned == READ_STATES
    else:
        outcome.check_refused(str(folder))
    assert "weights_only=False" not in outcome.message
    assert "malicious" not in outcome.message
    assert not (folder / "was_here").exists()


def test_a_torch_file_that_is_not_hostile_is_read(guard: Guard, tmp_path: Path) -> None:
    write_states(tmp_path)
    outcome = read(guard, tmp_path)
    outcome.check()
    assert outcome.returned == READ_STATES
