"""Trains a configuration at several widths and rates, in muP and in the standard parametrization.

    python tools/width_sweep.py configs/mup_shakespeare.yaml --widths 32 64 128 256 -o runs/mup/sweep.html

It prints the validation loss of each run and the best rate of each width, and writes a chart of them. A run
that is complete is not run again. At the base width both are the same model, which runs once.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from widths import PARAMETRIZATIONS, at_width, base_model

from distft.errors import DistftError
from distft.report.chart import Chart
from distft.report.chart_file import curves, require_chart_file, write_chart
from distft.report.recorded_run import RecordedRun, is_run
from distft.run.config import RunConfig, load_run_config
from distft.run.train import run_training
from distft.topology import Topology

METRIC = "validation/loss"
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)


@dataclass(frozen=True, kw_only=True)
class Point:
    """The loss of one run; None: it diverged."""

    parametrization: str
    width: int
    rate: float
    loss: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all runs")
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="values of optim.peak_lr")
    parser.add_argument(
        "--parametrizations", nargs="+", choices=PARAMETRIZATIONS, default=list(PARAMETRIZATIONS)
    )
    parser.add_argument("-o", "--output", type=Path, help="a chart, such as sweep.html")
    given = parser.parse_intermixed_args(arguments)
    try:
        if given.output is not None:
            require_chart_file(given.output)
        points = sweep(given)
        print_table(points, given.rates)
        if given.output is not None:
            write_chart(rates_chart(points), given.output)
            print(given.output)
    except DistftError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def sweep(given: argparse.Namespace) -> list[Point]:
    """All points, the narrow ones first."""
    base = load_run_config(given.config, given.overrides)
    model = base_model(base)
    base_width = model.mup_base_d_model or model.d_model
    points: dict[tuple[str, int, float], Point] = {}
    for width in sorted(given.widths):
        for parametrization in given.parametrizations:
            for rate in given.rates:
                other = points.get((given.parametrizations[0], width, rate))
                if width == base_width and other is not None:
                    loss = other.loss  # the same model
                else:
                    run_dir = Path(base.run_dir) / f"{parametrization}_{width}_{rate:g}"
                    own = [*given.overrides, f"run_dir={run_dir}", f"optim.peak_lr={rate}"]
                    loss = loss_of(at_width(given.config, own, width, parametrization))
                    print(f"{parametrization} d_model={width} peak_lr={rate:g}: {loss}", flush=True)
                point = Point(parametrization=parametrization, width=width, rate=rate, loss=loss)
                points[parametrization, width, rate] = point
    return list(points.values())


def loss_of(config: RunConfig) -> float | None:
    """The last validation loss of a run, which is trained unless it is complete; None: not finite."""
    directory = Path(config.run_dir)
    if not is_run(directory) or RecordedRun.read(directory).state() != "completed":
        run_training(config, Topology())
    values = RecordedRun.read(directory).values(METRIC)
    loss = values[-1][1] if values else math.nan
    return loss if math.isfinite(loss) else None


def print_table(points: Sequence[Point], rates: Sequence[float]) -> None:
    print(
        "| Parametrization | Width |",
        " | ".join(f"{rate:g}" for rate in rates),
        "| best of these | between them |",
    )
    print("|---|---:|", "---:|" * (len(rates) + 2), sep="")
    for parametrization in dict.fromkeys(point.parametrization for point in points):
        for width in sorted({point.width for point in points}):
            row = [p for p in points if (p.parametrization, p.width) == (parametrization, width)]
            best = min((p for p in row if p.loss is not None), key=lambda p: p.loss or 0.0, default=None)
            cells = [
                "diverged" if p.loss is None else f"**{p.loss:.3f}**" if p is best else f"{p.loss:.3f}"
                for p in row
            ]
            found = "-" if best is None else f"{best.rate:g}"
            between = best_between(row)
            place = "at the edge" if between is None else f"{between:.2g}"
            print(f"| {parametrization} | {width} |", " | ".join(cells), f"| {found} | {place} |")


def best_between(row: Sequence[Point]) -> float | None:
    """The rate at the lowest point of a parabola, over the logarithm, through the best and its neighbours.

    None: the best has no neighbour on one side.
    """
    known = sorted((p.rate, p.loss) for p in row if p.loss is not None)
    best = min(range(len(known)), key=lambda i: known[i][1], default=0)
    if not 0 < best < len(known) - 1:
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(rate), loss) for rate, loss in known[best - 1 : best + 2])
    below, above = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    return math.exp(x1 - ((x1 - x0) * below - (x1 - x2) * above) / (2 * (below - above)))


def rates_chart(points: Sequence[Point]) -> Chart:
    spec = curves(
        [asdict(point) for point in points if point.loss is not None],
        x=("rate", "learning rate (optim.peak_lr)"),
        y=("loss", "validation loss, nats a token"),
        color=("width", "d_model"),
        columns="parametrization",
        is_color_ordered=True,
        is_y_logarithmic=False,
    )
    return Chart(title="Loss by learning rate and width", spec=spec)


if __name__ == "__main__":
    sys.exit(main())
