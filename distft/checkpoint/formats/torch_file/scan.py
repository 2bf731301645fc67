"""Scans a pickle before torch's restricted unpickler reads it: its names, and the work that it asks for.

That unpickler imports nothing, but calls what it knows with any argument, as in `bytearray(10**9)` or `hex`
of `hex` of ... The scan gives each function that a pickle may name a name of distft's, under which the
unpickler finds one that checks its arguments. It follows the opcodes with sizes in place of values, so that
no small pickle describes a large value: one that contains or copies the same parts again and again.
"""

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from distft.errors import CheckpointError, UnsupportedFormatError

PREFIX = "distft"  # module of the names that are given
_PROTOCOL = 2  # of torch.save; torch's restricted unpickler has the opcodes that torch.save uses at it
_MAX_DEPTH = 100  # of lists in lists
# Values, for each byte of the pickle: in the result, and copied by calls. A part counts each time.
_MAX_VALUES_PER_BYTE = 4
_FREE_VALUES = 1 << 20
_TEXT_BYTES = 4  # of a text that count as a value
_GETS, _PUTS = frozenset(["BINGET", "LONG_BINGET"]), frozenset(["BINPUT", "LONG_BINPUT"])
_GROW = frozenset(["APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"])  # change the value below
_COPY = frozenset(["REDUCE", "NEWOBJ", "BUILD"])  # may copy what they get
_TO_MARK = frozenset(["TUPLE", "APPENDS", "SETITEMS"])  # take all values above the last mark
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_KEPT = frozenset(  # as torch knows them: classes that copy no more than they get
    [
        "collections.OrderedDict",
        "collections.Counter",
        *(f"torch.{kind}Storage" for kind in (*_STORAGES, "ComplexDouble", "ComplexFloat")),
    ]
)


def scan_pickle(data: bytes, known: Collection[str], path: str) -> bytes:
    """`data` with the functions and classes in `known` renamed to `PREFIX`.name.

    Raises `UnsupportedFormatError` with the names that are unknown, and `CheckpointError` for a pickle that
    torch.save cannot have written; `path` is for messages.
    """
    scan = _Scan(len(data))
    pieces: list[bytes] = []
    unknown: dict[str, None] = {}
    copied = 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "PROTO" and argument != _PROTOCOL:
                raise UnsupportedFormatError(
                    f"{path} has pickle protocol {argument}, and without running code torch reads "
                    f"{_PROTOCOL} only: load it, and save it with torch.save and its default protocol."
                )
            if opcode.name == "GLOBAL":
                names = str(argument)
                module, _, name = names.partition(" ")
                full = f"{'builtins' if module == '__builtin__' else module}.{name}"
                if full in known:
                    pieces += [data[copied:position], f"c{PREFIX}\n{full}\n".encode()]
                    copied = int(position or 0) + len(names) + 2
                elif full not in _KEPT and not _is_dtype(module, name):
                    unknown[full] = None
            scan.step(opcode, argument)
    except UnsupportedFormatError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        if not unknown:
            raise CheckpointError(
                f"{path} is damaged: torch.save does not write such a pickle ({type(error).__name__}: "
                f"{error}). Use another checkpoint."
            ) from error
    if unknown:
        raise UnsupportedFormatError(
            f"{path} names {', '.join(unknown)}, which {'are' if len(unknown) > 1 else 'is'} not among what "
            "distft reads without running code. Nothing was run. If you trust the file's author, use --trust."
        )
    return b"".join([*pieces, data[copied:]])


def _is_dtype(module: str, name: str) -> bool:
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


@dataclass(slots=True)
class _Value:
    """A value on the stack."""

    size: int = 1  # values in it
    depth: int = 0
    is_open: bool = True  # it may still grow: it belongs to nothing, and nothing names it again


class _Scan:
    """The stack and the memo of an unpickler."""

    def __init__(self, num_bytes: int) -> None:
        self._max_size = self._left = num_bytes * _MAX_VALUES_PER_BYTE + _FREE_VALUES
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name in _PUTS:
            self._memo[argument] = self._stack[-1]
        elif name in _GETS:
            value = self._memo[argument]
            value.is_open = False  # nor can it be among its own items
            self._stack.append(value)
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif opcode.stack_before:
            self._combine(name, opcode)
        elif opcode.stack_after:
            size = len(argument) // _TEXT_BYTES if isinstance(argument, str | bytes) else 0
            self._stack.append(_Value(1 + size))

    def _combine(self, name: str, opcode: pickletools.OpcodeInfo) -> None:
        """Take values from the stack and put them into the value below or into a new one."""
        stack = self._stack
        if name in _TO_MARK:
            start = self._marks.pop()
        else:
            start = len(stack) - len(opcode.stack_before) + (name in _GROW)
        items = stack[start:]
        del stack[start:]
        size = depth = 1
        for item in items:
            item.is_open = False
            size += item.size
            depth = max(depth, item.depth + 1)
        if name in _COPY:
            self._left -= size
        if name in {"SETITEM", "SETITEMS"}:  # hashing goes through all of a tuple
            self._left -= sum(key.size for key in items[::2] if key.depth)
        if name in _GROW:
            target = stack[-1]
            if not target.is_open:
                raise ValueError("a value that changes after it was used")
            target.size, target.depth = target.size + size, max(target.depth, depth)
        else:
            target = _Value(size, depth)
            if opcode.stack_after:
                stack.append(target)
        if self._left < 0 or target.size > self._max_size:
            raise ValueError("it repeats the same values again and again")
        if target.depth > _MAX_DEPTH:
            raise ValueError(f"values nested {target.depth} deep")
