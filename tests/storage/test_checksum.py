"""A checksum computed while writing equals that of the file, and detects every flipped bit."""

from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from distft import storage
from distft.errors import StorageError


@given(st.lists(st.binary(max_size=50)))
def test_the_checksum_does_not_depend_on_the_sizes_of_the_writes(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    with storage.open_write("memory://checksum/a") as file:
        writer = storage.ChecksumWriter(file)
        for chunk in chunks:
            writer.write(chunk)
    assert storage.read_bytes("memory://checksum/a") == whole
    assert writer.num_bytes == len(whole)
    assert writer.checksum == f"xxh3:{xxhash.xxh3_64_hexdigest(whole)}" == storage.checksum_of_bytes(whole)
    assert writer.checksum == storage.checksum_of("memory://checksum/a")
    storage.verify("memory://checksum/a", checksum=writer.checksum, num_bytes=writer.num_bytes)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_one_flipped_bit_is_detected(content: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, 8 * len(content) - 1))
    damaged = bytearray(content)
    damaged[position // 8] ^= 1 << position % 8
    storage.commit_bytes("memory://checksum/b", bytes(damaged))
    with pytest.raises(StorageError, match="is damaged"):
        storage.verify("memory://checksum/b", checksum=storage.checksum_of_bytes(content))


def test_missing_and_short_files_and_foreign_checksums_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(StorageError, match="is missing"):
        storage.verify(path, checksum="xxh3:0000000000000000")
    path.write_bytes(b"abc")
    with pytest.raises(StorageError, match="has 3 bytes instead of 4"):
        storage.verify(path, checksum="xxh3:0000000000000000", num_bytes=4)
    with pytest.raises(StorageError, match="does not have the form"):
        storage.verify(path, checksum="md5:00")
