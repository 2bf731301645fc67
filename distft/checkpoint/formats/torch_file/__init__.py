"""Torch's `.pt` files: read by torch's restricted unpickler, and written chunk by chunk.

torch.load(mmap=True) needs the whole file on this machine. distft has torch read the pickle alone, and then
reads of each tensor what is wanted of it, from the file or the URL. For an eighth of a file of 256 MiB on S3
that is 33.7 MB in place of 268.4 MB, and no space on the disk.
"""

from distft.checkpoint.formats.torch_file.archive import find_torch_file_damage
from distft.checkpoint.formats.torch_file.pickler import can_pickle
from distft.checkpoint.formats.torch_file.reader import read_torch_file
from distft.checkpoint.formats.torch_file.values import NumpyArray, OpaqueObject, StoredTensor, StreamedTensor
from distft.checkpoint.formats.torch_file.writer import CHUNK_NUMEL, write_torch_file

__all__ = [
    "CHUNK_NUMEL",
    "NumpyArray",
    "OpaqueObject",
    "StoredTensor",
    "StreamedTensor",
    "can_pickle",
    "find_torch_file_damage",
    "read_torch_file",
    "write_torch_file",
]
