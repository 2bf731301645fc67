import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distft.data.completion import CompletionConfig
from distft.data.dataset import DataContext
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import DataError

EOS = 1
CONTEXT = DataContext(
    seq_len=20,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text],
    tokenizer_fingerprint="letters",
    eos_id=EOS,
    pad_id=3,
    token_bytes=np.arange(200),
)
LETTERS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=30)


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@given(
    pairs=st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=5),
    seq_len=st.integers(1, 40),
    eos_id=st.sampled_from([EOS, None]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_targets_are_the_tokens_of_the_completion_that_fit(
    tmp_path: Path, pairs: list[tuple[str, str]], seq_len: int, eos_id: int | None
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    context = replace(CONTEXT, seq_len=seq_len, eos_id=eos_id)
    batch = CompletionConfig(path=path).build_for_evaluation(context).batch(0, len(pairs))
    assert batch.input_ids.shape[1] == max(batch.lengths) <= seq_len
    num_targets = num_bytes = 0
    for i, (prompt, completion) in enumerate(pairs):
        length = int(batch.lengths[i])
        inputs, labels = batch.input_ids[i].tolist(), batch.targets[NEXT_TOKEN][i].tolist()
        full_completion = [ord(letter) for letter in completion] + ([] if eos_id is None else [eos_id])
        targets = full_completion[:seq_len]
        kept_prompt = [ord(letter) for letter in prompt][-(seq_len + 1 - len(targets)) :]
        row = kept_prompt + targets
        assert inputs[:length] == row[:-1]
        assert set(inputs[length:]) <= {3}
        assert [label for label in labels if label != IGNORE_INDEX] == targets
        assert labels[length - len(targets) : length] == targets
        num_targets += len(targets)
        num_bytes += sum(targets)
    assert batch.num_targets[NEXT_TOKEN] == num_targets
    assert batch.num_target_bytes == num_bytes


def test_the_summary_counts_truncated_prompts_and_completions(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * p, "completion": "c" * c} for p, c in [(5, 5), (30, 5), (5, 30), (30, 30)]]
    feed = CompletionConfig(path=write(tmp_path / "a.jsonl", rows)).build(CONTEXT)
    assert (
        "4 rows; to fit seq_len=20, 3 prompts were cut at the front, 2 completions at the end" in feed.summary
    )


def test_a_template_builds_the_prompt_from_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "1+1", "context": "sums", "a": "2"}])
    config = CompletionConfig(path=path, prompt="q", completion="a", template="{context}: {q} {{}}=")
    batch = config.build_for_evaluation(CONTEXT).batch(0, 1)
    assert "".join(map(chr, batch.input_ids[0].tolist())) == "sums: 1+1 {}=2"
    assert [label for label in batch.targets[NEXT_TOKEN][0].tolist() if label != IGNORE_INDEX] == [
        ord("2"),
        EOS,
    ]


@pytest.mark.parametrize(
    "template", ["no prompt", "{prompt.x}", "{prompt!r}", "{prompt:>3}", "{", "{}{prompt}"]
)
def test_an_invalid_template_is_refused(template: str) -> None:
    with pytest.raises(ValidationError):
        CompletionConfig(path="a.jsonl", template=template)


def test_an_error_names_file_and_line_of_rows_without_prompt_or_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": "a"}, {"prompt": "a", "completion": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as raised:
        CompletionConfig(path=path).build(CONTEXT)
    assert str(raised.value).splitlines() == [
        f"{path}:1: 'prompt' encodes to no tokens.",
        f"{path}:2: 'completion' encodes to no tokens.",
    ]


def test_a_missing_column_of_the_template_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "contxt": "c"}])
    with pytest.raises(DataError, match="no column 'context'; did you mean 'contxt'"):
        CompletionConfig(path=path, template="{context}{prompt}").build(CONTEXT)


def test_a_batch_without_rows_is_one_row_without_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    batch = CompletionConfig(path=path).build(CONTEXT).batch(7, 7)
    assert batch.input_ids.shape == batch.targets[NEXT_TOKEN].shape == (1, 2)
    assert (batch.targets[NEXT_TOKEN] == IGNORE_INDEX).all()
    assert batch.num_targets[NEXT_TOKEN] == batch.num_target_bytes == 0


def test_half_a_character_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'completion' has a lone surrogate"):
        CompletionConfig(path=str(path)).build(CONTEXT)


def test_prompts_begin_with_bos_if_set_and_generation_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "abcdef", "completion": "xy"}\n')
    context = replace(CONTEXT, bos_id=1)
    for prepend_bos in (False, True):
        feed = CompletionConfig(path=str(path), prepend_bos=prepend_bos).build(context)
        assert feed.document_start == ((1,) if prepend_bos else ())
        plain = CompletionConfig(path=str(path)).build(context).batch(0, 1).input_ids[0].tolist()
        found = feed.batch(0, 1).input_ids[0].tolist()
        assert (found[0] == 1) == prepend_bos
        assert found[-2:] == plain[-2:]
    with pytest.raises(DataError, match="prepend_bos=true, but the tokenizer has no bos"):
        CompletionConfig(path=str(path), prepend_bos=True).build(replace(CONTEXT, bos_id=None))
