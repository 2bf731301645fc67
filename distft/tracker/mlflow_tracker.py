"""Metrics to MLflow; the only module that imports mlflow, when a run starts."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from distft.tracker.evaluation_tables import pictures_of, tables_of
from distft.tracker.interface import Metrics, require_package
from distft.tracker.logged_steps import unsent
from distft.tracker.named_run import NamedRun, stored_id

_MOST_PARAMS = 100  # in one request
_MOST_CHARACTERS = 500  # of a value of a setting or a tag
_REQUEST_S = 5  # until an answer begins
_MOST_RETRIES = 1  # of a request
_STATUS = {"completed": "FINISHED", "preempted": "KILLED", "interrupted": "KILLED"}  # others: FAILED


class MlflowConfig(NamedRun):
    """Log to MLflow: `project` is its experiment. Credentials come from MLflow's environment alone."""

    type: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = None  # a server, or sqlite:///file.db; null: as MLflow is set up

    def build(self) -> "MlflowTracker":
        """Raises `ConfigError` if MLflow is not installed."""
        require_package("mlflow", "'distft[mlflow]'")
        return MlflowTracker(self)


class MlflowTracker:
    """One MLflow run, continued after a resume: its id is in `mlflow/run_id.txt` of the run's directory.

    MLflow keeps every point. So that steps never go back, the steps that a resumed start does again are not
    logged twice: MLflow has what was first computed of them, `metrics.jsonl` what counts.
    """

    def __init__(self, settings: MlflowConfig) -> None:
        self._settings = settings
        self._client: Any = None
        self._run_id = ""
        self._known: dict[str, int] = {}  # the last step of each metric that earlier starts have logged

    def start(
        self,
        run_id: str,
        config: Mapping[str, Any],
        run_dir: Path,
        *,
        resume_step: int | None = None,  # noqa: ARG002 - MLflow itself says which steps it has
    ) -> None:
        self._client = _quiet_client(self._settings.tracking_uri)
        path = Path(run_dir) / "mlflow" / "run_id.txt"
        if path.exists():
            self._run_id = stored_id(path)
            self._client.update_run(self._run_id, status="RUNNING")
            self._known = self._last_steps()
        else:
            self._run_id = stored_id(path, self._new_run(run_id))
            params = [(name, text[:_MOST_CHARACTERS]) for name, text in _flat(config)]
            for first in range(0, len(params), _MOST_PARAMS):
                self._log_params(params[first : first + _MOST_PARAMS])
        self._client.log_dict(self._run_id, dict(config), "config.json")

    def log(self, metrics: Metrics, *, step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        new = [
            Metric(name, float(value), now_ms, step)
            for name, value in unsent(metrics, step, self._known).items()
        ]
        if new:
            self._client.log_batch(self._run_id, metrics=new)

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        # Files by step, so that a step that is done again replaces its own.
        for table in tables_of(record):
            content = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
            self._client.log_dict(self._run_id, content, f"{table.name}/step_{step:08d}.json")
        for name, pixels in pictures_of(record):
            self._client.log_image(self._run_id, pixels, artifact_file=f"{name}/step_{step:08d}.png")

    def event(self, kind: str, **fields: Any) -> None:
        text = ", ".join(f"{name}={value}" for name, value in fields.items())
        self._client.set_tag(self._run_id, f"last_{kind}", text[:_MOST_CHARACTERS])

    def finish(self, status: str) -> None:
        self._client.set_tag(self._run_id, "status", status)
        self._client.set_terminated(self._run_id, _STATUS.get(status, "FAILED"))

    def _new_run(self, run_id: str) -> str:
        settings = self._settings
        experiment = self._client.get_experiment_by_name(settings.project)
        experiment_id = (
            self._client.create_experiment(settings.project)
            if experiment is None
            else experiment.experiment_id
        )
        tags = {"distft.run_id": run_id, **dict.fromkeys(settings.tags, "true")}
        if settings.group is not None:
            tags["group"] = settings.group
        if settings.notes is not None:
            tags["mlflow.note.content"] = settings.notes
        created = self._client.create_run(experiment_id, run_name=settings.name or run_id, tags=tags)
        return str(created.info.run_id)

    def _log_params(self, params: Sequence[tuple[str, str]]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(self._run_id, params=[Param(name, text) for name, text in params])

    def _last_steps(self) -> dict[str, int]:
        names = self._client.get_run(self._run_id).data.metrics
        histories = {name: self._client.get_metric_history(self._run_id, name) for name in names}
        return {name: max(point.step for point in points) for name, points in histories.items() if points}


def _quiet_client(tracking_uri: str | None) -> Any:
    """MLflow's client, which sends its makers nothing, and waits for its server for seconds.

    By itself it tries for four minutes, in which the run would stand still. What the user's environment says
    of that counts.
    """
    from mlflow import MlflowClient
    from mlflow import environment_variables as mlflow_settings
    from mlflow.telemetry import set_telemetry_client

    mlflow_settings.MLFLOW_DISABLE_TELEMETRY.set(True)
    for setting, value in (
        (mlflow_settings.MLFLOW_HTTP_REQUEST_TIMEOUT, _REQUEST_S),
        (mlflow_settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES, _MOST_RETRIES),
    ):
        if not setting.is_set():
            setting.set(value)
    logging.getLogger("urllib3.connectionpool").addFilter(_is_no_retry)
    set_telemetry_client()
    return MlflowClient(tracking_uri)


def _is_no_retry(record: logging.LogRecord) -> bool:
    """For a filter of urllib3's log: a request that fails for good is told by `Trackers`, once."""
    return not str(record.msg).startswith("Retrying")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
