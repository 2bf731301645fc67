"""The learning-rate range test: an ordinary run of its own, that ends where the loss diverges."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import events, pretraining

from distft.cli.lr_range_verb import lr_range
from distft.config import dump_yaml, parse
from distft.errors import ConfigError
from distft.run.audit import audit_run
from distft.run.config import RunConfig
from distft.run.lr_range import found_range, run_lr_range, smooth
from distft.topology import Topology


def _config(data: Path, tmp_path: Path, **changes: Any) -> str:
    raw = pretraining(data, tmp_path / "run", num_threads=1, **changes)
    path = tmp_path / "run.yaml"
    config: RunConfig = parse(RunConfig, raw)
    path.write_text(dump_yaml(config))
    return str(path)


def test_the_rate_rises_until_the_loss_diverges_and_the_run_is_an_ordinary_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # They set variables of this process, which runs other tests, too.
    monkeypatch.setattr("distft.run.environment.prepare_for_torch", lambda: None)
    monkeypatch.setattr("distft.run.environment.configure_environment", lambda _: Topology())
    path, chart = _config(data, tmp_path), tmp_path / "chart.svg"
    options: dict[str, Any] = {"lowest": 1e-4, "highest": 1e3, "steps": 40, "directory": None}
    lr_range(path, [], **options, output=chart)
    assert "suggestion: optim.peak_lr=" in capsys.readouterr().out
    directory = tmp_path / "run_lr_range"
    assert not (tmp_path / "run").exists()
    audit, _ = audit_run(str(directory))
    assert audit.missing == audit.repeated == ()
    drawn = chart.read_text()
    assert "learning rate (optim.peak_lr)" in drawn
    assert "training loss" in drawn
    before = events(directory)
    lr_range(path, [], **options, output=chart, as_json=True)
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{\n") : out.rindex("}") + 1])
    assert events(directory) == before, "the same call has nothing left to do"
    assert found["has_diverged"]
    assert 10 < len(found["rates"]) < 40
    assert 1e-4 < found["steepest"] < 1.0
    lowest = min(range(len(found["smoothed"])), key=found["smoothed"].__getitem__)
    assert found["tenth_of_minimum"] == pytest.approx(found["rates"][lowest] / 10)


def test_a_range_without_divergence_ends_at_its_last_step(data: Path, tmp_path: Path) -> None:
    path = _config(data, tmp_path)
    with Path(path).open("a") as file:
        file.write("search: {space: {optim.peak_lr: [0.1, 0.2]}}\n")  # the file of a search will do
    found = run_lr_range(path, lowest=1e-9, highest=1e-8, steps=10)
    assert not found.has_diverged
    assert found.rates == pytest.approx([1e-9 * 10 ** (step / 9) for step in range(10)])


def test_mistakes_are_told_together_and_another_run_is_not_touched(data: Path, tmp_path: Path) -> None:
    path = _config(data, tmp_path, phases=[{"steps": 2}, {}])
    with pytest.raises(ConfigError, match=r"(?s)from 1 to 0.1.*5 steps are too few.*has phases"):
        run_lr_range(path, lowest=1.0, highest=0.1, steps=5)
    path = _config(data, tmp_path)
    other = tmp_path / "run_lr_range"
    other.mkdir()
    (other / "config.yaml").write_text("optim: {peak_lr: 1.0}\n")
    with pytest.raises(ConfigError, match="is not this range test"):
        run_lr_range(path)
    assert [file.name for file in other.iterdir()] == ["config.yaml"]


def test_the_steepest_descent_and_the_lowest_loss_are_found_on_a_curve_that_is_known() -> None:
    rates = [10 ** (-6 + 6 * step / 149) for step in range(150)]

    def loss(rate: float) -> float:
        # Falls fastest at 1e-4, lowest where the rise begins to win.
        return 4 - 2 / (1 + (1e-4 / rate) ** 2) + (rate / 0.1) ** 3

    found = found_range(rates, [loss(rate) for rate in rates], directory="", has_diverged=True)
    assert found.steepest is not None
    assert found.tenth_of_minimum is not None
    assert math.log10(found.steepest) == pytest.approx(-4, abs=0.2)
    lowest = min(rates, key=loss)
    assert math.log10(found.tenth_of_minimum) == pytest.approx(math.log10(lowest) - 1, abs=0.3)
    rising = found_range(rates, [1 + rate for rate in rates], directory="", has_diverged=False)
    assert rising.steepest is rising.tenth_of_minimum is None


def test_smoothing_leaves_a_line_as_it_is() -> None:
    line = [3.0 + 2 * step for step in range(30)]
    assert smooth(line, 2.5) == pytest.approx(line)
