"""Runs a function on several ranks: processes forked from a server that has imported torch and DeepSpeed.

`run_ranks(function, 2, argument)` calls `function(topology, argument)` on two ranks and returns both results.
`start_ranks` returns the running ranks instead, for a test that kills one. Each rank gets torchrun's
environment variables; the function (or its engine) creates the process group, as under torchrun.
"""

import faulthandler
import functools
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context, parent_process
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn

from distft.topology import Topology
from support.ports import free_port

_TESTS = Path(__file__).parents[1]
_MAX_OUTPUT_LINES = 40  # of a rank's output, in the message about its failure
_SETTLE_S = 0.1  # until the death of a rank, whose peer has raised, shows
_GRACE_S = 0.3  # for the peers of a failed rank to return or raise


class RanksError(AssertionError):
    """Some ranks did not return. `failures` maps each such rank to the reason, in the order of failure."""

    def __init__(self, failures: Mapping[int, str], world_size: int) -> None:
        self.failures = dict(failures)
        reasons = [f"rank {rank} {reason.rstrip()}" for rank, reason in failures.items()]
        super().__init__("\n\n".join([f"{len(failures)} of {world_size} ranks did not return.", *reasons]))


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `function(topology, *args)` on every rank; return the results in rank order.

    `function` must be at the top level of its module; arguments and results must be picklable. A rank's
    environment is that of the test session's start, then torchrun's variables, then `env`.
    If a rank fails, kills the others and raises `RanksError` with the traceback, signal or stack of each rank
    that did not return.
    """
    with start_ranks(function, world_size, *args, env=env) as ranks:
        return ranks.wait(timeout_s=timeout_s)


def start_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, env: Mapping[str, str] | None = None
) -> "Ranks":
    """Like `run_ranks`, but return at once. Leaving the `with` block kills the ranks that still run."""
    start_pool()
    return Ranks(_RemoteCall.of(function, args), world_size, dict(env or {}))


@functools.cache
def start_pool() -> None:
    """Start the fork server and return at once. Its imports take 5 s, while the first tests run."""
    get_context("forkserver").set_forkserver_preload(["support.rank_pool_preload"])
    environment = {
        "DS_ACCELERATOR": "cpu",  # DeepSpeed reads it on import
        "OMP_NUM_THREADS": "1",  # torch does, too
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")])),
        "PYTHONWARNINGS": "ignore",  # those of third-party imports
    }
    with _temporary_environment(environment):
        forkserver.ensure_running()


class Ranks:
    """Running ranks. Use it in a `with` block; no rank outlives the block."""

    def __init__(self, call: "_RemoteCall", world_size: int, env: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="ranks_")
        self._results: dict[int, Any] = {}
        self._failures: dict[int, str] = {}
        self._pids: list[int] = []
        self._processes: list[ForkServerProcess] = []
        self._connections: list[connection.Connection] = []
        launch = _launch_environment(world_size)
        try:
            for rank in range(world_size):
                self._start(call, {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank), **env})
        except BaseException as error:
            self.close()
            if isinstance(error, EOFError):
                raise RuntimeError("The fork server of the ranks has ended; stderr says why.") from error
            raise

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def world_size(self) -> int:
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        return list(self._pids)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one rank, unless it has ended."""
        if self._processes[rank].is_alive():
            os.kill(self._pids[rank], number)

    def output(self, rank: int) -> str:
        """The output of the rank and its libraries so far, to stdout and stderr."""
        path = self._output_of(rank)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, *, timeout_s: float = 120, grace_s: float = _GRACE_S) -> list[Any]:
        """Return the results in rank order, or raise `RanksError`.

        After the first failure, the other ranks have `grace_s` seconds to return or raise.
        """
        deadline = monotonic() + timeout_s
        while self._pending and (left_s := deadline - monotonic()) > 0:
            failed_before = bool(self._failures)
            self._receive(left_s)
            if self._failures and not failed_before:
                deadline = min(deadline, monotonic() + grace_s)
        self._stop_pending(timeout_s)
        if self._failures:
            raise RanksError(self._failures, self.world_size)
        return [self._results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Kill the ranks that still run; delete the output files."""
        for rank in range(self.world_size):
            self._connections[rank].close()  # lets a rank that has returned exit
            if rank not in self._results:
                self.kill(rank)
        for rank, process in enumerate(self._processes):
            process.join(timeout=5)
            self.kill(rank)
            process.join()
        self._output.cleanup()

    @property
    def _pending(self) -> list[int]:
        return [r for r in range(self.world_size) if r not in self._results and r not in self._failures]

    def _start(self, call: "_RemoteCall", env: Mapping[str, str]) -> None:
        rank = self.world_size
        context = get_context("forkserver")
        parent_end, rank_end = context.Pipe()
        niceness = os.getpriority(os.PRIO_PROCESS, 0)  # of the test; the fork server is older than that
        arguments = (call, rank_end, str(self._output_of(rank)), env, niceness)
        process = context.Process(target=_rank_main, args=arguments, name=f"rank {rank}")
        process.start()
        rank_end.close()  # otherwise the pipe would stay open after the rank has ended
        assert process.pid is not None
        self._pids.append(process.pid)
        self._processes.append(process)
        self._connections.append(parent_end)

    def _output_of(self, rank: int) -> Path:
        return Path(self._output.name) / f"rank_{rank}.txt"

    def _receive(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` until a rank returns, raises or ends; record every rank that has."""
        pending = self._pending
        sources = [
            one for rank in pending for one in (self._connections[rank], self._processes[rank].sentinel)
        ]
        ready = connection.wait(sources, timeout=timeout_s)
        messages = {rank: self._message(rank) for rank in pending if self._is_in(rank, ready)}
        if not self._failures and any(one is not None and not one[0] for one in messages.values()):
            # A process that is killed closes its sockets before its pipe: a peer may raise in between.
            sleep(_SETTLE_S)
            ready = connection.wait(sources, timeout=0)
            others = [rank for rank in pending if rank not in messages and self._is_in(rank, ready)]
            messages |= {rank: self._message(rank) for rank in others}
        # Ranks that died without a message first: their death is why the peers raised.
        for rank in sorted(messages, key=lambda rank: messages[rank] is not None):
            self._record(rank, messages[rank])

    def _is_in(self, rank: int, ready: Collection[Any]) -> bool:
        return self._connections[rank] in ready or self._processes[rank].sentinel in ready

    def _message(self, rank: int) -> tuple[bool, Any] | None:
        """Whether the rank has returned, and what or why not; None if it died without a word."""
        try:
            message: tuple[bool, Any] = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            return None
        return message

    def _record(self, rank: int, message: tuple[bool, Any] | None) -> None:
        if message is None:
            self._processes[rank].join()
            self._failures[rank] = _describe_exit(self._processes[rank].exitcode) + self._last_output(rank)
        elif message[0]:
            self._results[rank] = pickle.loads(message[1])
        else:
            self._failures[rank] = f"raised:\n{message[1]}" + self._last_output(rank)

    def _stop_pending(self, timeout_s: float) -> None:
        pending = self._pending
        if self._failures:
            reason = "was still running when it was stopped because another rank had failed."
        else:
            reason = f"was still running after {timeout_s:g} s."
        for rank in pending:
            self.kill(rank, signal.SIGUSR1)  # the rank writes its stacks to its output, and ends
        for rank in pending:
            self._processes[rank].join(timeout=5)
            self._failures[rank] = reason + self._last_output(rank)

    def _last_output(self, rank: int) -> str:
        lines = self.output(rank).splitlines()[-_MAX_OUTPUT_LINES:]
        return "\n".join(["", f"Output of rank {rank}:", *lines]) if lines else ""


@dataclass(frozen=True, slots=True)
class _RemoteCall:
    """A function named by its file: another process cannot import test modules by name."""

    path: str
    module: str
    name: str
    arguments: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...]) -> "_RemoteCall":
        name = function.__qualname__
        if "." in name or "<" in name:
            raise ValueError(f"A rank cannot import {name}: define it at the top level of its module.")
        return cls(function.__code__.co_filename, function.__module__, name, pickle.dumps(args))

    def run(self, topology: Topology) -> Any:
        if self.module not in sys.modules:
            spec = importlib.util.spec_from_file_location(self.module, self.path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.module] = module
            spec.loader.exec_module(module)
        # Unpickled last: the arguments may be instances of the module's classes.
        return getattr(sys.modules[self.module], self.name)(topology, *pickle.loads(self.arguments))


def _rank_main(
    call: _RemoteCall, parent: connection.Connection, output: str, env: Mapping[str, str], niceness: int
) -> NoReturn:
    """Entry point of a rank. It exits without teardown, in which a process group may wait for a dead peer."""
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    stream = Path(output).open("ab", buffering=0)  # noqa: SIM115  stays open until the process exits
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR1, stream, chain=True)
    os.environ.update(env)
    exit_code = 1
    try:
        parent.send_bytes(pickle.dumps((True, _result(call))))
        parent.poll(None)  # stay until all have returned: peers may still communicate with this rank
        exit_code = 0
    except BaseException:
        parent.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _result(call: _RemoteCall) -> bytes:
    import torch

    torch.set_num_threads(1)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"distft\.")
    return pickle.dumps(call.run(Topology.from_env(os.environ)))


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}."
    return f"exited with code {exit_code} before it returned."


def _launch_environment(world_size: int) -> dict[str, str]:
    launch = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    if sys.platform == "linux":
        launch["GLOO_SOCKET_IFNAME"] = "lo"  # the host name may not resolve to this machine
    return launch


@contextmanager
def _temporary_environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
