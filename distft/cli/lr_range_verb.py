"""`distft tune --lr-range`: a range test, its suggestion and its chart."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distft.cli.arguments import print_note, say


def lr_range(
    config: str,
    overrides: Sequence[str],
    *,
    lowest: float,
    highest: float,
    steps: int,
    directory: Path | None,
    output: Path | None,
    as_json: bool = False,
) -> None:
    """Train while the rate rises, and print which rate to take. The chart is `lr_range.html` of the run."""
    from distft.run.environment import configure_environment, prepare_for_torch
    from distft.run.lr_range import range_config, run_lr_range

    options = {"lowest": lowest, "highest": highest, "steps": steps}
    own = range_config(config, overrides, **options, directory=None if directory is None else str(directory))  # type: ignore[arg-type]
    from distft.report.chart_file import require_chart_file, write_chart

    if output is not None:
        require_chart_file(output)
    prepare_for_torch()
    topology = configure_environment(own.device)
    found = run_lr_range(config, overrides, **options, directory=own.run_dir, topology=topology)  # type: ignore[arg-type]
    if not topology.is_main:
        return
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print_suggestion(found.steepest, found.tenth_of_minimum)
    if output is None:
        return
    from distft.report.lr_range_chart import lr_range_chart

    write_chart(lr_range_chart(found), output)
    (print_note if as_json else say)(f"{output}: the chart")


def _print_suggestion(steepest: float | None, tenth: float | None) -> None:
    if steepest is None or tenth is None:
        say("The loss never fell, so there is nothing to suggest: begin at a lower rate, or take more steps.")
        return
    say(
        f"the loss falls fastest at {steepest:.2g}, and a tenth of the rate of the lowest loss is {tenth:.2g}"
    )
    say(f"suggestion: optim.peak_lr={tenth:.2g}, the tenth of the rate of the lowest loss")
