"""The sweep over widths and rates: what it runs, what it does not run again, and the best rate."""

import math
from pathlib import Path

import pytest
from support.small_runs import events, pretraining
from width_sweep import Point, best_between, main

from distft.config import dump_yaml, parse
from distft.run.config import RunConfig


def _points(rates: list[float], losses: list[float | None]) -> list[Point]:
    pairs = zip(rates, losses, strict=True)
    return [Point(parametrization="mup", width=1, rate=rate, loss=loss) for rate, loss in pairs]


def test_the_lowest_point_of_a_parabola_is_found_between_uneven_rates() -> None:
    rates = [1e-3, 2e-3, 5e-3, 7e-3]
    row = _points(rates, [(math.log(rate) - math.log(3e-3)) ** 2 for rate in rates])
    assert best_between(row) == pytest.approx(3e-3)
    assert best_between(_points(rates, [1.0, 2.0, 3.0, None])) is None


def test_a_sweep_trains_each_point_once_and_the_base_width_for_both(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: RunConfig = parse(
        RunConfig,
        pretraining(data, tmp_path / "runs", num_threads=1, train={"max_steps": 2}, checkpoint={}),
    )
    path, chart = tmp_path / "run.yaml", tmp_path / "sweep.svg"
    path.write_text(dump_yaml(config))
    options = [str(path), "model.d_ff=32", "--widths", "16", "32", "--rates", "0.01", "0.02"]
    assert main([*options, "-o", str(chart)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {"standard_16", "standard_32", "mup_32"}
    runs = sorted(f"{name}_{rate}" for name in names for rate in ("0.01", "0.02"))
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == runs
    table = [line for line in lines if line.startswith(("| standard |", "| mup |"))]
    assert len(table) == 4
    base = [line.removeprefix("| standard").removeprefix("| mup") for line in table if "| 16 |" in line]
    assert base[0] == base[1]
    assert "learning rate (optim.peak_lr)" in chart.read_text()
    before = [len(events(tmp_path / "runs" / name)) for name in runs]
    assert main(options) == 0
    assert [len(events(tmp_path / "runs" / name)) for name in runs] == before
