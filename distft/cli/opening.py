"""Opens checkpoints for the commands, and says on stderr what was used of them."""

from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.arguments import expanded, print_note

if TYPE_CHECKING:
    from distft.checkpoint.sources import CheckpointSource

Trust = Annotated[
    bool,
    typer.Option("--trust", help="Let DeepSpeed's pickles import unknown classes, which runs their code."),
]
ParameterGroupsFile = Annotated[
    str | None,
    typer.Option(
        "--parameter-groups",
        metavar="FILE",
        help="For DeepSpeed's stage 0: YAML with groups, a list of each optimizer group's parameter names.",
    ),
]


def open_with_notes(
    path: str, trust: bool, *, weights_only: bool = False, groups: str | None = None
) -> "CheckpointSource":
    """The checkpoint at `path`. Prints notes: what was used, and a run's uncommitted steps after its latest.

    `weights_only` as for `open_source`; `groups` is the value of `--parameter-groups`.
    """
    from distft import storage
    from distft.checkpoint.committed import Checkpoint
    from distft.checkpoint.convert_config import ParameterGroups
    from distft.checkpoint.formats.detect import open_source
    from distft.checkpoint.sources import notes_of
    from distft.checkpoint.steps import uncommitted_notes
    from distft.config import load_yaml, parse

    given = None if groups is None else parse(ParameterGroups, load_yaml(expanded(groups))).groups
    source = open_source(path, trust=trust, weights_only=weights_only, parameter_groups=given)
    notes = notes_of(source)
    if isinstance(source, Checkpoint) and source.path != path:
        notes += uncommitted_notes(storage.parent(source.path), after=source.step)
    for note in notes:
        print_note(note)
    return source
