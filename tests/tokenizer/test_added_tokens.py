"""The ids that lie beside a sentencepiece model of transformers, against transformers itself."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.errors import DataError
from distft.tokenizer import Tokenizer, import_tokenizer
from distft.tokenizer.huggingface_export import huggingface_files as tokenizer_files
from distft.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

WORDS = "lake river trout perch known little more and for its the".split()  # noqa: SIM905
CHATML = {"<|im_start|>": 320, "<|im_end|>": 321, "<pad>": 322}
texts = st.lists(
    st.sampled_from([*WORDS, *CHATML, " ", "\n", "lak", "<|im_", "\u00e9", "</s>x"[4:]]), max_size=8
).map("".join)


def model_bytes(**changes: Any) -> bytes:
    model = io.BytesIO()
    settings_: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 320,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3),
        model_writer=model,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **settings_ | changes,
    )
    return model.getvalue()


def write_companions(folder: Path, tokens: dict[str, int], **flags: Any) -> None:
    own = {"<unk>": 0, "<s>": 1, "</s>": 2}
    off = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    special = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "add_bos_token": True,
                "added_tokens_decoder": {
                    str(i): {"content": text, **off, **flags} for text, i in {**own, **tokens}.items()
                },
                **special,
            }
        )
    )
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**special, "eos_token": {"content": "<|im_end|>"}})
    )


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-style model whose ChatML tokens, eos and pad lie beside it."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "tokenizer.model").write_bytes(model_bytes())
    write_companions(folder, CHATML)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def theirs(chat: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(chat))


@pytest.fixture(scope="module")
def exported(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("exported")
    files, notes = tokenizer_files(Tokenizer.load(chat / "tokenizer.model"), max_seq_len=64)
    assert notes == []
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(str(folder)), folder


@given(text=texts.filter(lambda text: not text.startswith(" ")))  # there transformers adds no second space
@settings(deadline=None)
def test_ids_are_those_of_transformers(chat: Path, theirs: Any, text: str) -> None:
    ours = Tokenizer.load(chat / "tokenizer.model")
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch([text, text], num_threads=2) == [ids, ids]
    assert ours.decode(ids) == text


@given(text=texts)
@settings(deadline=None)
def test_ids_of_an_export_are_ours(chat: Path, exported: Any, text: str) -> None:
    ids = Tokenizer.load(chat / "tokenizer.model").encode(text)
    assert exported[0](text)["input_ids"] == ids
    assert exported[0].decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_ids_are_those_of_transformers_and_one_file_holds_them(
    chat: Path, theirs: Any, exported: Any, tmp_path: Path
) -> None:
    import_tokenizer(chat / "tokenizer.model", tmp_path / "alone.model")
    for found in (Tokenizer.load(p) for p in (chat / "tokenizer.model", tmp_path / "alone.model")):
        assert (found.bos_id, found.eos_id, found.pad_id) == (1, 321, 322)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 321, 322)
        assert found.vocab_size == 323
        assert found.encode("<|im_end|>") == [321]
    bare = SentencePieceTokenizer((chat / "tokenizer.model").read_bytes())
    with_tokens = Tokenizer.load(chat / "tokenizer.model")
    assert bare.fingerprint != with_tokens.fingerprint
    assert with_tokens.fingerprint == Tokenizer.load(tmp_path / "alone.model").fingerprint
    assert with_tokens.fingerprint == Tokenizer.load(exported[1] / "tokenizer.model").fingerprint
    assert with_tokens.adds_bos


def test_a_control_piece_that_transformers_finds_in_a_text_becomes_a_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(control_symbols=["[INST]"]))
    assert Tokenizer.load(tmp_path / "tokenizer.model").encode("[INST]") != [3]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[INST]": 3}))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    assert tokenizer.encode("[INST]") == [3]
    assert tokenizer.encode("</s>") != [2]  # a text cannot end itself


def test_tokens_that_take_the_spaces_beside_them_are_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes())
    write_companions(tmp_path, CHATML, rstrip=True)
    (note,) = Tokenizer.load(tmp_path / "tokenizer.model").notes
    assert "'<|im_start|>', '<|im_end|>', '<pad>' take the white space beside them" in note


BAD: dict[str, tuple[str, Any, str]] = {
    "another vocabulary": ("tokenizer.json", {"model": {"vocab": {"zzz": 300}}}, "id 300 is 'zzz' there"),
    "the id of a piece": ("added_tokens.json", {"<|x|>": 300}, "the model's piece 300 is"),
    "a piece with another id": ("added_tokens.json", {"<s>": 320}, "in the model it has 1"),
    "far above": ("added_tokens.json", {"<|x|>": 2**40}, "the model has only 320 pieces"),
    "a negative id": ("added_tokens.json", {"<|x|>": -1}, "'-1' is not an id"),
    "no id": ("added_tokens.json", {"<|x|>": "y"}, "'y' is not an id"),
    "half a character": ("added_tokens.json", {"\ud83d": 320}, "lone surrogate"),
    "not an object": ("tokenizer_config.json", [], "not an object"),
    "no content": ("tokenizer.json", {"added_tokens": [{"id": 320}]}, "not as transformers writes it"),
    "a number": ("special_tokens_map.json", {"eos_token": 3}, "'3' is not a token's text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_of_another_model_or_of_no_model_are_told(tmp_path: Path, kind: str) -> None:
    name, content, message = BAD[kind]
    (tmp_path / "tokenizer.model").write_bytes(model_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError) as raised:
        Tokenizer.load(tmp_path / "tokenizer.model")
    assert name in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
        ("[" * 200_000, "nested too deeply"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_beside_the_model_that_is_none_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / "tokenizer.model")


def test_a_tokenizer_of_another_kind_is_answered_with_what_can_be_done(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}})
    )
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(
            DataError, match=r"is Unigram.* get the tokenizer\.model that was published with it"
        ):
            Tokenizer.load(path)
    with pytest.raises(DataError, match=r"has a tokenizer\.json: name that"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    (tmp_path / "a.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"a\.model is a git-LFS pointer"):
        Tokenizer.load(tmp_path / "a.model")
