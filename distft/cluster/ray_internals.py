"""All uses of Ray's private names and of its undocumented messages and environment variables.

Written for the Ray version in constraints.txt: check this file when that version changes. Ray and its slow
modules are imported where they are used, since every worker and `distft submit` import this one.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

_RESERVATION_ACTOR = "AutoscalingCoordinator"  # the name of the actor, and its namespace
_WORKER_CLASS = "RayTrainWorker"
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_CLIENT_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_HTTP_STATUS = re.compile(r"status code (\d{3})")
_PID = re.compile(r"\bpid: (\d+)")
_SOCKET_PATH_LIMIT = re.compile(r"path length cannot exceed (\d+) bytes")
_NODE_ADDRESS = re.compile(r"\bip: (\S+)")


# Nodes. Ray's public functions report sums over the cluster only.


def free_resources_per_node() -> list[dict[str, Any]]:
    """For each node that is alive, the resources that are not in use."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def draining_node_ids() -> set[str]:
    """Ids of the nodes whose departure was announced, for example by a cloud provider."""
    from ray._private.state import state

    return set(state.get_draining_nodes())  # as Ray Train's own preemption watcher does


def num_workers_placed() -> int:
    """How many workers of this driver's run have a place on a node, whether they train already or not."""
    import ray
    from ray._private.state import actors

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return sum(
        actor["ActorClassName"] == _WORKER_CLASS and actor["State"] != "DEAD"
        for actor in actors(job_id=job).values()
    )


def socket_path_limit(error: BaseException) -> int | None:
    """If Ray's directory is too long for its sockets: how many bytes their paths may have."""
    found = _SOCKET_PATH_LIMIT.search(str(error))
    return None if found is None else int(found[1])


# Jobs.


def is_submitted_job(environ: Mapping[str, str]) -> bool:
    """Whether `environ` is that of the entry point of a Ray job."""
    return _JOB_VARIABLE in environ


def connect_job_client(address: str, *, request_timeout_s: float) -> Any:
    """Ray's JobSubmissionClient with a time limit for each request, which Ray's own does not have.

    Raises Ray's own errors if no dashboard answers at `address`.
    """
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=request_timeout_s, **options)

    # Drop its INFO messages about every request, unless the root logger's level is INFO.
    if not logging.getLogger().isEnabledFor(logging.INFO):
        for name in _CLIENT_LOGGERS:  # the import above sets their levels
            logging.getLogger(name).setLevel(logging.WARNING)
    return Client(address)


def session_name(client: Any) -> str:
    """The name of the cluster's session, which its head chooses when it starts."""
    return str(client._do_request("GET", "/api/version").json().get("session_name", ""))


def http_status(error: BaseException) -> int | None:
    """The HTTP status of the answer that made Ray's client raise `error`; None without an answer."""
    found = _HTTP_STATUS.search(str(error))
    return None if found is None else int(found[1])


def files_to_upload(directory: Path) -> list[Path]:
    """The files that Ray's client would upload: all but those that `.gitignore` and `.rayignore` name."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import _dir_travel

    found: list[Path] = []
    follows = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(directory, [], found.append, include_gitignore=follows)
    return [path for path in found if path.is_file()]


def is_job_agent_missing(error: BaseException) -> bool:
    """Whether the cluster refused a job because no node has a job agent (yet)."""
    return "No available agent" in str(error)


def is_job_id_taken(error: BaseException, job_id: str) -> bool:
    """Whether the cluster refused a job because `job_id` exists."""
    return f"{job_id} already exists" in str(error)


# Ray Train.


def set_ray_environment(
    environ: MutableMapping[str, str], *, start_attempt_s: float, health_check_timeout_s: float
) -> None:
    """Put the settings that Ray reads from the environment into `environ`, before `ray.init`.

    Ray waits `start_attempt_s` for the workers of one attempt to start, and considers a worker lost if it
    does not answer for `health_check_timeout_s`.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{start_attempt_s:g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{health_check_timeout_s:g}",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # until a lost rank is noticed; Ray's default is 2 s
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # starts a process each time; StopMonitor does its work
    }
    for name, value in defaults.items():
        environ.setdefault(name, value)
    environ.update(
        RAY_CHDIR_TO_TRIAL_DIR="0",  # relative paths keep their meaning
        RAY_TRAIN_METRICS_ENABLED="0",  # a run has trackers
        RAY_TRAIN_ENABLE_PRINT_PATCH="0",  # the mailbox forwards rank 0's output
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1",  # a worker without GPUs sees none
    )


def worker_start_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Has workers import Ray Train and torch without collecting garbage, which takes a fifth of the time.

    The worker resumes it. Leaves a hook alone that the user has given to the job.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

    return {} if HOOK in environ else {HOOK: "gc.disable"}


def make_torch_trainer(train_loop: Callable[[], Any], **options: Any) -> Any:
    """A TorchTrainer that starts no other processes together with the ranks, whose start they would slow.

    Ray Data and the barrier of `ray.train.report`, neither of which distft uses, would start one each time.
    It leaves SIGINT to its caller; after an exception in `fit()`, such as `KeyboardInterrupt`, call its
    method `abort(timeout_s)`.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class KeepBarrier(WorkerGroupCallback):  # type: ignore[misc]  # Ray has no types
        def before_worker_group_start(self, worker_group_context: Any) -> None:  # noqa: ARG002
            keep_barrier()  # in the process of Ray Train's controller

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [KeepBarrier(), *(one for one in callbacks if not isinstance(one, DatasetsCallback))]

        def _register_sigint_handler(self, controller: Any) -> None:
            self._controller = controller

        def abort(self, timeout_s: float) -> None:
            """End the workers and release their resources; a controller that is busy may not hear of it."""
            controller = getattr(self, "_controller", None)
            if controller is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(controller.abort.remote(), timeout=timeout_s)

    return Trainer(train_loop, **options)


def keep_barrier() -> None:
    """Have Ray Train keep the actor of its barrier for all starts of workers.

    A new one would import Ray Train at the same time as the ranks: 2 s of a core.
    """
    from ray.train.v2._internal.execution.worker_group import state, worker_group

    if not isinstance(worker_group.SynchronizationActor, _OnceCreated):
        worker_group.SynchronizationActor = _OnceCreated(worker_group.SynchronizationActor)
        state._shutdown_sync_actor = lambda actor: None  # noqa: ARG005


class _OnceCreated:
    """Stands for a class of actors: the first call creates an actor, the others return the same."""

    def __init__(self, actor_class: Any) -> None:
        self._actor_class = actor_class
        self._options: dict[str, Any] = {}
        self._actor: Any = None

    def options(self, **options: Any) -> "_OnceCreated":
        self._options = options
        return self

    def remote(self, **arguments: Any) -> Any:
        if self._actor is None:
            self._actor = self._actor_class.options(**self._options).remote(**arguments)
        return self._actor


def reservation_name() -> str:
    """The name under which the Ray Train run of this worker reserves resources."""
    from ray.train.v2._internal.execution.context import get_train_context

    return f"train-{get_train_context().train_run_context.run_id}"


def cancel_reservation(name: str, *, timeout_s: float) -> None:
    """Release the resources reserved under `name`. Raises `ValueError` if nothing is reserved at all."""
    import ray

    coordinator = ray.get_actor(_RESERVATION_ACTOR, namespace=_RESERVATION_ACTOR)
    ray.get(coordinator.cancel_request.remote(requester_id=name), timeout=timeout_s)


def is_start_timeout(error: BaseException) -> bool:
    """Whether the workers of an attempt did not start in time."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, WorkerGroupStartupTimeoutError)


def is_health_check_timeout(error: BaseException) -> bool:
    """Whether a worker did not answer Ray Train's health checks."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    return isinstance(error, WorkerHealthCheckTimeoutError)


def health_check_cause(error: BaseException) -> BaseException:
    """The cause of a failed health check; any other error unchanged."""
    cause: BaseException = getattr(error, "health_check_failure", error)
    return cause


def process_of(error: BaseException) -> str:
    """Node and pid from Ray's message about a lost process, such as `node 10.0.0.2, pid 17`; may be empty."""
    text = str(error)
    found = (("node", _NODE_ADDRESS.search(text)), ("pid", _PID.search(text)))
    return ", ".join(f"{name} {match[1]}" for name, match in found if match)
