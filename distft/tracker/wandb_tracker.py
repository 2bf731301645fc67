"""Metrics to Weights & Biases; the only module that imports wandb, when a run starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from distft.tracker.evaluation_tables import pictures_of, tables_of
from distft.tracker.interface import Metrics, require_package
from distft.tracker.logged_steps import LoggedSteps
from distft.tracker.named_run import NamedRun, stored_id

RUN_ID_FILE = "run_id.txt"
_LOGGED_STEPS_FILE = "logged_steps.json"


class WandbConfig(NamedRun):
    """Log to Weights & Biases. The API key comes from wandb's login or environment, never from this file."""

    type: Literal["wandb"] = "wandb"
    entity: str | None = None  # user or team; null: wandb's default
    mode: Literal["online", "offline", "disabled"] | None = None  # null: from wandb's own settings

    def build(self) -> "WandbTracker":
        """Raises `ConfigError` if wandb is not installed."""
        require_package("wandb", "wandb")
        return WandbTracker(self)


class WandbTracker:
    """One wandb run, continued after a resume: its id is in `wandb/run_id.txt` of the run's directory.

    wandb keeps every point. So that steps never go back, the steps that a resumed start does again are not
    logged twice: wandb has what was first computed of them, `metrics.jsonl` what counts.
    """

    def __init__(self, settings: WandbConfig) -> None:
        self._settings = settings
        self._run: Any = None
        self._logged: LoggedSteps | None = None  # None: wandb is disabled, and has nothing

    def start(
        self,
        run_id: str,
        config: Mapping[str, Any],
        run_dir: Path,
        *,
        resume_step: int | None = None,  # noqa: ARG002 - a file says which steps wandb has
    ) -> None:
        import wandb

        settings, directory = self._settings, Path(run_dir) / "wandb"
        service_run_id = stored_id(directory / RUN_ID_FILE)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run_id,
            group=settings.group,
            tags=list(settings.tags),
            notes=settings.notes,
            mode=settings.mode,
            config=dict(config),
            dir=str(run_dir),
            id=service_run_id,
            resume="allow",
            # The console, the command line and the git remote may contain secrets that are not masked.
            settings=wandb.Settings(console="off", x_disable_meta=True, disable_git=True, save_code=False),
        )
        if not self._run.disabled:
            self._logged = LoggedSteps(directory / _LOGGED_STEPS_FILE, service_run_id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics, *, step: int) -> None:
        self._log_new(metrics, step)

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        import wandb

        shown: dict[str, Any] = {
            table.name: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
            for table in tables_of(record)
        }
        shown |= {name: wandb.Image(pixels) for name, pixels in pictures_of(record)}
        self._log_new(shown, step)

    def event(self, kind: str, **fields: Any) -> None:
        self._run.summary[f"last_{kind}"] = {key: str(value) for key, value in fields.items()}

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)

    def _log_new(self, values: Mapping[str, Any], step: int) -> None:
        if self._logged is not None and (new := self._logged.new_of(values, step)):
            self._run.log({**new, "step": step})  # wandb's own step counts calls
