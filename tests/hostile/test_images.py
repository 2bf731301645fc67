"""Hostile images: files that would fill the memory, pipes, circles of links, names of control characters."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hostile.guard import Guard

READ = "hostile.image_readers:read_folder"
MIB = 1 << 20


def zlib_of_zeros(num_mib: int) -> bytes:
    compressor = zlib.compressobj(9)
    return b"".join(compressor.compress(bytes(MIB)) for _ in range(num_mib)) + compressor.flush()


def png(size: tuple[int, int] = (8, 8), *chunks: tuple[bytes, bytes], num_mib: int = 0) -> bytes:
    """A grey PNG that declares a size, with more chunks, of `num_mib` MiB of pixels, or what it needs."""
    pixels = zlib_of_zeros(num_mib) if num_mib else zlib.compress(bytes(9 * 8))
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


BOMBS: list[tuple[str, Callable[[], bytes], str | None]] = [
    ("declares 60,000 x 60,000", lambda: png((60_000, 60_000)), "declares far more pixels"),
    ("declares 12,000 x 12,000", lambda: png((12_000, 12_000), num_mib=140), "has 12000 x 12000 pixels"),
    ("has 1 GiB of pixels behind its own", lambda: png(num_mib=1024), None),
    ("has 1 GiB of text", lambda: png((8, 8), (b"zTXt", b"a\0\0" + zlib_of_zeros(1024))), "is damaged"),
    ("has 1 GiB of a profile", lambda: png((8, 8), (b"iCCP", b"a\0\0" + zlib_of_zeros(1024))), None),
    (
        "a BMP of 60,000 x 60,000",
        lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
        "pixels",
    ),
    ("a PPM of many digits", lambda: b"P5 " + b"9" * MIB + b" 8 255 ", "is damaged"),
]


@pytest.mark.parametrize(
    ("content", "problem"), [bomb[1:] for bomb in BOMBS], ids=[bomb[0] for bomb in BOMBS]
)
def test_a_small_file_does_not_fill_the_memory(
    guard: Guard, tmp_path: Path, content: Callable[[], bytes], problem: str | None
) -> None:
    path = tmp_path / "images" / "cat" / ("a.png" if content()[:1] == b"\x89" else "a.ppm")
    path.parent.mkdir(parents=True)
    path.write_bytes(content())
    outcome = guard.run(READ, str(tmp_path / "images"), directories=[tmp_path], memory_mb=250)
    if problem is None:
        outcome.check()
        assert outcome.returned == 1 or outcome.is_refused
    else:
        outcome.check_refused(str(path), problem)
    assert outcome.added_mb < 100


def test_what_is_no_file_is_refused_and_never_waited_for(guard: Guard, tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    folder.mkdir()
    os.mkfifo(folder / "a.png")
    (folder / "b.png").symlink_to("/dev/zero")
    (folder / "c.png").symlink_to("nowhere")
    (folder / "up").symlink_to("..")
    outcome = guard.run(READ, str(tmp_path), directories=[tmp_path], seconds=10)
    outcome.check_refused(*(f"{name}: is no image file" for name in ("a.png", "b.png", "up")))
    outcome.check_refused("c.png: is a link to nothing")


def test_names_in_messages_cannot_control_a_terminal(guard: Guard, tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    folder.mkdir()
    (folder / "\x1b[2J.png").write_bytes(b"")
    outcome = guard.run(READ, str(tmp_path), directories=[tmp_path])
    outcome.check_refused("is no image of a kind that is read")
    assert "\x1b" not in outcome.message


def test_a_small_parquet_file_with_a_large_image_is_read_in_bounded_memory(
    guard: Guard, tmp_path: Path
) -> None:
    path = tmp_path / "images.parquet"
    images = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 64, pyarrow.int32()),
        pyarrow.array([png((8, 8), (b"zTXt", b"a\0\0" + bytes(MIB)))]),
    )
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": ["a"] * 64}), path)
    outcome = guard.run(READ, str(path), directories=[tmp_path], memory_mb=700)
    outcome.check()
