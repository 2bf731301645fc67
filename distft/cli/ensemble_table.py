"""Prints what an ensemble of classifiers measures, beside each of its members."""

import json
from typing import TYPE_CHECKING

from distft.cli.arguments import print_note, say

if TYPE_CHECKING:
    from distft.run.ensemble import EnsembleReport


def print_ensemble(report: "EnsembleReport", *, as_json: bool) -> None:
    """A line for each member and each way to combine them; the notes go to stderr."""
    for note in report.notes:
        print_note(note)
    if as_json:
        members = [{"checkpoint": path, **metrics} for path, metrics in report.members]
        print(json.dumps({"members": members, "weights": report.weights, "ensembles": report.ensembles}))
        return
    rows = [*report.members, *report.ensembles.items()]
    names, weights = list(report.members[0][1]), report.weights or []
    width = max(len(name) for name, _ in rows)
    heads = [*(f"{name:>9}" for name in names), *(["weight"] if weights else [])]
    say(f"{'':<{width}}  {'  '.join(heads)}")
    for number, (name, metrics) in enumerate(rows):
        cells = [f"{metrics[key]:>9.6g}" if key in metrics else " " * 9 for key in names]
        cells += [f"{weight:>6.4f}" for weight in weights[number : number + 1]]
        say(f"{name:<{width}}  {'  '.join(cells)}".rstrip())
