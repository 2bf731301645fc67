"""Chat templates against transformers' `apply_chat_template`: the same tokens, those of the assistant too."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import (
    ALL,
    CHATML,
    CHATML_MARKED,
    GROWING,
    LLAMA,
    MISTRAL,
    THINKING,
    TOOLS,
    WITH_TOOLS,
)
from support.library_tokenizers import TEXTS, write_qwen

from distft.errors import ConfigError, DataError
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, import_tokenizer, train_tokenizer
from distft.tokenizer.chat import Chat
from distft.tokenizer.chat_template import ChatTemplate
from distft.tokenizer.template_files import PLAIN_TEMPLATE, read_template

KINDS = ("library", "sentencepiece")
DATED = {"date_string": "1 Jan 2026"}
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<s>",
    "{{ x }}",
    "{% raw %}",
    "\n\n",
    " ",
    "😀",
]
contents = st.lists(
    st.one_of(
        st.sampled_from(MARKS), st.text(st.characters(codec="utf-8"), max_size=6), st.sampled_from(TEXTS)
    ),
    min_size=1,
    max_size=4,
).map("".join)
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


def messages_of(system: str | None, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("library")
    write_qwen(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|endoftext|>"}))
    settings_ = TokenizerTrainConfig(
        algorithm="bpe", vocab_size=400, user_defined_symbols=("<|im_start|>", "<|im_end|>", "<|eot_id|>")
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    return {"library": Tokenizer.load(folder), "sentencepiece": train_tokenizer(TEXTS, settings_, path)}


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import AutoTokenizer

    found = {}
    for kind, tokenizer in ours.items():
        folder = tmp_path_factory.mktemp(f"exported_{kind}")
        for name, data in tokenizer.huggingface_files(max_seq_len=64)[0].items():
            (folder / name).write_bytes(data)
        found[kind] = AutoTokenizer.from_pretrained(str(folder))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
@given(system=st.none() | contents, pairs=turns)
@settings(max_examples=15, deadline=None)
def test_tokens_are_those_of_transformers(
    ours: dict[str, Tokenizer],
    theirs: dict[str, Any],
    kind: str,
    name: str,
    system: str | None,
    pairs: list[Any],
) -> None:
    if name == "mistral":
        system = None  # see below
    chat = Chat(ours[kind].with_chat_template(ALL[name]), variables=DATED)
    theirs[kind].chat_template = ALL[name]
    messages = messages_of(system, pairs)
    expected = theirs[kind].apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask="marked" in name, **DATED
    )
    ids, mask = chat.conversation(messages, turns="last")
    assert ids == expected["input_ids"]
    if "marked" in name:
        assert chat.conversation(messages)[1] == list(map(bool, expected["assistant_masks"]))
    prompt = theirs[kind].apply_chat_template(messages[:-1], add_generation_prompt=True, **DATED)["input_ids"]
    assert chat.prompt(messages[:-1]) == prompt
    assert any(mask)


@pytest.mark.parametrize("name", GROWING)
@given(system=st.none() | contents, pairs=turns)
@settings(max_examples=15, deadline=None)
def test_the_assistants_tokens_are_what_it_would_have_to_write(
    ours: dict[str, Tokenizer], name: str, system: str | None, pairs: list[Any]
) -> None:
    """Of each turn: the text behind the generation prompt, with the mark that ends the turn."""
    tokenizer = ours["library"]
    template = ChatTemplate(ALL[name], tokenizer.special_texts)
    chat = Chat(tokenizer.with_chat_template(ALL[name]))
    messages = messages_of(system, pairs)
    text = template.render(messages)
    _, offsets = tokenizer.encode_with_offsets(text)
    expected = [False] * len(offsets)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(template.render(messages[:index], add_generation_prompt=True))
            stop = len(template.render(messages[: index + 1]))
            for token, (first, last) in enumerate(offsets.tolist()):
                expected[token] |= first < stop and last > start
    assert chat.conversation(messages)[1] == expected
    last = chat.conversation(messages, turns="last")[1]
    first_of_last = next(i for i, (_, stop) in enumerate(offsets.tolist()) if stop > start)
    assert last == [False] * first_of_last + expected[first_of_last:]
    marked = chat.completion(messages[:-1], messages[-1:])
    assert marked[0] + marked[1] == chat.conversation(messages)[0]
    assert len(marked[0]) == first_of_last


def test_marks_and_prefixes_find_the_same_tokens(ours: dict[str, Tokenizer]) -> None:
    messages = messages_of("Be brief.", [("Größe?", "12 m."), ("東京?", "No 😀")])
    found = [
        Chat(ours["library"].with_chat_template(text)).conversation(messages)
        for text in (CHATML, CHATML_MARKED)
    ]
    assert found[0] == found[1]
    ids, mask = found[0]
    shown = ours["library"].decode([i for i, is_own in zip(ids, mask, strict=True) if is_own])
    assert shown == "12 m.\nNo 😀\n"


def test_the_last_turn_is_all_that_is_marked_in_it(ours: dict[str, Tokenizer]) -> None:
    twice = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<{% endgeneration %}|"
        "{% generation %}{{ m.content }}>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = Chat(ours["library"].with_chat_template(twice))
    ids, mask = chat.conversation(messages_of(None, [("1", "2"), ("3", "4")]), turns="last")
    own = [i for i, is_own in zip(ids, mask, strict=True) if is_own]
    assert ours["library"].decode(own) == "<4>"


@pytest.mark.parametrize("kind", KINDS)
def test_tools_and_their_calls_are_as_in_transformers(
    ours: dict[str, Tokenizer], theirs: dict[str, Any], kind: str
) -> None:
    theirs[kind].chat_template = LLAMA
    chat = Chat(ours[kind].with_chat_template(LLAMA), variables=DATED)
    expected = theirs[kind].apply_chat_template(WITH_TOOLS, tools=TOOLS, **DATED)["input_ids"]
    ids, mask = chat.conversation(WITH_TOOLS, TOOLS)
    assert ids == expected
    own = ours[kind].decode([i for i, is_own in zip(ids, mask, strict=True) if is_own])
    assert own == '{"name": "depth", "parameters": {"lake": "Größe"}}<|eot_id|>12 m.<|eot_id|>'


def test_reasoning_is_as_in_transformers(ours: dict[str, Tokenizer], theirs: dict[str, Any]) -> None:
    messages = messages_of(None, [("a?", "b"), ("c?", "d")])
    messages[-1]["reasoning"] = "why\n"
    theirs["library"].chat_template = THINKING
    expected = theirs["library"].apply_chat_template(messages)["input_ids"]
    assert (
        Chat(ours["library"].with_chat_template(THINKING)).conversation(messages, turns="last")[0] == expected
    )


def test_a_template_that_changes_earlier_text_is_refused_unless_the_last_turn_is_wanted(
    ours: dict[str, Tokenizer],
) -> None:
    chat = Chat(ours["library"].with_chat_template(THINKING))
    messages = messages_of("Be brief.", [("a?", "b"), ("c?", "d")])
    with pytest.raises(DataError, match=r"before message 3 is not the beginning.*turns: last"):
        chat.conversation(messages)
    ids, mask = chat.conversation(messages, turns="last")
    own = ours["library"].decode([i for i, is_own in zip(ids, mask, strict=True) if is_own])
    assert own == "<think>\n\n</think>\n\nd\n"


def test_a_template_that_puts_the_system_into_the_last_question_is_refused(
    ours: dict[str, Tokenizer],
) -> None:
    """Mistral's: behind it the system's text would be learned nowhere, and read everywhere."""
    chat = Chat(ours["library"].with_chat_template(MISTRAL))
    with pytest.raises(DataError, match="before message 3 is not the beginning"):
        chat.conversation(messages_of("Be brief.", [("a?", "b")]), turns="last")


def test_the_date_is_what_is_set_and_never_todays(ours: dict[str, Tokenizer]) -> None:
    messages = messages_of(None, [("a?", "b")])
    special = ours["library"].special_texts
    assert "Today Date: 26 Jul 2024" in ChatTemplate(LLAMA, special).render(messages)
    assert "03 Feb 2026" in ChatTemplate(LLAMA, special, today=date(2026, 2, 3)).render(messages)
    with pytest.raises(DataError, match=r"'strftime_now' is undefined: give it a date with chat\.date"):
        ChatTemplate("{{ strftime_now('%Y') }}", {}).render(messages)


def test_a_template_that_writes_the_pad_token_drops_nothing(ours: dict[str, Tokenizer]) -> None:
    """Of Qwen's kind pad is <|endoftext|>, which ends each turn here."""
    tokenizer = ours["library"]
    assert tokenizer.pad_id is not None
    chat = Chat(tokenizer.with_chat_template(CHATML.replace("<|im_end|>", "<|endoftext|>")))
    ids, mask = chat.conversation(messages_of(None, [("a?", "b")]))
    own = [i for i, is_own in zip(ids, mask, strict=True) if is_own]
    assert tokenizer.pad_id in own
    assert chat.turn_ends == (tokenizer.eos_id, tokenizer.pad_id)


def test_a_turn_ends_with_eos_and_with_what_the_template_writes_behind_an_answer(
    ours: dict[str, Tokenizer],
) -> None:
    for kind, tokenizer in ours.items():
        ends = {
            name: Chat(tokenizer.with_chat_template(ALL[name])).turn_ends for name in ("chatml", "mistral")
        }
        assert ends["chatml"] == tuple(dict.fromkeys([tokenizer.eos_id, tokenizer.piece_id("<|im_end|>")])), (
            kind
        )
        assert ends["mistral"] == (tokenizer.eos_id,)


def test_a_tokenizer_without_a_template_gets_a_plain_one(ours: dict[str, Tokenizer]) -> None:
    messages = messages_of("S", [("Q", "A")])
    ids, mask = Chat(ours["sentencepiece"]).conversation(messages)
    text = ours["sentencepiece"].encode_with_offsets(
        "<s>### System:\nS\n\n### User:\nQ\n\n### Assistant:\nA</s>\n\n"
    )
    assert ids == text[0].tolist()
    own = [i for i, is_own in zip(ids, mask, strict=True) if is_own]
    assert ours["sentencepiece"].decode(own) == "A\n\n"
    assert ours["sentencepiece"].eos_id in own
    with pytest.raises(DataError, match=r"system, user, assistant, and no tools\. Set chat\.template"):
        Chat(ours["sentencepiece"]).prompt([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.lists(st.one_of(st.sampled_from([*MARKS, "\u2581", *TEXTS]), st.text(max_size=8)), max_size=6))
@settings(max_examples=50, deadline=None)
def test_the_characters_of_all_tokens_are_the_text(
    ours: dict[str, Tokenizer], kind: str, text: list[str]
) -> None:
    joined = "".join(text).encode("utf-8", "replace").decode()
    ids, offsets = ours[kind].encode_with_offsets(joined)
    if not len(ids):
        assert not joined
        return
    starts, stops = offsets[:, 0].tolist(), offsets[:, 1].tolist()
    assert (starts[0], stops[-1]) == (0, len(joined))
    assert all(a < b for a, b in offsets.tolist())
    # Each token goes on where the last one ended, or within its character.
    assert all(start in {stop, stop - 1} for start, stop in zip(starts[1:], stops, strict=False))


def test_templates_are_read_from_the_files_that_transformers_writes(
    ours: dict[str, Tokenizer], tmp_path: Path
) -> None:
    files = ours["library"].files()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads(files["tokenizer_config.json"])

    def loaded(chat_template: Any) -> Tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**config, "chat_template": chat_template})
        )
        return Tokenizer.load(tmp_path)

    messages = [{"role": "user", "content": "x"}]
    assert loaded(CHATML).chat_templates == {"default": CHATML}
    named = Chat(
        loaded([{"name": "default", "template": "no tools"}, {"name": "tool_use", "template": "{{ tools }}"}])
    )
    assert named.prompt(messages) == ours["library"].encode("no tools")
    assert named.prompt(messages, [{"a": 1}]) == ours["library"].encode("[{'a': 1}]")
    with pytest.raises(ConfigError, match=r"none named 'default': set chat.template"):
        Chat(loaded([{"name": "rag", "template": ""}]))
    for damaged in (1, [1], [{"name": 1, "template": ""}], [{"template": ""}]):
        with pytest.raises(DataError, match="chat_template must be a text"):
            loaded(damaged)
    loaded("old")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.load(tmp_path).chat_templates == {"default": "new"}
    assert read_template(tmp_path) == read_template(tmp_path / "chat_template.jinja") == "new"


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_goes_with_the_files_and_the_export(
    ours: dict[str, Tokenizer], tmp_path: Path, kind: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = ours[kind].with_chat_template(MISTRAL)
    assert not ours[kind].chat_templates
    assert tokenizer.fingerprint == ours[kind].fingerprint
    for folder, files in (
        (tmp_path / "own", tokenizer.files()),
        (tmp_path / "export", tokenizer.huggingface_files(max_seq_len=64)[0]),
    ):
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        read = Tokenizer.load(folder)
        assert read.chat_templates == {"default": MISTRAL}
        assert (read.fingerprint, read.special_texts) == (tokenizer.fingerprint, tokenizer.special_texts)
    assert AutoTokenizer.from_pretrained(str(tmp_path / "export")).chat_template == MISTRAL


def test_an_imported_tokenizer_has_its_template_beside_it(ours: dict[str, Tokenizer], tmp_path: Path) -> None:
    for kind, target in (("library", "imported"), ("sentencepiece", "imported/tokenizer.model")):
        folder = tmp_path / kind
        (folder / "from").mkdir(parents=True)
        for name, data in ours[kind].with_chat_template(MISTRAL).files().items():
            (folder / "from" / name).write_bytes(data)
        import_tokenizer(folder / "from", folder / target)
        assert Tokenizer.load(folder / target).chat_templates == {"default": MISTRAL}
    (tmp_path / "sentencepiece" / "imported" / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ConfigError, match="has another chat template than the tokenizer"):
        import_tokenizer(tmp_path / "sentencepiece" / "from", tmp_path / "sentencepiece" / target)


def test_the_plain_template_leaves_nothing_out_in_silence(ours: dict[str, Tokenizer]) -> None:
    chat = Chat(ours["sentencepiece"])
    call = {"function": {"name": "f", "arguments": {}}}
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    chat.conversation([question, answer])
    cases: list[tuple[dict[str, Any], Any, str]] = [
        (answer | {"tool_calls": [call]}, None, "message 2 has tool_calls: the plain template has"),
        (answer, [{"type": "function"}], "^has tools: the plain template has the roles system, user"),
        ({"role": "tool", "content": "b"}, None, "message 2 has role tool: the plain"),
        (answer | {"content": [{"type": "text", "text": "b"}]}, None, "message 2 has an array of texts"),
    ]
    for message, tools, problem in cases:
        with pytest.raises(DataError, match=problem):
            chat.conversation([question, message, answer], tools)
        with pytest.raises(DataError, match=problem):
            chat.prompt([question, message], tools)


def test_the_plain_template_needs_an_eos(tmp_path: Path) -> None:
    settings_ = TokenizerTrainConfig(algorithm="bpe", vocab_size=400, eos_id=None)
    tokenizer = train_tokenizer(TEXTS, settings_, tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match="neither a chat template nor an eos"):
        Chat(tokenizer)
    assert Chat(tokenizer.with_chat_template(PLAIN_TEMPLATE)).source == PLAIN_TEMPLATE
