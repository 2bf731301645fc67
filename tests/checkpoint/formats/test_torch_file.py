"""Torch files that torch wrote or reads, and hostile and damaged ones."""

import argparse
import os
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.damage import flip_bit
from torch import Tensor

from distft.checkpoint.formats.torch_file import (
    NumpyArray,
    OpaqueObject,
    StoredTensor,
    StreamedTensor,
    can_pickle,
    find_torch_file_damage,
    read_torch_file,
    write_torch_file,
)
from distft.errors import CheckpointError, UnsupportedFormatError

PLAIN: dict[Any, Any] = {
    "none": None,
    "flags": [True, False],
    "numbers": [0, -1, 255, 2**31 - 1, -(2**31), 2**31, -(2**40), 2**70, 0.1, -1e300, float("inf")],
    "texts": ["", "ä\n", "日本"],
    "bytes": bytes(range(256)),
    "tuples": ((), (1,), (1, (2, 3))),
    "ordered": OrderedDict([("b", 1), ("a", 2)]),
    "size": torch.Size([2, 3]),
    "kinds": [torch.bfloat16, torch.device("cpu")],
    "set": {1, 2},
    3: {"keys": "of any kind"},
}


def materialized(value: Any) -> Any:
    """`value` with every `StoredTensor` in it read."""
    if isinstance(value, StoredTensor):
        return value.read(0, value.numel).reshape(value.shape)
    if isinstance(value, dict):
        return type(value)((key, materialized(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(materialized(entry) for entry in value)
    return value


def test_plain_values_are_read_from_torchs_files_and_written_for_torch(tmp_path: Path) -> None:
    torch.save(PLAIN, tmp_path / "torch.pt")
    assert read_torch_file(str(tmp_path / "torch.pt")) == PLAIN
    write_torch_file(str(tmp_path / "distft.pt"), PLAIN)
    assert torch.load(tmp_path / "distft.pt", weights_only=False) == PLAIN
    assert read_torch_file(str(tmp_path / "distft.pt")) == PLAIN


def test_ordinary_values_of_scripts_are_read_and_written(tmp_path: Path) -> None:
    """As a DeepSpeed run has them in its client state, scheduler or model."""
    state = torch.nn.Linear(2, 2).state_dict()  # an OrderedDict with an attribute
    saved = {
        "milestones": Counter({3: 1, 5: 2}),
        "arguments": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "z": complex(1, -2),
        "raw": bytearray(b"ab"),
        "empty": b"",
        "state": state,
    }
    arrays: dict[str, Any] = {
        "random": np.random.RandomState(0).get_state(legacy=False)["state"]["key"],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "flags": np.array([True, False]),
    }
    torch.save({**saved, **arrays}, tmp_path / "torch.pt")
    read = read_torch_file(str(tmp_path / "torch.pt"))
    assert {name: read[name] for name in saved if name != "state"} == {
        name: value for name, value in saved.items() if name != "state"
    }
    assert type(read["milestones"]) is Counter
    assert torch.equal(materialized(read["state"])["weight"], state["weight"])
    for name, values in arrays.items():
        np.testing.assert_array_equal(read[name].values, values)
    del read["raw"]
    assert can_pickle(read)
    write_torch_file(str(tmp_path / "distft.pt"), read)
    for back in (
        torch.load(tmp_path / "distft.pt", weights_only=False),
        read_torch_file(str(tmp_path / "distft.pt")),
    ):
        assert back["milestones"] == saved["milestones"]
        assert type(back["milestones"]) is Counter
        assert back["arguments"] == saved["arguments"]
        assert back["z"] == saved["z"]
        for name, values in arrays.items():
            found = back[name].values if isinstance(back[name], NumpyArray) else back[name]
            np.testing.assert_array_equal(found, values)


def test_an_object_of_deepspeed_is_written_under_its_name_without_an_import(tmp_path: Path) -> None:
    scaler = OpaqueObject("deepspeed.runtime.fp16.loss_scaler", "LossScaler", {"cur_scale": 4.0})
    write_torch_file(str(tmp_path / "file.pt"), {"a": scaler, "b": scaler})
    read = read_torch_file(str(tmp_path / "file.pt"))
    assert read["a"] is read["b"]
    assert (read["a"].module, read["a"].name, read["a"].fields) == (scaler.module, scaler.name, scaler.fields)


def test_a_conjugate_view_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.ones(2, dtype=torch.complex64).conj(), tmp_path / "file.pt")
    with pytest.raises(UnsupportedFormatError, match=r"file\.pt: .*conjugate.*resolve_conj"):
        read_torch_file(str(tmp_path / "file.pt"))


def test_another_pickle_protocol_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "file.pt", pickle_protocol=4)
    with pytest.raises(UnsupportedFormatError, match="pickle protocol 4"):
        read_torch_file(str(tmp_path / "file.pt"))


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | inner.map(lambda value: [value, value, (value,)])  # the same object several times
    ),
    max_leaves=30,
)


@given(value=plain_values)
def test_any_plain_value_is_read_as_torch_reads_it(value: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "file.pt"
    torch.save(value, path)
    assert read_torch_file(str(path)) == torch.load(path, weights_only=False)
    write_torch_file(str(path), value)
    assert read_torch_file(str(path)) == value


def test_numpy_scalars_and_default_dicts_are_read_as_plain_values(tmp_path: Path) -> None:
    saved = {
        "lr": np.float64(0.1),
        "step": np.int64(3),
        "map": defaultdict(list, a=[1]),
        "ok": np.bool_(True),
    }
    torch.save(saved, tmp_path / "file.pt")
    assert read_torch_file(str(tmp_path / "file.pt")) == {"lr": 0.1, "step": 3, "map": {"a": [1]}, "ok": True}


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool),
        *(torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
def test_tensors_of_every_dtype_are_read_and_written(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.arange(35).reshape(5, 7) % 3).to(dtype)
    torch.save({"a": values, "empty": values[:0], "scalar": values[1, 1]}, tmp_path / "torch.pt")
    read = read_torch_file(str(tmp_path / "torch.pt"))
    write_torch_file(str(tmp_path / "distft.pt"), read)
    back = torch.load(tmp_path / "distft.pt", weights_only=True)
    for found in (materialized(read), back):
        assert torch.equal(found["a"].view(torch.uint8), values.view(torch.uint8))
        assert found["a"].dtype == dtype
        assert found["empty"].shape == (0, 7)
        assert found["scalar"].item() == values[1, 1].item()


@pytest.mark.parametrize("start", [0, 3, 17])
@pytest.mark.parametrize("stop", [17, 20, 30])
@pytest.mark.parametrize("kind", ["plain", "view", "transposed", "expanded", "strided"])
def test_any_interval_of_a_strided_tensor_equals_that_of_the_flattened_tensor(
    tmp_path: Path, start: int, stop: int, kind: str
) -> None:
    base = torch.arange(60.0)
    tensor = {
        "plain": base[:30].clone().reshape(5, 6),
        "view": base[7:37].reshape(5, 6),
        "transposed": base[7:37].reshape(6, 5).T,
        "expanded": base[7:13].expand(5, 6),
        "strided": base.reshape(10, 6)[::2],
    }[kind]
    torch.save([torch.nn.Parameter(tensor) if kind == "plain" else tensor], tmp_path / "file.pt")
    [stored] = read_torch_file(str(tmp_path / "file.pt"))
    assert stored.shape == (5, 6)
    assert torch.equal(stored.read(start, stop), tensor.detach().reshape(-1)[start:stop])


def test_a_streamed_tensor_is_written_chunk_by_chunk_and_once_for_all_its_names(tmp_path: Path) -> None:
    num_bytes_before: list[int] = []
    reported: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for number in range(4):
            num_bytes_before.append(sum(reported))
            yield torch.full((1000,), float(number))

    tensor = StreamedTensor(torch.float32, (4, 1000), chunks)
    path = tmp_path / "file.pt"
    write_torch_file(str(path), {"a": tensor, "tied": tensor}, on_progress=reported.append)
    first = num_bytes_before[0]  # the pickle, and the header of the tensor
    before = [num_bytes - first for num_bytes in num_bytes_before]
    assert before == [0, 4000, 8000, 12000], "each chunk is computed after the last is written"
    assert sum(reported) == path.stat().st_size
    loaded = torch.load(path, weights_only=True)
    assert loaded["a"].data_ptr() == loaded["tied"].data_ptr()
    assert torch.equal(loaded["a"], torch.arange(4.0)[:, None].expand(4, 1000))
    mapped = torch.load(path, weights_only=True, mmap=True)["a"]
    assert torch.equal(mapped, loaded["a"])
    assert mapped.data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "problem"),
    [
        ((3,), torch.float32, "has 3 elements, but 2 were given"),
        ((2,), torch.int32, "is of torch.int32, but a chunk of torch.float32 was given"),
    ],
)
def test_chunks_that_do_not_match_the_tensor_leave_no_file(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, problem: str
) -> None:
    tensor = StreamedTensor(dtype, shape, lambda: iter([torch.zeros(2)]))
    with pytest.raises(ValueError, match=problem):
        write_torch_file(str(tmp_path / "file.pt"), tensor)
    assert list(tmp_path.iterdir()) == []


def test_other_values_than_plain_data_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pathlib"):
        write_torch_file(str(tmp_path / "file.pt"), {"path": tmp_path})


class Hostile:
    """An object that runs a command when an ordinary unpickler loads it."""

    def __init__(self, target: Path, call: Any = os.system) -> None:
        self._target, self._call = target, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self._call, (f"touch {self._target}",)


class Unknown:
    """A class of the script: harmless, but code."""


@pytest.mark.parametrize(
    "call", [os.system, eval, getattr, torch.load, torch.hub.load], ids=lambda c: c.__name__
)
def test_a_pickle_that_calls_a_function_is_rejected_before_the_call(tmp_path: Path, call: Any) -> None:
    path, mark = tmp_path / "file.pt", tmp_path / "was_here"
    torch.save({"module": torch.ones(2), "evil": Hostile(mark, call)}, path)
    with pytest.raises(
        CheckpointError, match=rf"(?s)file\.pt names .*{call.__name__}.*Nothing was run.*--trust"
    ):
        read_torch_file(str(path))
    assert not mark.exists()


def test_a_name_in_a_missing_package_is_rejected_too(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    _write_pickle(path, b"\x80\x02cno_such_package.deep\nThing\n)\x81.")
    with pytest.raises(CheckpointError, match=r"names no_such_package\.deep\.Thing"):
        read_torch_file(str(path))


@pytest.mark.parametrize("name", ["ds_id\nx", "os.system", "utils.groups.os.system"])
def test_only_listed_names_of_deepspeed_are_allowed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.pt"
    module, _, last = name.replace("\nx", ".x").rpartition(".")
    _write_pickle(path, f"\x80\x02cdeepspeed.{module}\n{last}\n.".encode("latin1"))
    with pytest.raises(CheckpointError, match=r"names deepspeed\."):
        read_torch_file(str(path))


def test_trust_imports_unknown_classes(tmp_path: Path) -> None:
    path, mark = tmp_path / "file.pt", tmp_path / "was_here"
    torch.save(Hostile(mark), path)
    assert read_torch_file(str(path), trust=True) == 0
    assert mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\x00\x00\x00xK\x01ub.",  # sets an attribute
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\nK\x00))tR.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x02(((((",
        b"",
    ],
)
def test_a_malformed_pickle_is_a_clear_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "file.pt"
    _write_pickle(path, text)
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged: torch\.save does not write"):
        read_torch_file(str(path))
    torch.save(torch.ones(3), tmp_path / "next.pt")
    assert materialized(read_torch_file(str(tmp_path / "next.pt"))).sum() == 3


def test_a_tensor_larger_than_its_storage_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        text = archive.read("file/data.pkl").replace(b"K\x04\x85", b"K\x7f\x85")
    _write_pickle(path, text, storage=bytes(16))
    with pytest.raises(CheckpointError, match="127 elements in a storage of 16 bytes"):
        read_torch_file(str(path))


def _write_pickle(path: Path, text: bytes, storage: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text)
        archive.writestr("archive/data/0", storage)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("num_lost", [1, 30, 5000, 9_000])
def test_a_file_that_is_cut_short_is_reported(tmp_path: Path, num_lost: int) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[:-num_lost])
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged or cut short"):
        read_torch_file(str(path))
    assert "is damaged or cut short" in find_torch_file_damage(str(path))[0]


def test_one_flipped_byte_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(2000)}, path)
    assert find_torch_file_damage(str(path)) == []
    flip_bit(path, path.stat().st_size // 2)
    [problem] = find_torch_file_damage(str(path))
    assert "damaged at file/data/0" in problem


def test_each_other_kind_of_file_has_its_own_error(tmp_path: Path) -> None:
    old, missing, text = tmp_path / "old.pt", tmp_path / "missing.pt", tmp_path / "text.pt"
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    text.write_text("hello, this is no checkpoint at all")
    with pytest.raises(CheckpointError, match=r"old\.pt is a bare pickle: torch's old format"):
        read_torch_file(str(old))
    with pytest.raises(CheckpointError, match=r"missing\.pt does not exist"):
        read_torch_file(str(missing))
    with pytest.raises(CheckpointError, match=r"text\.pt is damaged"):
        read_torch_file(str(text))
    zipped = tmp_path / "zipped.pt"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("notes.txt", pickle.dumps(1))
    with pytest.raises(CheckpointError, match=r"zipped\.pt is a zip file without data\.pkl"):
        read_torch_file(str(zipped))
