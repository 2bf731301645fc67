"""Metrics as TensorBoard event files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from distft.config import Settings
from distft.tracker.evaluation_tables import pictures_of, tables_of
from distft.tracker.interface import Metrics, require_package


class TensorBoardConfig(Settings):
    """Write TensorBoard event files to `tensorboard/` in the run's directory."""

    type: Literal["tensorboard"] = "tensorboard"
    flush_s: int = 30  # seconds between writes

    def build(self) -> "TensorBoardTracker":
        """Raises `ConfigError` if TensorBoard is not installed."""
        require_package("tensorboard", "'distft[tensorboard]'")
        return TensorBoardTracker(self)


class TensorBoardTracker:
    """Writes event files; after a resume, TensorBoard hides the points after the resumed step."""

    def __init__(self, settings: TensorBoardConfig) -> None:
        self._settings = settings
        self._writer: Any = None

    def start(
        self,
        run_id: str,  # noqa: ARG002
        config: Mapping[str, Any],
        run_dir: Path,
        *,
        resume_step: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        directory = str(Path(run_dir) / "tensorboard")
        self._writer = SummaryWriter(directory, purge_step=purge_step, flush_secs=self._settings.flush_s)
        text = json.dumps(dict(config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, metrics: Metrics, *, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        for table in tables_of(record):
            self._writer.add_text(table.name, table.markdown(), step)
        for name, pixels in pictures_of(record):
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def event(self, kind: str, **fields: Any) -> None:
        self._writer.add_text(f"event/{kind}", ", ".join(f"{key}={value}" for key, value in fields.items()))

    def finish(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()
