"""`distft checkpoint`: look at checkpoints of any format, check them, and write them in another."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from distft.checkpoint.sources import CheckpointSource

checkpoint_app = typer.Typer(
    help="Look at checkpoints of any format, check them, and write them in another.", no_args_is_help=True
)

Path = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A run, one of its commits, or a foreign checkpoint.")
]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="A new directory, or a URL.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Let DeepSpeed's files import classes not known here: runs code.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Ranks = Annotated[int, typer.Option(min=1, help="Number of ranks whose files are written.")]


_FILE_COLUMNS = 240  # of a table that goes to a file or another program


@checkpoint_app.command("inspect")
def inspect(
    checkpoint: Path,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Read every weight: mean, std, smallest, largest.")
    ] = False,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Tell what is in a checkpoint: step, tokens, layout, and every parameter."""
    from distft.checkpoint.comparison import num_bytes
    from distft.checkpoint.description import describe, description_table
    from distft.checkpoint.formats.detect import open_source
    from distft.tracker import progress

    source = open_source(checkpoint, trust=trust)
    _note_uncommitted(source, checkpoint)
    if statistics:
        with progress(num_bytes(source), "reading", "bytes") as display:
            found = describe(source, statistics=True, on_progress=display.advance)
    else:
        found = describe(source, statistics=False)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console

    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = _FILE_COLUMNS
    screen.print(description_table(found))


@checkpoint_app.command("verify")
def verify(checkpoint: Path, as_json: AsJson = False, trust: Trust = False) -> None:
    """Read every byte: sizes, checksums, and each tensor's fingerprint. Exit code 1 for a damaged one."""
    from distft.checkpoint.comparison import all_faults, num_bytes
    from distft.checkpoint.formats.detect import open_source
    from distft.checkpoint.unread import UnreadError
    from distft.errors import CheckpointError
    from distft.tracker import progress

    try:
        source = open_source(checkpoint, trust=trust)
    except UnreadError:
        raise
    except CheckpointError as error:  # so damaged that it cannot be opened
        faults = str(error).splitlines()
        found = {"path": checkpoint, "format": None, "faults": faults}
        print(json.dumps(found, indent=1) if as_json else "\n".join(faults))
        raise typer.Exit(1) from None
    _note_uncommitted(source, checkpoint)
    total = num_bytes(source)
    with progress(total, "verifying", "bytes") as display:
        faults = all_faults(source, display.advance)
    if as_json:
        print(json.dumps({"path": source.path, "format": source.format, "faults": faults}, indent=1))
    else:
        for fault in faults:
            print(fault)
        if not faults:
            count = len(source.manifest.parameters)
            said = "readable; this format has no checksums" if source.format == "huggingface" else "whole"
            print(f"{source.path}: {said}; {count:,} parameters, {total:,} bytes of state.")
    if faults:
        raise typer.Exit(1)


@checkpoint_app.command("diff")
def diff(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    state: Annotated[
        list[str] | None, typer.Option(help="weight, exp_avg or exp_avg_sq; all unless given.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Difference over the first one's size, in norm, that passes.")
    ] = 0.0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Compare two checkpoints of any formats, parameter by parameter. Exit code 1 where they differ."""
    from dataclasses import asdict

    from distft.checkpoint.comparison import absent_states, differences, num_bytes
    from distft.checkpoint.formats.detect import open_source
    from distft.checkpoint.fragments import STATES
    from distft.errors import CheckpointError
    from distft.tracker import progress

    for name in state or ():
        _check_choice("--state", name, STATES)
    a, b = open_source(first, trust=trust), open_source(second, trust=trust)
    with progress(num_bytes(a), "comparing", "bytes") as display:
        found = list(differences(a, b, state or STATES, display.advance))
    if not found:
        raise CheckpointError(
            f"Nothing was compared: neither {a.path} nor {b.path} has {' or '.join(state or STATES)}."
        )
    unequal = [d for d in found if d.kind != "identical"]
    odd = [d for d in unequal if d.kind != "differs" or not d.relative <= tolerance]
    if as_json:
        print(json.dumps([asdict(difference) for difference in found], indent=1))
    else:
        absent = absent_states(found)
        for (name, kind), count in absent.items():
            print(f"{name} of all {count:,} parameters that have it {_KINDS[kind]}")
        for d in (d for d in odd if (d.state, d.kind) not in absent):
            how = ""
            if d.kind == "differs":
                how = f": {d.num_differing:,} elements, by {d.max_abs:.3g} at most, {d.relative:.3g} in norm"
            print(f"{d.state} of {d.parameter} {_KINDS[d.kind]}{how}")
        print(f"A {a.path} ({a.format}), B {b.path} ({b.format})")
        print(f"{len(found) - len(unequal):,} of {len(found):,} states are identical.")
        if close := len(unequal) - len(odd):
            print(f"{close:,} differ by {tolerance:g} in norm or less.")
    if odd:
        raise typer.Exit(1)


_KINDS = {
    "differs": "differs",
    "shape": "has another shape",
    "missing": "is not in B",
    "added": "is only in B",
}


@checkpoint_app.command("plan")
def plan(checkpoint: Path, ranks: Ranks = 1, as_json: AsJson = False, trust: Trust = False) -> None:
    """Tell what `reshard` would read and write, and about how long it takes; changes nothing."""
    from distft.checkpoint.formats.detect import open_source
    from distft.checkpoint.reshard import estimate_seconds, plan_reshard

    source = open_source(checkpoint, trust=trust)
    found = plan_reshard(source, ranks)
    seconds = estimate_seconds(source, found)
    if as_json:
        files = [
            {"num_bytes": size, "intervals": held}
            for size, held in zip(found.num_bytes, found.layout, strict=True)
        ]
        print(json.dumps({"files": files, "num_bytes": found.num_source_bytes, "seconds": seconds}, indent=1))
        return
    print(f"reads   {found.num_source_bytes:,} bytes of {source.path} ({source.format})")
    for rank, (size, held) in enumerate(zip(found.num_bytes, found.layout, strict=True)):
        names = list(held)
        span = f"{names[0]} to {names[-1]}" if names else "nothing"
        print(f"writes  rank_{rank:05d}.safetensors: {size:,} bytes of {len(names):,} parameters, {span}")
    print(f"takes   about {seconds:.1f} s, by the rate of a first piece; nothing was changed")


@checkpoint_app.command("reshard")
def reshard(checkpoint: Path, target: Target, ranks: Ranks = 1, trust: Trust = False) -> None:
    """Write a checkpoint of ours for another number of ranks. A resume needs none of this."""
    _convert(checkpoint, target, {"to": "distft", "ranks": ranks}, trust)


@checkpoint_app.command("convert")
def convert(
    checkpoint: Path,
    target: Target,
    to: Annotated[str, typer.Option(help="distft, deepspeed, universal or huggingface.")],
    ranks: Annotated[
        int | None, typer.Option(min=1, help="For distft and deepspeed: ranks whose files are written.")
    ] = None,
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="For deepspeed.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16: of deepspeed's module, of huggingface's weights.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="For huggingface: llama, mistral, qwen2, qwen3 or gpt2.")
    ] = None,
    run_config: Annotated[
        str | None,
        typer.Option(help="A run's configuration, for checkpoints that do not say what their model is like."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Write a checkpoint in another format; the source stays as it is."""
    from distft.checkpoint.convert import ARCHITECTURES, FORMATS
    from distft.checkpoint.formats.deepspeed_model import PARAM_DTYPES

    for option, value, known in (
        ("--to", to, FORMATS),
        ("--dtype", dtype, tuple(PARAM_DTYPES)),
        ("--architecture", architecture, ARCHITECTURES),
    ):
        if value is not None:
            _check_choice(option, value, known)
    settings = {
        "to": to,
        "ranks": ranks,
        "zero_stage": zero_stage,
        "dtype": dtype,
        "architecture": architecture,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    _convert(checkpoint, target, given, trust, run_config)


@checkpoint_app.command("average")
def average(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Two or more of one model.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="A new directory.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="One for each, relative to each other; all alike unless given.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Average the weights of several checkpoints; what comes out serves init_from, evaluate and convert."""
    from distft.checkpoint.average import AveragedCheckpoint
    from distft.checkpoint.formats.detect import open_source

    sources = [open_source(path, trust=trust) for path in checkpoints]
    mean = AveragedCheckpoint(sources, weight)
    _write(mean, output, {"to": "distft"}, checkpoints, mean.summary)


@checkpoint_app.command("prune")
def prune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a directory of its commits.")],
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")],
    keep_every_steps: Annotated[int | None, typer.Option(min=1, help="Multiples of this stay, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
) -> None:
    """Delete old commits, and frozen weights that none of the rest needs. The newest good commit stays."""
    from distft import storage
    from distft.checkpoint.committed import find_checkpoint
    from distft.checkpoint.manifest import MANIFEST
    from distft.checkpoint.store import CheckpointConfig, CheckpointStore, expired
    from distft.collectives import SingleProcess
    from distft.errors import ConfigError

    if storage.exists(storage.join(run, MANIFEST)):
        raise ConfigError(f"{run} is a single commit: name its run, or the directory of its commits.")
    root = storage.parent(find_checkpoint(run).path)
    config = CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every_steps)
    store = CheckpointStore(root, SingleProcess())
    _, complaints = store.newest_good()
    for complaint in complaints:
        print(f"note: {complaint}", file=sys.stderr)
    gone = expired(store.good_steps(), config) if dry_run else store.retain(config)
    kept = [step for step in store.good_steps() if step not in gone]
    verb = "would go" if dry_run else "is gone" if len(gone) < 2 else "are gone"
    print(f"{root}: {_named(gone)} {verb}; {_named(kept)} {'stay' if len(kept) > 1 else 'stays'}.")


def _named(steps: list[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}" if steps else "no step"


def _note_uncommitted(source: "CheckpointSource", given: str) -> None:
    """Tell of steps after the newest commit of the run that was given."""
    from distft import storage
    from distft.checkpoint.committed import Checkpoint, uncommitted

    if isinstance(source, Checkpoint) and source.path != given:
        for note in uncommitted(storage.parent(source.path), after=source.step):
            print(f"note: {note}", file=sys.stderr)


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    from distft.errors import ConfigError

    if value not in known:
        raise ConfigError(f"{option} {value} is none of {', '.join(known)}.")


def _convert(
    checkpoint: str, target: str, settings: dict[str, Any], trust: bool, run_config: str | None = None
) -> None:
    from distft.checkpoint.formats.detect import open_source

    source = open_source(checkpoint, trust=trust)
    if run_config is not None:
        _describe(source, run_config)
    _write(source, target, settings, [checkpoint], f"step {source.manifest.progress.step} of {source.path}")


def _describe(source: "CheckpointSource", run_config: str) -> None:
    """Take `run_config` for that of the run that wrote `source`, which does not say it itself."""
    from distft.config import redact
    from distft.errors import ConfigError
    from distft.run.config import load_run_config

    if source.manifest.config:
        raise ConfigError(f"{source.path} holds the configuration of its run: leave --run-config out.")
    config = redact(load_run_config(run_config, []).model_dump(mode="json"))
    source.manifest = source.manifest.model_copy(update={"config": config})


def _write(
    source: "CheckpointSource", target: str, settings: dict[str, Any], given: list[str], summary: str
) -> None:
    from distft.checkpoint.comparison import num_bytes
    from distft.checkpoint.convert import ConvertConfig, convert
    from distft.checkpoint.target import check_outside
    from distft.config import parse
    from distft.tracker import progress

    config: ConvertConfig = parse(ConvertConfig, settings)
    for path in given:
        check_outside(target, path)
    with progress(num_bytes(source), f"writing {config.to}", "bytes") as display:
        notes = convert(source, target, config, display.advance)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{target}: {summary}, as {config.to}")
