"""The tokenizer in a model directory of transformers."""

from distft import storage
from distft.checkpoint.manifest import TokenizerRecord
from distft.errors import DataError
from distft.tokenizer import Tokenizer
from distft.tokenizer.files import SENTENCEPIECE_FILE, T5_FILE, find_tokenizer_file
from distft.tokenizer.library_json import UnknownKindError
from distft.tokenizer.model_proto import parse_model_proto


def find_tokenizer(path: str) -> TokenizerRecord | None:
    """The directory's tokenizer, with what the files beside it add to it.

    None if there is none, or one of a kind that distft does not read: a run can then have one of its own.
    Raises `DataError` for a damaged one, a git-LFS pointer, and for files of another model beside it.
    """
    name = find_tokenizer_file(path)
    if name is None:
        return None
    where = storage.join(path, name)
    try:
        tokenizer = Tokenizer.load(where)
    except UnknownKindError:
        return None
    except DataError:
        if name in {SENTENCEPIECE_FILE, T5_FILE} and not _is_sentencepiece(where):
            return None
        raise
    return TokenizerRecord(
        fingerprint=tokenizer.fingerprint,
        file=name,
        document_start=() if tokenizer.bos_id is None or not tokenizer.adds_bos else (tokenizer.bos_id,),
    )


def _is_sentencepiece(path: str) -> bool:
    """Whether what is wrong is beside the model; also for a git-LFS pointer, which may stand for one."""
    storage.check_not_lfs_pointer(path)
    try:
        parse_model_proto(storage.read_bytes(path))
    except DataError:
        return False
    return True
