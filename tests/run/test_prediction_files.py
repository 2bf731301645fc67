"""What `distft predict` writes: nothing of a row is lost in a cell."""

import csv
import io
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from distft.run.prediction_files import write_output

_WORDS = st.lists(st.text("ab|", min_size=1, max_size=4), min_size=1, max_size=3)


@hypothesis.given(rows=st.lists(_WORDS, min_size=1, max_size=4))
def test_lists_can_be_read_back_from_the_cells_of_a_csv_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path: Path = tmp_path_factory.mktemp("out") / "out.csv"
    write_output(str(path), iter([{"line": i, "tokens": words} for i, words in enumerate(rows)]))
    cells = [row["tokens"] for row in csv.DictReader(io.StringIO(path.read_text(), newline=""))]
    found = [json.loads(cell) if cell.startswith("[") else cell.split("|") for cell in cells]
    assert found == rows
