"""Weights & Biases. This module alone imports wandb, and only when a run starts."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from distft.config import Settings
from distft.errors import ConfigError
from distft.tracker.protocol import Metrics

RUN_ID_FILE = "run_id.txt"


class WandbConfig(Settings):
    """Log to Weights & Biases. The key comes from wandb's own login or environment, never from here."""

    type: Literal["wandb"] = "wandb"
    project: str = "distft"
    entity: str | None = None  # user or team; None: wandb's default
    name: str | None = None  # of the run, as shown; None: its run_id
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] | None = None  # None: as wandb's own settings say
    notes: str | None = Field(None, max_length=10_000)

    def build(self) -> "WandbTracker":
        """Raises `ConfigError` where wandb is not installed."""
        from importlib.util import find_spec

        if find_spec("wandb") is None:
            raise ConfigError(
                "tracker type 'wandb' needs the package wandb: pip install wandb, or leave it out."
            )
        return WandbTracker(self)


class WandbTracker:
    """One wandb run, the same one after a resume: its id lies in `wandb/run_id.txt` of the run."""

    def __init__(self, settings: WandbConfig) -> None:
        self._settings = settings
        self._run: Any = None

    def start(
        self,
        run_id: str,
        config: Mapping[str, Any],
        run_dir: Path,
        *,
        resume_step: int | None = None,  # noqa: ARG002 - wandb keeps both attempts: see `log`
    ) -> None:
        import wandb

        wanted = self._settings
        self._run = wandb.init(
            project=wanted.project,
            entity=wanted.entity,
            name=wanted.name or run_id,
            group=wanted.group,
            tags=list(wanted.tags),
            notes=wanted.notes,
            mode=wanted.mode,
            config=dict(config),
            dir=str(run_dir),
            id=_kept_run_id(Path(run_dir)),
            resume="allow",
            # The console, the command line and the git remote can hold secrets that no mask has seen.
            settings=wandb.Settings(console="off", x_disable_meta=True, disable_git=True, save_code=False),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics, *, step: int) -> None:
        # Not wandb's own step: that must never go back, and after a resume ours does.
        self._run.log({**metrics, "step": step})

    def event(self, kind: str, **fields: Any) -> None:
        self._run.summary[f"last_{kind}"] = {key: str(value) for key, value in fields.items()}

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)


def _kept_run_id(run_dir: Path) -> str:
    path = run_dir / "wandb" / RUN_ID_FILE
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(4)
    path.write_text(f"{run_id}\n")
    return run_id
