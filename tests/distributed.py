"""Several ranks in one test: processes forked from a server that holds torch and DeepSpeed already.

`run_ranks(function, 2, argument)` calls `function(topology, argument)` on two ranks and returns what they
returned. `start_ranks` hands out the running ranks instead, for a test that kills one. The function makes
its own process group (`torch.distributed.init_process_group("gloo")`, or the engine does), as it would under
torchrun, whose environment it finds.
"""

import faulthandler
import functools
import importlib.util
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context, parent_process
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

from distft.topology import Topology

_TESTS = Path(__file__).parent
_SHOWN_LINES = 40  # of a rank's output, in the message about its failure
_LAST_WORDS_S = 0.3  # for the peers of a failed rank, to say what they saw


class RanksError(AssertionError):
    """Some ranks did not return. `faults` says what became of each of them, the first to fail first."""

    def __init__(self, faults: Mapping[int, str], world_size: int) -> None:
        self.faults = dict(faults)
        told = [f"rank {rank} {fault.rstrip()}" for rank, fault in faults.items()]
        super().__init__("\n\n".join([f"{len(faults)} of {world_size} ranks did not return.", *told]))


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `function(topology, *args)` on every rank; return the results, by rank.

    `function` stands at the top level of its module; arguments and results can be pickled. A rank has the
    environment that the test session began with, torchrun's variables, and `env` over both.
    Raises `RanksError` with the traceback, the signal or the stack of each rank that did not return;
    the others are then killed.
    """
    with start_ranks(function, world_size, *args, env=env) as ranks:
        return ranks.wait(timeout_s=timeout_s)


def start_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, env: Mapping[str, str] | None = None
) -> "Ranks":
    """Start what `run_ranks` runs, and return at once. Leaving the `with` block kills what still runs."""
    start_pool()
    return Ranks(_Call.of(function, args), world_size, dict(env or {}))


@functools.cache
def start_pool() -> None:
    """Start the fork server, without waiting for it: it imports for 5 s beside the tests of one process."""
    get_context("forkserver").set_forkserver_preload(["warm_ranks"])
    environment = {
        "DS_ACCELERATOR": "cpu",  # DeepSpeed looks when it is imported
        "OMP_NUM_THREADS": "1",  # so does torch
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")])),
        "PYTHONWARNINGS": "ignore",  # third parties', while they are imported
    }
    with _environment(environment):
        forkserver.ensure_running()


class Ranks:
    """Running ranks. To be used in a `with` block, at whose end none of them is left."""

    def __init__(self, call: "_Call", world_size: int, env: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="ranks_")
        self._results: dict[int, Any] = {}
        self._faults: dict[int, str] = {}
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
                raise RuntimeError(
                    "The fork server of the ranks has ended: stderr has its reason."
                ) from error
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
        """Send a signal to one rank. A rank that has gone already is left in peace."""
        if self._processes[rank].is_alive():
            os.kill(self._pids[rank], number)

    def output(self, rank: int) -> str:
        """What the rank and the libraries under it have printed so far, on stdout and stderr."""
        path = self._output_of(rank)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, *, timeout_s: float = 120, last_words_s: float = _LAST_WORDS_S) -> list[Any]:
        """Return the ranks' results, in order, or raise `RanksError`.

        When a rank fails, the others get `last_words_s` more to return or to fail by themselves.
        """
        deadline = monotonic() + timeout_s
        while self._unsettled and (left_s := deadline - monotonic()) > 0:
            failed_before = bool(self._faults)
            self._receive(left_s)
            if self._faults and not failed_before:
                deadline = min(deadline, monotonic() + last_words_s)
        self._name_the_unsettled(timeout_s)
        if self._faults:
            raise RanksError(self._faults, self.world_size)
        return [self._results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Kill the ranks that still run, and remove their output."""
        for rank in range(self.world_size):
            self._connections[rank].close()  # what a rank that is done waits for
            if rank not in self._results:
                self.kill(rank)
        for rank, process in enumerate(self._processes):
            process.join(timeout=5)
            self.kill(rank)
            process.join()
        self._output.cleanup()

    @property
    def _unsettled(self) -> list[int]:
        return [r for r in range(self.world_size) if r not in self._results and r not in self._faults]

    def _start(self, call: "_Call", env: Mapping[str, str]) -> None:
        rank = self.world_size
        context = get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_rank_main, args=(call, theirs, str(self._output_of(rank)), env), name=f"rank {rank}"
        )
        process.start()
        theirs.close()  # so that the end of the rank is the end of the pipe
        assert process.pid is not None
        self._pids.append(process.pid)
        self._processes.append(process)
        self._connections.append(ours)

    def _output_of(self, rank: int) -> Path:
        return Path(self._output.name) / f"rank_{rank}.txt"

    def _receive(self, timeout_s: float) -> None:
        """Settle the ranks that have something to say, or have ended, within `timeout_s`."""
        unsettled = self._unsettled
        sources = [
            one for rank in unsettled for one in (self._connections[rank], self._processes[rank].sentinel)
        ]
        ready = connection.wait(sources, timeout=timeout_s)
        settled = [
            r for r in unsettled if self._connections[r] in ready or self._processes[r].sentinel in ready
        ]
        # A rank that died is the cause of what its peers raise, though their word may come first.
        for rank in sorted(settled, key=lambda rank: self._connections[rank].poll()):
            self._settle(rank)

    def _settle(self, rank: int) -> None:
        try:
            has_returned, content = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join()
            self._faults[rank] = _obituary(self._processes[rank].exitcode) + self._last_output(rank)
            return
        if has_returned:
            self._results[rank] = pickle.loads(content)
        else:
            self._faults[rank] = f"raised:\n{content}" + self._last_output(rank)

    def _name_the_unsettled(self, timeout_s: float) -> None:
        unsettled = self._unsettled
        if self._faults:
            verdict = "was still running when it was stopped for the sake of the others."
        else:
            verdict = f"was still running after {timeout_s:g} s."
        for rank in unsettled:
            self.kill(rank, signal.SIGUSR1)  # the rank writes its stacks to its output, and ends
        for rank in unsettled:
            self._processes[rank].join(timeout=5)
            self._faults[rank] = verdict + self._last_output(rank)

    def _last_output(self, rank: int) -> str:
        lines = self.output(rank).splitlines()[-_SHOWN_LINES:]
        return "\n".join(["", f"Output of rank {rank}:", *lines]) if lines else ""


@dataclass(frozen=True, slots=True)
class _Call:
    """A function by its file, for pytest's modules bear names that another process cannot import."""

    path: str
    module: str
    name: str
    arguments: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...]) -> "_Call":
        name = function.__qualname__
        if "." in name or "<" in name:
            raise ValueError(f"A rank cannot find {name}: it must stand at the top level of its module.")
        return cls(function.__code__.co_filename, function.__module__, name, pickle.dumps(args))

    def run(self, topology: Topology) -> Any:
        if self.module not in sys.modules:
            spec = importlib.util.spec_from_file_location(self.module, self.path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.module] = module
            spec.loader.exec_module(module)
        # After the module, whose classes the arguments may be of.
        return getattr(sys.modules[self.module], self.name)(topology, *pickle.loads(self.arguments))


def _rank_main(call: _Call, parent: connection.Connection, output: str, env: Mapping[str, str]) -> NoReturn:
    """Where a rank begins; it ends without teardown, because a process group's may wait for a dead peer."""
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    stream = Path(output).open("ab", buffering=0)  # noqa: SIM115  open as long as the process
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR1, stream, chain=True)
    os.environ.update(env)
    exit_code = 1
    try:
        parent.send_bytes(pickle.dumps((True, _result(call))))
        parent.poll(None)  # peers may still talk to this rank: it stays until all have returned
        exit_code = 0
    except BaseException:
        parent.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _result(call: _Call) -> bytes:
    import torch

    torch.set_num_threads(1)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"distft\.")
    return pickle.dumps(call.run(Topology.from_env(os.environ)))


def _end_with_the_tests() -> None:
    tests = parent_process()
    assert tests is not None
    connection.wait([tests.sentinel])
    os._exit(1)


def _obituary(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}."
    return f"exited with code {exit_code} in the middle of its work."


def _launch_environment(world_size: int) -> dict[str, str]:
    launch = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    if sys.platform == "linux":
        launch["GLOO_SOCKET_IFNAME"] = "lo"  # a host name need not resolve to an address of this machine
    return launch


def _free_port() -> int:
    """A port that nobody listens on, below the range that the kernel hands to outgoing connections."""
    source = random.SystemRandom()  # pytest plugins seed the common one, and then all sessions meet
    while True:
        port = source.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
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
