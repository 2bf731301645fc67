"""torch's files against torch itself; hostile and damaged ones."""

import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.checkpoint.formats.torch_file import (
    StoredTensor,
    StreamedTensor,
    read_torch_file,
    torch_file_faults,
    write_torch_file,
)
from distft.errors import CheckpointError

PLAIN: dict[str, Any] = {
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
    """The same with every stored tensor read."""
    if isinstance(value, StoredTensor):
        return value.read(0, value.numel).reshape(value.shape)
    if isinstance(value, dict):
        return type(value)((key, materialized(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(materialized(entry) for entry in value)
    return value


def test_plain_values_come_back_from_torchs_file_and_go_into_one(tmp_path: Path) -> None:
    torch.save(PLAIN, tmp_path / "theirs.pt")
    assert read_torch_file(str(tmp_path / "theirs.pt")) == PLAIN
    write_torch_file(str(tmp_path / "ours.pt"), PLAIN)
    assert torch.load(tmp_path / "ours.pt", weights_only=False) == PLAIN
    assert read_torch_file(str(tmp_path / "ours.pt")) == PLAIN


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
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool],
    ids=str,
)
def test_tensors_of_every_dtype_cross_both_ways(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.arange(35).reshape(5, 7) % 3).to(dtype)
    torch.save({"a": values, "empty": values[:0], "scalar": values[1, 1]}, tmp_path / "theirs.pt")
    read = read_torch_file(str(tmp_path / "theirs.pt"))
    write_torch_file(str(tmp_path / "ours.pt"), read)
    back = torch.load(tmp_path / "ours.pt", weights_only=True)
    for found in (materialized(read), back):
        assert torch.equal(found["a"], values)
        assert found["a"].dtype == dtype
        assert found["empty"].shape == (0, 7)
        assert torch.equal(found["scalar"], values[1, 1])


@pytest.mark.parametrize("start", [0, 3, 17])
@pytest.mark.parametrize("stop", [17, 20, 30])
@pytest.mark.parametrize("kind", ["plain", "view", "transposed", "expanded", "strided"])
def test_any_interval_of_any_layout_is_that_of_the_flattened_tensor(
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


def test_a_tensor_is_written_as_it_is_made_and_shared_where_it_is_the_same(tmp_path: Path) -> None:
    pulled: list[int] = []
    reported: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for part in range(4):
            pulled.append(sum(reported))
            yield torch.full((1000,), float(part))

    tensor = StreamedTensor(torch.float32, (4, 1000), chunks)
    path = tmp_path / "file.pt"
    write_torch_file(str(path), {"a": tensor, "tied": tensor}, on_progress=reported.append)
    assert pulled == [0, 4000, 8000, 12000], "each chunk is asked for when the one before is written"
    loaded = torch.load(path, weights_only=True)
    assert loaded["a"].data_ptr() == loaded["tied"].data_ptr()
    assert torch.equal(loaded["a"], torch.arange(4.0)[:, None].expand(4, 1000))
    mapped = torch.load(path, weights_only=True, mmap=True)["a"]
    assert torch.equal(mapped, loaded["a"])
    assert mapped.data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "what"),
    [
        ((3,), torch.float32, "has 3 elements, and was given 2"),
        ((2,), torch.int32, "was given torch.float32"),
    ],
)
def test_chunks_that_do_not_make_up_the_tensor_leave_no_file(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, what: str
) -> None:
    tensor = StreamedTensor(dtype, shape, lambda: iter([torch.zeros(2)]))
    with pytest.raises(ValueError, match=what):
        write_torch_file(str(tmp_path / "file.pt"), tensor)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_plain_data_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pathlib"):
        write_torch_file(str(tmp_path / "file.pt"), {"path": tmp_path})


class Hostile:
    """Runs a command where an ordinary reader unpickles it."""

    def __init__(self, target: Path, call: Any = os.system) -> None:
        self._target, self._call = target, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self._call, (f"touch {self._target}",)


class Unknown:
    """A class of the script's own: harmless, but it is code."""


@pytest.mark.parametrize(
    "call", [os.system, eval, getattr, torch.load, torch.hub.load], ids=lambda c: c.__name__
)
def test_a_pickle_that_calls_a_function_is_refused_and_calls_nothing(tmp_path: Path, call: Any) -> None:
    path, mark = tmp_path / "file.pt", tmp_path / "was_here"
    torch.save({"module": torch.ones(2), "evil": Hostile(mark, call)}, path)
    with pytest.raises(
        CheckpointError, match=rf"(?s)file\.pt names .*{call.__name__}.*Nothing was run.*--trust"
    ):
        read_torch_file(str(path))
    assert not mark.exists()


def test_a_name_in_a_package_that_does_not_exist_is_refused_in_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    _write_pickle(path, b"\x80\x02cno_such_package.deep\nThing\n)\x81.")
    with pytest.raises(CheckpointError, match=r"names no_such_package\.deep\.Thing"):
        read_torch_file(str(path))


@pytest.mark.parametrize("name", ["ds_id\nx", "os.system", "utils.groups.os.system"])
def test_the_allowed_packages_allow_no_more_than_the_names_that_are_listed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.pt"
    module, _, last = name.replace("\nx", ".x").rpartition(".")
    _write_pickle(path, f"\x80\x02cdeepspeed.{module}\n{last}\n.".encode("latin1"))
    with pytest.raises(CheckpointError, match=r"names deepspeed\."):
        read_torch_file(str(path))


def test_trust_lets_unknown_classes_be_imported(tmp_path: Path) -> None:
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
def test_a_pickle_that_makes_no_sense_is_a_clear_error_or_harmless(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "file.pt"
    _write_pickle(path, text)
    if b"ub." not in text:
        with pytest.raises(CheckpointError, match=r"file\.pt does not hold what torch\.save writes"):
            read_torch_file(str(path))
    else:
        read_torch_file(str(path))
        torch.save(torch.ones(3), tmp_path / "next.pt")
        assert materialized(read_torch_file(str(tmp_path / "next.pt"))).sum() == 3


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
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
def test_a_file_that_was_cut_short_is_named(tmp_path: Path, num_lost: int) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[:-num_lost])
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged or cut short"):
        read_torch_file(str(path))
    assert "is damaged or cut short" in torch_file_faults(str(path))[0]


def test_one_flipped_byte_of_a_tensor_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(2000)}, path)
    assert torch_file_faults(str(path)) == []
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    [fault] = torch_file_faults(str(path))
    assert "damaged at file/data/0" in fault


def test_other_kinds_of_file_are_told_apart(tmp_path: Path) -> None:
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
