"""Views of texts: what is dropped or replaced depends on seed and sequence number alone."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, ROW
from distft.data.token_dropout import TextViews, TokenDropout, rows_of_view

VOCAB_SIZE = 40
SPECIAL = np.arange(VOCAB_SIZE) < 3
STARTS_WORD = np.arange(VOCAB_SIZE) % 3 == 0
TEXTS = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12), min_size=1, max_size=6)
RATES = st.sampled_from([0.0, 0.1, 0.5, 0.99])


def dropout(rate: float, *, words: bool = False, replacements: list[int] | None = None) -> TokenDropout:
    return TokenDropout(
        rate=rate,
        is_special=SPECIAL,
        starts_word=STARTS_WORD if words else None,
        replacements=None if replacements is None else np.array(replacements),
    )


def unlabelled(texts: list[list[int]], first_number: int = 0) -> Batch:
    width = max(map(len, texts))
    return Batch(
        input_ids=torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        targets={ROW: torch.zeros(len(texts), dtype=torch.int64)},
        num_targets={ROW: len(texts)},
        lengths=torch.tensor([len(text) for text in texts]),
        sequence_numbers=torch.arange(first_number, first_number + len(texts)),
    )


def texts_of(batch: Batch) -> list[list[int]]:
    assert batch.lengths is not None
    return [ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.lengths, strict=True)]


@given(texts=TEXTS, rate=RATES, words=st.booleans(), seed=st.integers(0, 9))
def test_what_is_left_of_a_text_is_a_subsequence_with_all_special_ids(
    texts: list[list[int]], rate: float, words: bool, seed: int
) -> None:
    views = TextViews(dropouts=[dropout(0.0), dropout(rate, words=words)], seed=seed)(unlabelled(texts))
    found = texts_of(views)
    assert found[::2] == texts
    for text, left in zip(texts, found[1::2], strict=True):
        rest = iter(text)
        assert all(token in rest for token in left)
        assert len(left) >= 1
        assert left == text or rate > 0
        assert [t for t in left if t < 3] == [t for t in text if t < 3]
        if words:  # no word is cut: each run of tokens up to the next start is there or not
            assert set(_words(left)) <= set(_words(text)) or len(left) == 1 or any(t < 3 for t in text)


def _words(text: list[int]) -> list[tuple[int, ...]]:
    words: list[list[int]] = []
    for token in text:
        if not words or STARTS_WORD[token]:
            words.append([])
        words[-1].append(token)
    return [tuple(word) for word in words]


@given(texts=TEXTS, seed=st.integers(0, 9), cut=st.integers(0, 6))
def test_views_do_not_depend_on_the_batch_around_a_row(texts: list[list[int]], seed: int, cut: int) -> None:
    transform = TextViews(dropouts=[dropout(0.4), dropout(0.4, replacements=[5, 6])], seed=seed)
    whole = texts_of(transform(unlabelled(texts, 7)))
    cut = min(cut, len(texts))
    parts = [(texts[:cut], 7), (texts[cut:], 7 + cut)]
    assert whole == [text for rows, n in parts if rows for text in texts_of(transform(unlabelled(rows, n)))]


def test_the_share_that_is_hit_is_the_rate_and_differs_from_view_to_view() -> None:
    texts = [list(range(3, 40))] * 300
    views = TextViews(dropouts=[dropout(0.3), dropout(0.3, replacements=[4])], seed=1)(unlabelled(texts))
    assert views.lengths is not None
    dropped = 1 - views.lengths[::2].double().mean() / 37
    replaced = (views.input_ids[1::2] != torch.tensor(texts)).double().mean()
    assert abs(float(dropped) - 0.3) < 0.015
    assert abs(float(replaced) - 0.3) < 0.015
    same = TextViews(dropouts=[dropout(0.3)] * 2, seed=1)(unlabelled(texts))
    first, second = texts_of(rows_of_view(same, 0)), texts_of(rows_of_view(same, 1))
    assert sum(one == other for one, other in zip(first, second, strict=True)) == 0


def test_a_sequence_counts_once_and_a_row_that_stands_for_none_not_at_all() -> None:
    transform = TextViews(dropouts=[dropout(0.0)] * 3, seed=0)
    views = transform(unlabelled([[5, 6], [7]]))
    assert views.num_targets == {ROW: 2}
    assert views.targets[ROW].tolist() == [0, IGNORE_INDEX, IGNORE_INDEX] * 2
    assert views.rows_per_sequence == 3
    filler = transform(replace(unlabelled([[5, 6]]).without_targets(), num_targets={ROW: 0}))
    assert filler.num_targets == {ROW: 0}
    assert (filler.targets[ROW] == IGNORE_INDEX).all()
