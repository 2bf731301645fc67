"""WordPiece and byte-level BPE against transformers, which uses the same library in its own way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.library_tokenizers import TEXTS, WRITERS

from distft.errors import ConfigError, DataError
from distft.tokenizer import Tokenizer, import_tokenizer
from distft.tokenizer.files import find_tokenizer_file

KINDS = tuple(WRITERS)
BYTE_LEVEL = ("gpt2", "llama3")  # without a normalizer or tokens that take the white space beside them
IDS: dict[str, dict[str, str | None]] = {  # what stands for each role
    "gpt2": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": None, "unk": None},
    "roberta": {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"},
    "llama3": {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": None, "unk": None},
    "qwen": {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>", "unk": None},
    "bert": {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"},
    "modernbert": {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"},
    "vocab.txt": {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"},
}
PIECES = (
    "<mask>",
    "[MASK]",
    "[SEP]",
    "<|endoftext|>",
    "<|im_end|>",
    "</s>",
    "it's",
    "  ",
    "\r\n",
    "12345",
    "trout ",
)
texts = st.lists(
    st.one_of(
        st.sampled_from([*PIECES, *" ".join(TEXTS).split()]),
        st.text(st.characters(codec="utf-8"), max_size=6),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind, write in WRITERS.items():
        found[kind] = tmp_path_factory.mktemp(kind.replace(".", "_"))
        write(found[kind])
    return found


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {kind: AutoTokenizer.from_pretrained(str(folder)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(
    kind: str, ours: dict[str, Tokenizer], theirs: dict[str, Any]
) -> None:
    tokenizer, other = ours[kind], theirs[kind]
    control = {getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}

    @given(text=texts)
    @settings(deadline=None, max_examples=60)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == other(text, add_special_tokens=False, truncation=False)["input_ids"]
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        shown = [index for index in ids if index not in control]
        assert tokenizer.decode(ids) == other.decode(shown, clean_up_tokenization_spaces=False)
        assert tokenizer.encode_batch([text, text], num_threads=2) == [ids, ids]

    check()
    long = " ".join(TEXTS) * 100  # encoded in another way
    assert tokenizer.encode(long) == other(long, add_special_tokens=False, truncation=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_and_sizes_are_those_of_transformers(
    kind: str, ours: dict[str, Tokenizer], theirs: dict[str, Any]
) -> None:
    tokenizer, other = ours[kind], theirs[kind]
    for name, text in IDS[kind].items():
        expected = None if text is None else other.convert_tokens_to_ids(text)
        assert getattr(tokenizer, f"{name}_id") == expected
        assert text is None or tokenizer.piece_id(text) == expected
    assert tokenizer.vocab_size == len(other) == len(tokenizer.piece_texts)
    assert list(tokenizer.piece_texts) == other.convert_ids_to_tokens(list(range(len(other))))
    begins = other("a")["input_ids"][0] == tokenizer.bos_id
    assert tokenizer.adds_bos == begins
    has_mask = kind in {"bert", "vocab.txt", "modernbert"}
    assert tokenizer.piece_id("[MASK]") == (other.mask_token_id if has_mask else None)
    assert tokenizer.padding_id() is not None


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(text=texts)
@settings(deadline=None, max_examples=100)
def test_byte_level_bpe_loses_nothing_and_counts_every_byte(
    kind: str, ours: dict[str, Tokenizer], text: str
) -> None:
    tokenizer = ours[kind]
    text = text.replace("<|endoftext|>", "")
    ids = tokenizer.encode(text)
    assert tokenizer.is_lossless
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_only_tokenizers_that_lose_nothing_say_so(ours: dict[str, Tokenizer]) -> None:
    assert {kind for kind in KINDS if ours[kind].is_lossless} == set(BYTE_LEVEL)


def test_words_begin_where_the_pieces_say(ours: dict[str, Tokenizer]) -> None:
    text = "unknowingly, happily and happiest fish"
    for kind in ("gpt2", "bert"):
        tokenizer = ours[kind]
        ids = tokenizer.encode(" " + text)
        starts = tokenizer.starts_word()[ids]
        words: list[list[int]] = []
        for index, is_start in zip(ids, starts, strict=True):
            if is_start:
                words.append([])
            words[-1].append(index)
        words_of_bert = ["unknowingly", ",", "happily", "and", "happiest", "fish"]
        found = [tokenizer.decode(word).strip() for word in words]
        assert found == (words_of_bert if kind == "bert" else text.split())
        assert any(len(word) > 1 for word in words)


def test_a_text_cut_within_a_character_has_a_replacement(ours: dict[str, Tokenizer]) -> None:
    ids = ours["gpt2"].encode("\U0001f41f")
    assert len(ids) > 1
    assert ours["gpt2"].decode(ids[:-1]) == "\ufffd"
    with pytest.raises(DataError, match=r"token id 9999 is outside the vocabulary"):
        ours["gpt2"].decode([9999])
    with pytest.raises(DataError, match=r"character 1 of a text is the lone surrogate U\+D83D"):
        ours["gpt2"].encode("a\ud83d")


@pytest.mark.parametrize("kind", KINDS)
def test_its_files_are_the_tokenizer_and_are_written_as_they_were_read(
    kind: str, folders: dict[str, Path], ours: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer = ours[kind]
    copy = import_tokenizer(folders[kind], tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy" / "tokenizer.json")
    assert copy.fingerprint == again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert (again.bos_id, again.eos_id, again.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    files, notes = tokenizer.huggingface_files(max_seq_len=64, begins_with_bos=tokenizer.adds_bos)
    assert notes == []
    for name, data in files.items():
        assert (tmp_path / "copy" / name).read_bytes() == data
        if (folders[kind] / name).exists():
            assert (folders[kind] / name).read_bytes() == data
    assert "tokenizer.json" in files
    (note,) = tokenizer.huggingface_files(max_seq_len=64, begins_with_bos=not tokenizer.adds_bos)[1]
    assert "before a text, which training did" in note


def test_fingerprints_are_of_what_decides_about_ids(
    folders: dict[str, Path], ours: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Equal ones must mean equal encodings; shards and checkpoints have them, so they must not change."""
    assert len({tokenizer.fingerprint for tokenizer in ours.values()}) == len(KINDS)
    raw = json.loads((folders["bert"] / "tokenizer.json").read_bytes())

    def fingerprint(**changes: Any) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, **changes}))
        return Tokenizer.load(tmp_path / "tokenizer.json").fingerprint

    same = [fingerprint(), fingerprint(truncation=None, padding=None), fingerprint(version="2.0")]
    assert set(same) == {ours["bert"].fingerprint}
    lower = {**raw["normalizer"], "lowercase": True}
    assert fingerprint(normalizer=lower) != same[0]
    swapped = dict(raw["model"]["vocab"])
    first, second = list(swapped)[-2:]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    assert fingerprint(model={**raw["model"], "vocab": swapped}) != same[0]
    small = {"type": "WordPiece", "unk_token": "u", "vocab": {"u": 0, "a": 1}}
    small |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    simple = {"normalizer": None, "pre_tokenizer": None, "decoder": None, "added_tokens": []}
    assert fingerprint(**simple, model=small) == "3fea6dab38cf82cfba39984e087c9ed2"


def test_settings_that_are_not_applied_are_told(ours: dict[str, Tokenizer]) -> None:
    (note,) = ours["bert"].notes
    assert note.startswith("tokenizer.json has truncation and padding, which batch.seq_len decides here")
    assert not any(ours[kind].notes for kind in KINDS if kind != "bert")


def test_the_settings_of_tokenizer_config_count_as_in_transformers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    tokenizer = Tokenizer.load(tmp_path / "gpt2")
    assert tokenizer.encode("fish") == Tokenizer.load(folders["gpt2"]).encode(" fish")
    assert not tokenizer.is_lossless
    shutil.copytree(folders["vocab.txt"], tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert Tokenizer.load(tmp_path / "bert").encode("It") != Tokenizer.load(folders["vocab.txt"]).encode("It")


def test_a_directory_prefers_its_sentencepiece_model_but_not_one_of_tiktoken(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    found = {kind: find_tokenizer_file(folder) for kind, folder in folders.items()}
    assert found.pop("gpt2") == "vocab.json"
    assert found.pop("vocab.txt") == "vocab.txt"
    assert set(found.values()) == {"tokenizer.json"}  # Llama 3's tokenizer.model is of tiktoken
    assert find_tokenizer_file(tmp_path) is None
    with pytest.raises(DataError, match=r"a directory without a tokenizer: it has neither tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer_file(tmp_path) == "tokenizer.model"


def test_vocabularies_of_another_class_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gpt2"], tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(DataError, match=r"says Qwen2Tokenizer, whose tokenizer\.json is needed"):
        Tokenizer.load(tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    (tmp_path / "a" / "merges.txt").unlink()
    with pytest.raises(
        DataError, match=r"merges\.txt is missing: vocab\.json and merges\.txt belong together"
    ):
        Tokenizer.load(tmp_path / "a" / "vocab.json")


def test_an_import_writes_a_directory_and_replaces_nothing_else(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"consists of tokenizer\.json.*: name a directory"):
        import_tokenizer(folders["bert"], tmp_path / "bert.model")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "tokenizer.json").write_text("mine")
    with pytest.raises(ConfigError, match="is no tokenizer, so it is not overwritten"):
        import_tokenizer(folders["bert"], tmp_path / "x")
    assert (tmp_path / "x" / "tokenizer.json").read_text() == "mine"
