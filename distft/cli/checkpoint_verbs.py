"""`distft checkpoint`: inspect, verify, compare, convert, average and prune checkpoints of any format."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft.cli.arguments import existing_checkpoint, expanded, print_note, say
from distft.cli.opening import ParameterGroupsFile, Trust, open_with_notes

if TYPE_CHECKING:
    from distft.checkpoint.comparison import StateDifference
    from distft.checkpoint.sources import CheckpointSource

checkpoint_app = typer.Typer(
    help="Inspect, verify and convert checkpoints of any format.", no_args_is_help=True
)

Path = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run's directory (its newest checkpoint), or one checkpoint, of any format.",
        callback=existing_checkpoint,
    ),
]
Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A new directory, or a URL.", callback=expanded)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ranks = Annotated[int, typer.Option(min=1, help="Number of ranks to write files for.")]

_FILE_COLUMNS = 240  # width of a table that goes to a file or another program
_DIFFERENCE_KINDS = {
    "differs": "differs",
    "shape": "has another shape",
    "missing": "is not in B",
    "added": "is only in B",
}


@checkpoint_app.command("inspect")
def inspect(
    checkpoint: Path,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Also show each weight's mean, std, minimum and maximum.")
    ] = False,
    as_json: AsJson = False,
    parameter_groups: ParameterGroupsFile = None,
    trust: Trust = False,
) -> None:
    """Show the content of a checkpoint: step, tokens, files, and every parameter."""
    from distft.checkpoint.description import describe, description_table
    from distft.checkpoint.sources import num_state_bytes
    from distft.tracker import progress

    source = open_with_notes(checkpoint, trust, groups=parameter_groups)
    if statistics:
        with progress(num_state_bytes(source), "reading", "bytes") as display:
            description = describe(source, statistics=True, on_progress=display.advance)
    else:
        description = describe(source, statistics=False)
    if as_json:
        print(json.dumps(description, indent=1))
        return
    from rich.console import Console

    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = _FILE_COLUMNS
    screen.print(description_table(description))


@checkpoint_app.command("verify")
def verify(
    checkpoint: Path,
    as_json: AsJson = False,
    parameter_groups: ParameterGroupsFile = None,
    trust: Trust = False,
) -> None:
    """Read every byte: check sizes, checksums and tensor fingerprints. Exit code 1 if anything is damaged."""
    from distft.checkpoint.damage import find_all_damage
    from distft.checkpoint.sources import notes_of, num_state_bytes
    from distft.errors import CheckpointError, UnsupportedFormatError
    from distft.tracker import progress

    try:
        source = open_with_notes(checkpoint, trust, groups=parameter_groups)
    except UnsupportedFormatError:
        raise
    except CheckpointError as error:  # too damaged to be opened
        damage = str(error).splitlines()
        result = {"path": checkpoint, "format": None, "faults": damage}
        say(json.dumps(result, indent=1) if as_json else "\n".join(damage))
        raise typer.Exit(1) from None
    total = num_state_bytes(source)
    with progress(total, "verifying", "bytes") as display:
        damage = find_all_damage(source, display.advance)
    if as_json:
        say(
            json.dumps(
                {"path": source.path, "format": source.format, "faults": damage, "notes": notes_of(source)},
                indent=1,
            )
        )
    elif damage:
        say("\n".join(damage))
    else:
        verdict = "readable; this format has no checksums" if source.format == "huggingface" else "undamaged"
        count = len(source.manifest.parameters)
        say(f"{source.path}: {verdict}; {count:,} parameters, {total:,} bytes of state.")
    if damage:
        raise typer.Exit(1)


@checkpoint_app.command("diff")
def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint of any format.", callback=existing_checkpoint)
    ],
    second: Annotated[
        str,
        typer.Argument(metavar="B", help="The checkpoint to compare with A.", callback=existing_checkpoint),
    ],
    state: Annotated[
        list[str] | None, typer.Option(help="weight, exp_avg, exp_avg_sq or ema; repeatable; default: all.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Accept a difference up to this norm, relative to the norm of A.")
    ] = 0.0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Compare two checkpoints of any formats, parameter by parameter. Exit code 1 if they differ."""
    from dataclasses import asdict

    from distft.checkpoint.comparison import differences
    from distft.checkpoint.fragments import EMA, WEIGHT
    from distft.checkpoint.sources import num_state_bytes
    from distft.errors import CheckpointError
    from distft.optim.adamw import ADAMW_MOMENTS
    from distft.tracker import progress

    a, b = open_with_notes(first, trust), open_with_notes(second, trust)
    records = [record for source in (a, b) for record in source.manifest.parameters.values()]
    usual = (WEIGHT, *ADAMW_MOMENTS, EMA)
    known = list(dict.fromkeys([*usual, *(name for record in records for name in record.states)]))
    for name in state or ():
        _check_choice("--state", name, known)
    with progress(num_state_bytes(a), "comparing", "bytes") as display:
        found = list(differences(a, b, state, display.advance))
    if not found:
        raise CheckpointError(
            f"Nothing was compared: neither {a.path} nor {b.path} has {' or '.join(state or known)}."
        )
    unequal = [d for d in found if d.kind != "identical"]
    beyond_tolerance = [d for d in unequal if d.kind != "differs" or not d.relative <= tolerance]
    if as_json:
        print(json.dumps([asdict(difference) for difference in found], indent=1))
    else:
        _print_differences(found, beyond_tolerance)
        say(f"A {a.path} ({a.format}), B {b.path} ({b.format})")
        print(f"{len(found) - len(unequal):,} of {len(found):,} states are identical.")
        if num_close := len(unequal) - len(beyond_tolerance):
            print(f"{num_close:,} differ by {tolerance:g} in norm or less.")
    if beyond_tolerance:
        raise typer.Exit(1)


def _print_differences(
    found: Sequence["StateDifference"], beyond_tolerance: Sequence["StateDifference"]
) -> None:
    from distft.checkpoint.comparison import absent_states

    absent = absent_states(found)
    for (name, kind), count in absent.items():
        print(f"{name} of all {count:,} parameters that have it {_DIFFERENCE_KINDS[kind]}")
    for d in beyond_tolerance:
        if (d.state, d.kind) in absent:
            continue
        amount = ""
        if d.kind == "differs":
            amount = f": {d.num_differing:,} elements, by {d.max_abs:.3g} at most, {d.relative:.3g} in norm"
        print(f"{d.state} of {d.parameter} {_DIFFERENCE_KINDS[d.kind]}{amount}")


@checkpoint_app.command("plan")
def plan(checkpoint: Path, ranks: Ranks = 1, as_json: AsJson = False, trust: Trust = False) -> None:
    """Show how much `reshard` would read and write, and estimate its time; changes nothing."""
    from distft.checkpoint.reshard import estimate_seconds, plan_reshard
    from distft.checkpoint.steps import rank_file_name

    source = open_with_notes(checkpoint, trust)
    planned = plan_reshard(source, ranks)
    seconds = estimate_seconds(source, planned)
    if as_json:
        files = [
            {"num_bytes": size, "intervals": intervals}
            for size, intervals in zip(planned.num_bytes, planned.layout, strict=True)
        ]
        result = {"files": files, "num_bytes": planned.num_source_bytes, "seconds": seconds}
        print(json.dumps(result, indent=1))
        return
    say(f"reads   {planned.num_source_bytes:,} bytes of {source.path} ({source.format})")
    for rank, (size, intervals) in enumerate(zip(planned.num_bytes, planned.layout, strict=True)):
        names = list(intervals)
        span = f"{names[0]} to {names[-1]}" if names else "nothing"
        print(f"writes  {rank_file_name(rank)}: {size:,} bytes of {len(names):,} parameters, {span}")
    print(f"takes   about {seconds:.1f} s, extrapolated from a sample; nothing was changed")


@checkpoint_app.command("reshard")
def reshard(checkpoint: Path, target: Target, ranks: Ranks = 1, trust: Trust = False) -> None:
    """Write a distft checkpoint for another number of ranks. A resume does not need this."""
    _convert(checkpoint, target, {"to": "distft", "ranks": ranks}, trust)


@checkpoint_app.command("convert")
def convert(
    checkpoint: Path,
    target: Target,
    to: Annotated[str, typer.Option(help="distft, deepspeed, universal, huggingface or peft.")],
    ranks: Annotated[
        int | None, typer.Option(min=1, help="For distft and deepspeed: number of ranks to write files for.")
    ] = None,
    zero_stage: Annotated[
        int | None, typer.Option(min=0, max=3, help="For deepspeed: the ZeRO stage.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="For deepspeed and huggingface: fp32, bf16 or fp16 weights.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="For huggingface and peft: llama, mistral, qwen2, qwen3 or gpt2.")
    ] = None,
    run_config: Annotated[
        str | None,
        typer.Option(help="A run's configuration file, for checkpoints that do not describe their model."),
    ] = None,
    parameter_groups: ParameterGroupsFile = None,
    trust: Trust = False,
) -> None:
    """Write a checkpoint in another format; the source does not change."""
    from distft.checkpoint.convert_config import ARCHITECTURES, FORMATS, PRECISIONS

    for option, value, choices in (
        ("--to", to, FORMATS),
        ("--dtype", dtype, PRECISIONS),
        ("--architecture", architecture, ARCHITECTURES),
    ):
        if value is not None:
            _check_choice(option, value, choices)
    settings = {
        "to": to,
        "ranks": ranks,
        "zero_stage": zero_stage,
        "dtype": dtype,
        "architecture": architecture,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    _convert(checkpoint, target, given, trust, run_config, parameter_groups)


@checkpoint_app.command("prune")
def prune(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run's directory, or the directory of its checkpoints.",
            callback=expanded,
        ),
    ],
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest checkpoints to keep.")],
    keep_every_steps: Annotated[
        int | None, typer.Option(min=1, help="Also keep the steps that are multiples of this.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
) -> None:
    """Delete old checkpoints of a run, and frozen weights that no remaining one needs.

    The newest valid checkpoint is always kept.
    """
    from distft import storage
    from distft.checkpoint.config import CheckpointConfig
    from distft.checkpoint.formats.detect import attach_base
    from distft.checkpoint.manifest import MANIFEST
    from distft.checkpoint.steps import find_checkpoint_directory
    from distft.errors import ConfigError

    if storage.exists(storage.join(run, MANIFEST)):
        raise ConfigError(
            f"{run} is a single checkpoint: give its run's directory, or the directory of its checkpoints."
        )
    root = storage.parent(find_checkpoint_directory(run))
    from distft.checkpoint.store import CheckpointStore
    from distft.collectives import SingleProcess

    config = CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every_steps)
    store = CheckpointStore(root, SingleProcess(), attach_base)
    found = store.find_latest_valid()
    for damage in found.damage:
        print_note(damage)
    store.resume_from(found)
    pruned = store.steps_to_prune(config) if dry_run else store.prune(config)
    kept = [step for step in store.valid_steps() if step not in pruned]
    deleted, remaining = ("would delete", "would keep") if dry_run else ("deleted", "kept")
    say(f"{root}: {deleted} {_list_steps(pruned)}; {remaining} {_list_steps(kept)}.")


def _list_steps(steps: list[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}" if steps else "no step"


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    from distft.errors import ConfigError

    if value not in choices:
        raise ConfigError(f"{option} must be one of {', '.join(choices)}, not {value}.")


def _convert(
    checkpoint: str,
    target: str,
    settings: dict[str, Any],
    trust: bool,
    run_config: str | None = None,
    parameter_groups: str | None = None,
) -> None:
    source = open_with_notes(
        checkpoint, trust, weights_only=settings["to"] in {"huggingface", "peft"}, groups=parameter_groups
    )
    if run_config is not None:
        _set_run_config(source, run_config)
    write_checkpoint(
        source, target, settings, [checkpoint], f"step {source.manifest.progress.step} of {source.path}"
    )


def _set_run_config(source: "CheckpointSource", run_config: str) -> None:
    """Use `run_config` as the configuration of the run that wrote `source`, which lacks one."""
    from distft.config import redact
    from distft.errors import ConfigError
    from distft.run.config import load_run_config

    if source.manifest.config:
        raise ConfigError(f"{source.path} describes its model: leave --run-config out.")
    config = redact(load_run_config(expanded(run_config), []).model_dump(mode="json"))
    source.manifest = source.manifest.model_copy(update={"config": config})


def write_checkpoint(
    source: "CheckpointSource", target: str, settings: dict[str, Any], given: list[str], summary: str
) -> None:
    """Convert `source`, which reads the checkpoints at the paths `given`; print notes and `summary`."""
    from distft.checkpoint.convert import convert
    from distft.checkpoint.convert_config import ConvertConfig
    from distft.checkpoint.sources import num_state_bytes
    from distft.checkpoint.target import require_outside
    from distft.config import parse
    from distft.tracker import progress

    config: ConvertConfig = parse(ConvertConfig, settings)
    for path in given:
        require_outside(target, path)
    with progress(num_state_bytes(source), f"writing {config.to}", "bytes") as display:
        notes = convert(source, target, config, display.advance, print_note)
    for note in notes:
        print_note(note)
    say(f"{target}: {summary}, as {config.to}")
