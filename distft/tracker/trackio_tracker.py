"""Metrics to Trackio; the only module that imports trackio, when a run starts."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from distft.tracker.evaluation_tables import pictures_of, tables_of
from distft.tracker.interface import Metrics, require_package
from distft.tracker.logged_steps import LoggedSteps, unsent
from distft.tracker.named_run import NamedRun, stored_id


class TrackioConfig(NamedRun):
    """Log to Trackio, on this machine or in a Space. Credentials come from Hugging Face's login alone."""

    type: Literal["trackio"] = "trackio"
    space_id: str | None = None  # a Space of Hugging Face; null: this machine

    def build(self) -> "TrackioTracker":
        """Raises `ConfigError` if Trackio is not installed."""
        require_package("trackio", "'distft[trackio]'")
        return TrackioTracker(self)


class TrackioTracker:
    """One Trackio run, continued after a resume: its name is in the run's `trackio/run_name.txt`.

    Trackio finds a run by its name, so the run's id stands behind a name from the settings. It keeps every
    point. So that steps never go back, steps that a resumed start does again are not logged twice. What is on
    this machine says itself which it has; of a Space, the run's `trackio/logged_steps.json` does.
    """

    def __init__(self, settings: TrackioConfig) -> None:
        self._settings = settings
        self._run: Any = None
        self._known: dict[str, int] = {}  # the last step of each name that earlier starts have logged here
        self._logged: LoggedSteps | None = None  # to a Space

    def start(
        self,
        run_id: str,
        config: Mapping[str, Any],
        run_dir: Path,
        *,
        resume_step: int | None = None,  # noqa: ARG002 - see the class
    ) -> None:
        import trackio

        settings, directory = self._settings, Path(run_dir) / "trackio"
        path = directory / "run_name.txt"
        is_new = not path.exists()
        name = stored_id(path, run_id if settings.name is None else f"{settings.name}-{run_id}")
        if settings.space_id is not None:
            self._logged = LoggedSteps(directory / "logged_steps.json", f"{settings.space_id}/{name}")
        elif not is_new:
            lines = trackio.SQLiteStorage.get_logs(settings.project, name)
            in_order = sorted(lines, key=lambda line: line["step"])
            self._known = {key: line["step"] for line in in_order for key in line}
        about = {"notes": settings.notes, "tags": list(settings.tags)}
        with _silence():
            self._run = trackio.init(
                project=settings.project,
                name=name,
                group=settings.group,
                space_id=settings.space_id,
                config={**config, **{key: value for key, value in about.items() if value}},
                resume="never" if is_new else "allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, metrics: Metrics, *, step: int) -> None:
        self._log_new(metrics, step)

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        import trackio

        shown: dict[str, Any] = {
            table.name: trackio.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
            for table in tables_of(record)
        }
        shown |= {name: trackio.Image(pixels) for name, pixels in pictures_of(record)}
        self._log_new(shown, step)

    def event(self, kind: str, **fields: Any) -> None:
        """Does nothing: Trackio has no place for events, which `events.jsonl` has."""

    def finish(self, status: str) -> None:  # noqa: ARG002
        import trackio

        with _silence():
            trackio.finish()  # the run's own method would leave it to be finished again when Python ends

    def _log_new(self, values: Mapping[str, Any], step: int) -> None:
        new = unsent(values, step, self._known) if self._logged is None else self._logged.new_of(values, step)
        if new:
            self._run.log(new, step=step)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what Trackio prints, among it a command line for its dashboard."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
