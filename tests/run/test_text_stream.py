"""Texts of new tokens, whole and piece by piece."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.library_tokenizers import TEXTS, write_llama3

from distft.run.text_stream import Stops, TextStream
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, train_tokenizer

KINDS = ("library", "sentencepiece")
texts = st.lists(
    st.one_of(st.sampled_from([*TEXTS, "😀", "東京", " ", "\n\n", "ab", "aab"]), st.text(max_size=6)),
    max_size=6,
).map(lambda parts: "".join(parts).encode("utf-8", "replace").decode())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_llama3(folder)
    model = folder / "own" / "tokenizer.model"
    own = train_tokenizer(TEXTS, TokenizerTrainConfig(algorithm="bpe", vocab_size=400), model)
    return {"library": Tokenizer.load(folder), "sentencepiece": own}


@pytest.mark.parametrize("kind", KINDS)
@given(
    prompt=texts,
    text=texts,
    stop=st.lists(st.sampled_from(["ab", "aac", "京", "\n\n", "The lake has"]), unique=True, max_size=2),
    cut=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_the_pieces_are_the_text_up_to_the_first_stop_text_and_never_half_a_character(
    tokenizers: dict[str, Tokenizer], kind: str, prompt: str, text: str, stop: list[str], cut: int
) -> None:
    tokenizer = tokenizers[kind]
    before, new = tokenizer.encode(prompt), tokenizer.encode(text)
    new = new[: len(new) - cut]  # perhaps within a character
    stream = TextStream(tokenizer, before, stop)
    pieces = [stream.push(token) for token in new]
    whole = "".join(pieces)
    if "\ufffd" not in text:
        assert "\ufffd" not in whole
    assert not any(end in whole for end in stop)
    assert whole + stream.finish() == Stops(tokenizer, [before], stop).cut(0, new)


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_as_soon_as_it_is_certain(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    stream = TextStream(tokenizer, [], ["fish and chips"])
    pieces = [stream.push(token) for token in tokenizer.encode("a 😀 fish and don't")]
    assert "".join(pieces) == "a 😀 fish and don't"
    assert sum(bool(piece) for piece in pieces) > 3
    shown = ""
    for token in tokenizer.encode("some fish and chi"):
        shown += stream.push(token)
    assert shown == "some "
    assert stream.finish() == "fish and chi"


def test_a_token_that_ends_a_text_is_not_part_of_it(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["library"]
    end = tokenizer.piece_id("<|eot_id|>")
    assert end is not None
    stops = Stops(tokenizer, [[]], [], (end,))
    new = tokenizer.encode("fish")
    assert not stops.is_finished(0, new)
    assert stops.is_finished(0, [*new, end])
    assert stops.cut(0, [*new, end]) == stops.cut(0, new) == "fish"
