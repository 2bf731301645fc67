import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distft.data.dataset import DataContext
from distft.data.preferences import PreferencesConfig
from distft.data.targets import ANSWER, IGNORE_INDEX, PREFERENCE
from distft.errors import DataError

BOS, EOS = 2, 1
CONTEXT = DataContext(
    seq_len=20,
    vocab_size=2**17,
    encode=lambda text: [ord(letter) for letter in text],
    tokenizer_fingerprint="letters",
    bos_id=BOS,
    eos_id=EOS,
    pad_id=3,
)
TEXT = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=30)


def two_letters(text: str) -> list[int]:
    """A tokenizer that puts a space before a text, as sentencepiece does, and joins letters by twos."""
    text = f" {text}"
    return [int.from_bytes(text[start : start + 2].encode()) for start in range(0, len(text), 2)]


def write(path: Path, rows: list[tuple[str, str, str]]) -> str:
    named = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return str(path)


def rows_of(path: str, context: DataContext, **options: bool) -> list[tuple[list[int], list[int]]]:
    """Of each side of each pair what is read before the answer, and the answer."""
    feed = PreferencesConfig(path=path, **options).build_for_evaluation(context)
    batch = feed.batch(0, feed.num_sequences)
    found = []
    assert batch.lengths is not None
    for ids, labels, length in zip(batch.input_ids, batch.targets[ANSWER], batch.lengths, strict=True):
        assert set(ids[length:].tolist()) <= {context.pad_id}
        answer = [label for label in labels.tolist() if label != IGNORE_INDEX]
        start = int(length) - len(answer) + 1
        assert labels[start - 1 : length].tolist() == answer
        assert ids[start:length].tolist() == answer[:-1]
        found.append((ids[:start].tolist(), answer))
    assert batch.num_targets == {
        ANSWER: sum(len(answer) for _, answer in found),
        PREFERENCE: feed.num_sequences,
    }
    assert batch.targets[PREFERENCE].tolist() == [0, IGNORE_INDEX] * feed.num_sequences
    return found


@given(
    pairs=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4),
    seq_len=st.integers(1, 40),
    eos_id=st.sampled_from([EOS, None]),
    prepend_bos=st.booleans(),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pair_is_two_rows_with_the_answers_as_targets(
    tmp_path: Path, pairs: list[tuple[str, str, str]], seq_len: int, eos_id: int | None, prepend_bos: bool
) -> None:
    context = replace(CONTEXT, seq_len=seq_len, eos_id=eos_id)
    pairs = [(p, a, b) for p, a, b in pairs if a != b]
    end, start = [EOS] * (eos_id is not None), [BOS] * prepend_bos
    expected = []
    for prompt, *answers in pairs:
        ids = [list(map(ord, answer)) + end for answer in answers]
        kept = [answer[:seq_len] for answer in ids]
        if kept[0] != kept[1]:
            room = seq_len + 1 - max(map(len, kept))
            before = start + list(map(ord, prompt))[max(0, len(start) + len(prompt) - room) :]
            if room <= len(start):
                before = [ord(prompt[-1])]
            expected += [(before, answer) for answer in kept]
    path = write(tmp_path / "a.jsonl", pairs)
    if not expected:
        with pytest.raises(DataError, match=r"has no rows|are equal as far as batch.seq_len=\d+ reads them"):
            rows_of(path, context, prepend_bos=prepend_bos)
        return
    found = rows_of(path, context, prepend_bos=prepend_bos)
    assert found == expected
    assert all(len(before) + len(answer) <= seq_len + 1 for before, answer in found)


def test_answers_are_the_tokens_of_the_joint_text(tmp_path: Path) -> None:
    context = replace(CONTEXT, encode=two_letters)
    path = write(tmp_path / "a.jsonl", [("abc", "de", "fghi"), ("ab", "de", "fg")])
    feed = PreferencesConfig(path=path).build_for_evaluation(context)
    assert "in 1 pairs an answer begins within a token that began in the prompt" in feed.summary
    joined = [two_letters("abcde"), two_letters("abcfghi"), two_letters("abde"), two_letters("abfg")]
    found = rows_of(path, context)
    for (before, answer), tokens in zip(found, joined, strict=True):
        assert before + answer == [*tokens, EOS]
    # " a|bc" ends with the prompt, and the answers follow; " a|b" has no whole token of its end in " a|bd|e".
    assert [len(before) for before, _ in found] == [2, 2, 1, 1]


def test_both_sides_lose_as_much_of_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("abcdefghij", "x" * 5, "y" * 15), ("ab", "x" * 30, "y" * 30)])
    feed = PreferencesConfig(path=path).build(CONTEXT)
    assert "2 pairs; to fit seq_len=20, 2 prompts were cut at the front, 2 answers at the end" in feed.summary
    found = ["".join(map(chr, before)) for before, _ in rows_of(path, CONTEXT)]
    assert found == ["fghij", "fghij", "b", "b"]


def test_pairs_that_are_equal_as_far_as_they_are_read_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", "x" * 40, "x" * 41), ("a", "b", "c")])
    feed = PreferencesConfig(path=path).build(CONTEXT)
    assert feed.num_sequences == 1
    assert "1 pairs are left out, whose answers are equal as far as they are read" in feed.summary
    with pytest.raises(DataError, match=r"the two answers of each of its 1 rows are equal .*seq_len=20"):
        PreferencesConfig(path=path, max_rows=1).build(CONTEXT)


def test_every_bad_row_is_told_with_its_line_at_once(tmp_path: Path) -> None:
    rows = [
        ("a", "b", "c"),
        ("", "b", "c"),
        ("a", " ", "c"),
        ("a", "b", ""),
        ("a", "b", "b"),
        ("a", "c", "c"),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as raised:
        PreferencesConfig(path=path).build(CONTEXT)
    needs = "a pair needs a prompt and two answers."
    assert str(raised.value).splitlines() == [
        f"{path}:2: 'prompt' is empty: {needs}",
        f"{path}:3: 'chosen' is empty: {needs}",
        f"{path}:4: 'rejected' is empty: {needs}",
        f"{path}:5: 'chosen' and 'rejected' are equal, so that neither is better: correct or remove the row. "
        "(Lines 6 too.)",
    ]


def test_columns_have_other_names_and_none_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,good,bad\nwhy,so,no\n")
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    config = PreferencesConfig.model_validate({"path": str(tmp_path / "a.csv"), **names})
    batch = config.build_for_evaluation(CONTEXT).batch(0, 1)
    assert ["".join(map(chr, ids.tolist())) for ids in batch.input_ids] == ["whyso", "whyno"]
    with pytest.raises(DataError, match=r"a\.csv:1: has no column 'chosen'"):
        PreferencesConfig(path=str(tmp_path / "a.csv"), prompt="q").build(CONTEXT)
    with pytest.raises(ValidationError, match="the column q is named more than once"):
        PreferencesConfig(path="a.csv", prompt="q", chosen="q")


def test_a_batch_without_pairs_is_one_pair_without_targets(tmp_path: Path) -> None:
    batch = PreferencesConfig(path=write(tmp_path / "a.jsonl", [("a", "b", "c")])).build(CONTEXT).batch(7, 7)
    assert batch.input_ids.shape == batch.targets[ANSWER].shape == (2, 2)
    assert set(batch.num_targets.values()) == {0}
    assert all((target == IGNORE_INDEX).all() for target in batch.targets.values())
    assert batch.rows_per_sequence == 2


def test_a_bos_that_the_tokenizer_lacks_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", "b", "c")])
    with pytest.raises(DataError, match="prepend_bos=true, but the tokenizer has no bos"):
        PreferencesConfig(path=path, prepend_bos=True).build(replace(CONTEXT, bos_id=None))
