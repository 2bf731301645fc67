"""Conversations: their rows, packed or not, and the files that they are read from."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distft.data.conversation_rows import pack
from distft.data.conversations import ConversationsConfig
from distft.data.dataset import DataContext, Turns
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError, DataError

START, END = 1, 2
PAD = 3


class LetterChat:
    """A template of letters: a message is START, its role's first letter and its text; an answer has END."""

    fingerprint = "letters"

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        return [*self.conversation(messages, tools)[0], START, ord("a")]

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        turns: Turns = "all",
    ) -> tuple[list[int], list[bool]]:
        ids, mask = [ord(letter) for letter in json.dumps(tools)] if tools else [], []
        mask = [False] * len(ids)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        for index, message in enumerate(messages):
            if message["content"] == "bad":
                raise DataError("the chat template refuses it: no.")
            own = [ord(letter) for letter in message["content"]]
            is_answer = message["role"] == "assistant"
            is_learned = is_answer and (turns == "all" or index == last)
            ids += [START, ord(message["role"][0]), *own, *([END] if is_answer else [])]
            mask += [False, False, *([is_learned] * (len(own) + is_answer))]
        return ids, mask

    def completion(
        self,
        prompt: Sequence[Mapping[str, Any]],
        completion: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[int]]:
        before = self.prompt(prompt, tools)
        return before, self.conversation([*prompt, *completion], tools)[0][len(before) :]


CONTEXT = DataContext(
    seq_len=20,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text],
    tokenizer_fingerprint="letters",
    chat=LetterChat,
    eos_id=END,
    pad_id=PAD,
    token_bytes=np.ones(200, np.int64),
)
LETTERS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=9)
CONVERSATIONS = st.lists(
    st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=3), min_size=1, max_size=12
)


def messages_of(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@given(
    conversations=CONVERSATIONS,
    seq_len=st.integers(4, 60),
    packing=st.booleans(),
    turns=st.sampled_from(["all", "last"]),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_conversation_is_a_document_whose_targets_are_the_assistants_tokens(
    tmp_path: Path, conversations: list[list[tuple[str, str]]], seq_len: int, packing: bool, turns: Turns
) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": messages_of(pairs)} for pairs in conversations])
    expected = []
    for pairs in conversations:
        ids, mask = LetterChat().conversation(messages_of(pairs), turns=turns)
        kept = list(zip(ids, mask, strict=True))[: seq_len + 1]
        if any(is_own for _, is_own in kept[1:]):
            expected.append(
                ([i for i, _ in kept[:-1]], [i if is_own else IGNORE_INDEX for i, is_own in kept[1:]])
            )
    config = ConversationsConfig(path=path, packing=packing, turns=turns)
    context = replace(CONTEXT, seq_len=seq_len)
    if not expected:
        with pytest.raises(DataError, match=f"within the first batch.seq_len={seq_len} tokens: raise it"):
            config.build_for_evaluation(context)
        return
    feed = config.build_for_evaluation(context)
    batch = feed.batch(0, feed.num_sequences)
    assert batch.lengths is not None
    assert batch.input_ids.shape[1] == max(batch.lengths) <= seq_len
    found = []
    for row, length in enumerate(batch.lengths.tolist()):
        inputs, labels = batch.input_ids[row].tolist(), batch.targets[NEXT_TOKEN][row].tolist()
        assert set(inputs[length:]) <= {PAD}
        assert set(labels[length:]) <= {IGNORE_INDEX}
        documents = np.zeros(len(inputs), np.int64)
        positions = np.arange(len(inputs))
        if packing:
            assert batch.document_ids is not None
            assert batch.position_ids is not None
            documents, positions = batch.document_ids[row].numpy(), batch.position_ids[row].numpy()
        for document in sorted(set(documents[:length].tolist())):
            (where,) = np.nonzero(documents == document)
            where = where[where < length]
            assert where.tolist() == list(range(where[0], where[-1] + 1))
            assert positions[where].tolist() == list(range(len(where)))
            found.append(([inputs[i] for i in where], [labels[i] for i in where]))
        assert packing or len(set(documents.tolist())) == 1
    assert sorted(found) == sorted(expected)
    if not packing:
        assert found == expected
    num_targets = sum(label != IGNORE_INDEX for _, labels in expected for label in labels)
    assert batch.num_targets[NEXT_TOKEN] == batch.num_target_bytes == num_targets
    assert feed.batch(0, 0).num_targets[NEXT_TOKEN] == 0


@given(sizes=st.lists(st.integers(1, 30), max_size=60), capacity=st.integers(30, 60))
def test_packing_uses_each_item_once_and_few_bins(sizes: list[int], capacity: int) -> None:
    bins = pack(sizes, capacity)
    assert sorted(item for chosen in bins for item in chosen) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in chosen) for chosen in bins]
    assert all(0 < size <= capacity for size in filled)
    assert bins == sorted(map(sorted, bins))
    # No two bins would go into one: so they are at most twice as many as the fewest.
    assert all(a + b > capacity for i, a in enumerate(filled) for b in filled[:i])


def test_the_summary_tells_what_is_cut_and_left_out(tmp_path: Path) -> None:
    rows = [messages_of([("q" * q, "a" * a)]) for q, a in [(3, 3), (3, 30), (30, 3)]]
    path = write(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    feed = ConversationsConfig(path=path, packing=True).build(CONTEXT)
    assert feed.summary.splitlines() == [
        f"{path}: 2 conversations, 32 tokens, of which 18 are the assistant's; to fit seq_len=20, 1 were cut "
        "at the end, which cost 17 tokens of answers, and 1 more are left out, whose answers were all cut "
        "off",
        "packed into 2 rows, which are full to 75.0%",
    ]
    with pytest.raises(DataError, match=r"a.jsonl:2: has 38 tokens, more than batch.seq_len=20.*Lines 3 too"):
        ConversationsConfig(path=path, too_long="refuse").build(CONTEXT)


def test_other_names_of_columns_keys_and_roles(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    config = ConversationsConfig(
        path=path,
        messages="conversations",
        role="from",
        content="value",
        roles={"human": "user", "gpt": "assistant"},
    )
    plain = write(tmp_path / "b.jsonl", [{"messages": messages_of([("q", "a")])}])
    found, expected = (
        c.build_for_evaluation(CONTEXT).batch(0, 1) for c in (config, ConversationsConfig(path=plain))
    )
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.targets[NEXT_TOKEN].tolist() == expected.targets[NEXT_TOKEN].tolist()


def test_files_of_share_gpt_need_no_settings(tmp_path: Path) -> None:
    """Rows of either kind in one file, other names of roles, and what ShareGPT itself calls no role."""
    share = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    plain = [{"role": "system", "content": "s"}, *messages_of([("q", "a")])]
    rows = [{"messages": plain}, {"conversations": share, "id": "x"}, {"conversations": plain}]
    feed = ConversationsConfig(path=write(tmp_path / "a.jsonl", rows)).build_for_evaluation(CONTEXT)
    batch = feed.batch(0, 3)
    assert batch.input_ids[0].tolist() == batch.input_ids[1].tolist() == batch.input_ids[2].tolist()
    parquet = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[1:2]), parquet)
    found = ConversationsConfig(path=parquet).build_for_evaluation(CONTEXT).batch(0, 1)
    assert found.input_ids.tolist() == batch.input_ids[:1].tolist()
    calls = [{"conversations": [*share, {"from": "function_call", "value": "f"}]}]
    path = write(tmp_path / "b.jsonl", [*calls, {"conversations": share[:2]}])
    with pytest.raises(DataError) as caught:
        ConversationsConfig(path=path).build(CONTEXT)
    assert f'{path}:1: message 4 has from "function_call", which is none of system' in str(caught.value)
    assert f"{path}:2: has no message of the assistant" in str(caught.value)
    named = ConversationsConfig(path=path, roles={"function_call": "assistant"}, max_rows=1)
    assert named.build(replace(CONTEXT, seq_len=40)).num_sequences == 1
    twice = tmp_path / "c.jsonl"
    twice.write_text('{"conversations": [], "conversations": []}\n')
    with pytest.raises(DataError, match="has the key 'conversations' twice"):
        ConversationsConfig(path=str(twice)).build(CONTEXT)


def test_parquet_and_csv_have_the_rows_of_jsonl(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {"messages": messages_of([("q", "a"), ("r", "b")]), "tools": tools},
        {"messages": messages_of([("s", "c")]), "tools": None},
    ]
    paths = [write(tmp_path / "a.jsonl", rows), str(tmp_path / "b.parquet"), str(tmp_path / "c.csv")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[1])
    cells = [[json.dumps(row[name]).replace('"', '""') for name in ("messages", "tools")] for row in rows]
    Path(paths[2]).write_text(
        "messages,tools\n" + "".join(f'"{messages}","{tools}"\n' for messages, tools in cells)
    )
    context = replace(CONTEXT, seq_len=200)
    found = [ConversationsConfig(path=path).build_for_evaluation(context) for path in paths]
    batches = [feed.batch(0, 2).input_ids.tolist() for feed in found]
    assert batches[0] == batches[1] == batches[2]
    assert len({feed.fingerprint for feed in found}) == 1


GOOD = messages_of([("q", "a")])
PROBLEMS: dict[str, tuple[Any, str]] = {
    "no column": ({"message": GOOD}, r"has no column 'messages'; did you mean 'message'\?"),
    "no array": ({"messages": "hello"}, "'messages' must be an array of messages"),
    "empty": ({"messages": []}, "'messages' must be an array of messages"),
    "no object": (
        {"messages": ["hello"]},
        "message 1 is a string, but must be an object with role and content",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 has no key 'role'"),
    "unknown role": (
        {"messages": [*GOOD, {"role": "bot", "content": "b"}]},
        'message 3 has role "bot", which is none of system, developer, user, assistant, tool',
    ),
    "role of a wrong type": (
        {"messages": [{"role": 1, "content": "b"}]},
        "message 1 has role 1, which is none",
    ),
    "no content": (
        {"messages": [{"role": "user"}]},
        "message 1 has content that is null, but must be a string",
    ),
    "content of a wrong type": (
        {"messages": [{"role": "user", "content": 7}]},
        "message 1 has content that is 7, but must be a string, or an array of texts",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]},
        "message 1 has content that has a part without text: conversations with images",
    ),
    "half a character": ({"messages": [{"role": "user", "content": "\ud83d"}]}, "lone surrogate"),
    "no answer": ({"messages": GOOD[:1]}, "has no message of the assistant: there is no answer to learn"),
    "an empty answer": (
        {"messages": [GOOD[0], {"role": "assistant", "content": " \n"}]},
        "message 2 is an answer without text",
    ),
    "refused by the template": (
        {"messages": [*GOOD, {"role": "user", "content": "bad"}]},
        "the chat template refuses it: no",
    ),
    "tools of a wrong type": ({"messages": GOOD, "tools": {"a": 1}}, "'tools' must be an array of objects"),
    "calls of tools of a wrong type": (
        {"messages": [GOOD[0], {"role": "assistant", "content": None, "tool_calls": "f"}]},
        'message 2 has tool_calls "f", but they must be an array of objects',
    ),
    "no JSON": ("{", "is not JSON"),
}


def test_all_faults_are_told_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row, _ in PROBLEMS.values()]
    for start in range(0, len(lines), 8):  # an error shows ten
        part = lines[start : start + 8]
        path.write_text("\n".join([json.dumps({"messages": GOOD}), *part]) + "\n")
        with pytest.raises(DataError) as caught:
            ConversationsConfig(path=str(path)).build(CONTEXT)
        messages = str(caught.value)
        for line, (name, (_, problem)) in enumerate(list(PROBLEMS.items())[start : start + 8], start=2):
            assert re.search(problem, messages), f"{name}: {messages}"
            assert re.search(rf"a\.jsonl:{line}: |Lines .*\b{line}\b", messages), f"{name}: {messages}"


def test_settings_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    for wrong in (
        {"role": "content"},
        {"tools": "messages"},
        {"roles": {"bot": "robot"}},
        {"turns": "first"},
    ):
        with pytest.raises(ValidationError):
            ConversationsConfig(path="a.jsonl", **wrong)
    path = write(tmp_path / "a.jsonl", [{"messages": GOOD}])
    with pytest.raises(ConfigError, match="its rows have no source for the encoder"):
        ConversationsConfig(path=path).build(replace(CONTEXT, ends_sources=True))
    with pytest.raises(
        DataError, match="contains token id 117, but the model's vocabulary has the ids 0 to 99"
    ):
        ConversationsConfig(path=path).build(replace(CONTEXT, vocab_size=100))
    with pytest.raises(DataError, match=r"nowhere.parquet does not exist"):
        ConversationsConfig(path=str(tmp_path / "nowhere.parquet")).build(CONTEXT)
