"""Readers for `Guard.run`. Each takes paths and returns plain values."""

import sys

from distft.checkpoint.formats import huggingface_source
from distft.checkpoint.formats.deepspeed import reader, universal
from distft.checkpoint.formats.detect import open_source
from distft.cli.main import app

MODULES = (reader, huggingface_source, universal)  # imported once, in the server


def run_cli(*arguments: str) -> int:
    """Run one command as a user would; its errors are raised, not printed. Returns the exit code."""
    try:
        app(args=list(arguments), standalone_mode=True)
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def read_checkpoint(path: str) -> dict[str, object]:
    """Open a checkpoint of any format, look for damage, and read all of its states."""
    source = open_source(path)
    found: dict[str, object] = {"format": source.format, "damage": source.find_damage()}
    total = 0.0
    for name, record in source.manifest.parameters.items():
        numel = 1
        for size in record.shape:
            numel *= size
        for state in record.states:
            total += float(source.read(name, state, 0, numel).double().sum())
    return found | {"parameters": len(source.manifest.parameters), "sum": repr(total)}
