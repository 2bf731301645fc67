"""Puts the tokens and special ids that lie beside a sentencepiece model into the model itself.

The tokens become pieces that are always one id; special ids that sentencepiece cannot express become a field
of our own. So one file holds the whole vocabulary, wherever it is copied.
"""

from collections.abc import Mapping

from distft.errors import DataError
from distft.tokenizer.companions import Companions
from distft.tokenizer.files import LIBRARY_FILE
from distft.tokenizer.model_proto import (
    ADDED,
    PIECES,
    SPECIAL_NAMES,
    ModelProto,
    PieceType,
    encode_added,
    encode_piece,
)
from distft.tokenizer.pretokenization import META_SPACE
from distft.tokenizer.protobuf import encode_field, fields_of

_MAX_GAP = 1024  # ids without a token between the model's pieces and the added ones
_MAX_SHOWN = 3
_OF_ORDINARY_TEXT = (PieceType.NORMAL, PieceType.BYTE, PieceType.UNKNOWN)
_WITHOUT_TEXT = (PieceType.CONTROL, PieceType.UNUSED)


def with_added_tokens(
    model: bytes,
    proto: ModelProto,
    special_ids: Mapping[str, int | None],
    found: Companions,
    *,
    is_export: bool = False,
) -> tuple[bytes, list[str]]:
    """`model` with the tokens and special ids of `found`, and notes on what it cannot represent.

    Returns `model` itself if they add nothing. Beside an export of distft (`is_export`), pieces that no text
    contains stay such, though transformers finds them. Raises `DataError` if they are of another vocabulary.
    """
    _check_same_vocabulary(proto, found)
    special_ids = {name: special_ids[name] for name in SPECIAL_NAMES}
    own = {i for i in special_ids.values() if i is not None}
    changed, added = _changed_pieces(proto, found, own, is_export=is_export)
    ids = {text: index for index, text in found.tokens.items()}
    for index, piece in enumerate(proto.pieces):
        ids.setdefault(piece.text, index)
    notes = []
    wanted = dict(special_ids)
    for name, text in found.special.items():
        if text in ids:
            wanted[name] = ids[text]
        else:
            notes.append(f"{name}_token {text!r} has no id in the files beside the model: it is left out.")
    stripping = [text for text in found.stripping if ids[text] in changed or ids[text] >= len(proto.pieces)]
    if stripping:
        notes.append(
            f"{_some(stripping)} {'take' if len(stripping) > 1 else 'takes'} the white space beside "
            f"{'them' if len(stripping) > 1 else 'it'} in transformers: here it stays part of the text."
        )
    if not changed and not added and wanted == special_ids:
        return model, notes
    return _rewritten(model, changed, added, wanted), notes


def _check_same_vocabulary(proto: ModelProto, found: Companions) -> None:
    num_pieces = len(proto.pieces)
    for text, index in (found.vocabulary or {}).items():
        plain = text.replace(" ", META_SPACE)  # our own export has plain spaces
        if index < num_pieces and index not in found.tokens and plain != proto.pieces[index].text:
            raise DataError(
                f"{LIBRARY_FILE} beside it has another vocabulary: id {index} is {text[:40]!r} there and "
                f"{proto.pieces[index].text[:40]!r} in the model. If the file does not belong to the model, "
                "copy the model into a directory of its own."
            )


def _changed_pieces(
    proto: ModelProto, found: Companions, special_ids: set[int], *, is_export: bool
) -> tuple[dict[int, str], dict[int, str]]:
    """Pieces of the model that become tokens, and tokens after its last piece; texts by id."""
    changed, added = {}, {}
    num_pieces = len(proto.pieces)
    of_model = {piece.text: index for index, piece in enumerate(proto.pieces)}
    for index, token in found.tokens.items():
        text = token.replace(" ", META_SPACE)
        if index >= num_pieces + len(found.tokens) + _MAX_GAP:
            raise _not_of_this_model(found, index, f"the model has only {num_pieces} pieces")
        if of_model.get(text, index) != index:
            raise _not_of_this_model(found, index, f"in the model it has {of_model[text]}")
        if index >= num_pieces:
            added[index] = text
            continue
        piece = proto.pieces[index]
        if piece.text != text and piece.type in _OF_ORDINARY_TEXT:
            raise _not_of_this_model(found, index, f"the model's piece {index} is {piece.text[:40]!r}")
        # The model's own bos, eos and so on stay pieces that no text contains.
        becomes_token = piece.type in _WITHOUT_TEXT and index not in special_ids and not is_export
        if piece.text != text or becomes_token:
            changed[index] = text
    return changed, added


def _not_of_this_model(found: Companions, index: int, but: str) -> DataError:
    return DataError(
        f"the files beside it ({', '.join(found.names)}) give {found.tokens[index][:40]!r} the id {index}, "
        f"but {but}. If they do not belong to the model, copy it into a directory of its own."
    )


def _rewritten(
    model: bytes,
    changed: Mapping[int, str],
    added: Mapping[int, str],
    special_ids: Mapping[str, int | None],
) -> bytes:
    parts, num_pieces = [], 0
    for number, value in fields_of(model):
        if number == PIECES and num_pieces in changed:
            parts.append(encode_field(PIECES, encode_piece(changed[num_pieces], PieceType.USER_DEFINED)))
        elif number != ADDED:
            parts.append(encode_field(number, value))
        num_pieces += number == PIECES
    for index in range(num_pieces, max(added, default=-1) + 1):
        text, kind = f"<no_token_{index}>", PieceType.CONTROL  # an id that no text has
        if index in added:
            text, kind = added[index], PieceType.USER_DEFINED
        parts.append(encode_field(PIECES, encode_piece(text, kind)))
    parts.append(encode_field(ADDED, encode_added(special_ids)))
    return b"".join(parts)


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - _MAX_SHOWN} more" if len(texts) > _MAX_SHOWN else ""
    return ", ".join(map(repr, texts[:_MAX_SHOWN])) + more
