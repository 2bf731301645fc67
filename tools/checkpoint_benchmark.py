"""Benchmark of checkpoint tools, side by side: `python tools/benchmark.py checkpoint`.

Input is random state of a model with both moments, as two ranks write it. Each candidate runs in its own
process, after its imports and with the files in the page cache; memory is the peak of that process and its
children, above an idle interpreter with the same imports.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.metadata import version
from io import StringIO
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from distft.checkpoint.background import CheckpointSaver
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.convert import convert
from distft.checkpoint.convert_config import ConvertConfig
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord
from distft.checkpoint.reshard import contiguous_layout, write_distft
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.sources import read_state
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.model.heads import LANGUAGE_MODEL
from distft.model.transformer_config import TransformerConfig
from distft.optim.adamw import ADAMW_MOMENTS
from distft.run.model import parameter_shapes

_STATES = (WEIGHT, *ADAMW_MOMENTS)

SHAPES = {
    "tiny": TransformerConfig(vocab_size=512, max_seq_len=128, d_model=64, num_layers=2, num_heads=4),
    "110M": TransformerConfig(vocab_size=32000, max_seq_len=2048, d_model=768, num_layers=12, num_heads=12),
    "1.1B": TransformerConfig(vocab_size=32000, max_seq_len=2048, d_model=2048, num_layers=20, num_heads=16),
}
LOADING_RANKS = 4
Measurement = Callable[[], tuple[float, float]]  # returns seconds and MiB
# Candidates that also run on a model of 10 GB.
RUN_ON_LARGE_MODEL = ("cp", "reshard to 4", "to huggingface", "load at 4 ranks")


class RandomCheckpoint:
    """A source without files: `read` draws random state."""

    format = "random"
    path = "random"

    def __init__(self, model: TransformerConfig) -> None:
        states = {state: StateRecord(dtype="float32") for state in _STATES}
        self.manifest = Manifest(
            run_id="benchmark",
            progress=Progress(step=100),
            config={"model": model.model_dump(mode="json")},
            written_by={"param_dtype": "fp32"},
            parameters={
                name: ParameterRecord(shape=shape, trainable=True, updates=100, states=states)
                for name, shape in parameter_shapes(model, LANGUAGE_MODEL).items()
            },
            files=[],
        )

    def has(self, parameter: str, state: str) -> bool:
        return parameter in self.manifest.parameters and state in _STATES

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self.manifest.parameters[parameter].shape

    def dtype(self, parameter: str, state: str) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def updates(self, parameter: str) -> int:
        return self.manifest.parameters[parameter].updates

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((parameter, state, start)) % 2**63)
        return torch.rand(stop - start, generator=generator)

    def find_damage(self) -> list[str]:
        return []


def convert_with_distft(source: str, target: str, settings: dict[str, object]) -> None:
    convert(Checkpoint.open(source), target, ConvertConfig.model_validate(settings), lambda _: None)


def load_as_rank(source: str, rank: int) -> None:
    """Resume as one of `LOADING_RANKS` ranks: verify its share of the files, read its slice of the state."""
    checkpoint = Checkpoint.open(source)
    numbers = range(rank, len(checkpoint.manifest.files), LOADING_RANKS)
    assert not checkpoint.find_damage(list(numbers))
    numels = {name: prod(record.shape) for name, record in checkpoint.manifest.parameters.items()}
    for name, (start, stop) in contiguous_layout(numels, LOADING_RANKS)[rank].items():
        for state in _STATES:
            read_state(checkpoint, name, state, torch.empty(stop - start), start)


def ds_to_universal(source: str, target: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=source,
            output_folder=target,
            num_extract_workers=2,
            num_merge_workers=2,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def zero_to_fp32(source: str, target: str) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(source, target)


def _child(pipe: Connection, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    if work in (ds_to_universal, zero_to_fp32):
        import deepspeed.checkpoint.ds_to_universal  # noqa: F401
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which the imports have reached
    idle_kib = _peak_kib()
    began = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        work(*arguments)
    seconds = time.perf_counter() - began
    of_children_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    pipe.send((seconds, (max(_peak_kib(), of_children_kib) - idle_kib) / 1024))


def _peak_kib() -> int:
    """Peak memory of this process. getrusage would include the parent that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def run_in_processes(*works: tuple[Callable[..., None], tuple[object, ...]]) -> tuple[float, float]:
    """Run `works` at the same time; returns seconds until all are done, and the largest peak in MiB."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for work, arguments in works:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, work, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return max(seconds for seconds, _ in results), max(memory for _, memory in results)


def copy(source: str, target: str) -> tuple[float, float]:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    return time.perf_counter() - began, 0.0


def candidates(distft_source: str, deepspeed_sources: dict[int, str], out: Path) -> dict[str, Measurement]:
    """Measurement by name. `deepspeed_sources` are by ZeRO stage."""

    def tool(name: str, settings: dict[str, object]) -> Measurement:
        return lambda: run_in_processes((convert_with_distft, (distft_source, str(out / name), settings)))

    loads = [(load_as_rank, (distft_source, rank)) for rank in range(LOADING_RANKS)]
    table: dict[str, Measurement] = {
        "cp": lambda: copy(distft_source, str(out / "cp")),
        "load at 4 ranks": lambda: run_in_processes(*loads),
        "reshard to 4": tool("reshard", {"to": "distft", "ranks": 4}),
        "to universal": tool("universal", {"to": "universal"}),
        "to huggingface": tool("huggingface", {"to": "huggingface"}),
    }
    for stage, source in deepspeed_sources.items():
        tag = str(next(path for path in Path(source).iterdir() if path.is_dir()))
        table[f"ds_to_universal, stage {stage}"] = partial(
            run_in_processes, (ds_to_universal, (tag, str(out / f"universal_{stage}")))
        )
        table[f"zero_to_fp32, stage {stage}"] = partial(
            run_in_processes, (zero_to_fp32, (source, str(out / f"fp32_{stage}")))
        )
    return table


def measure_stall(model: TransformerConfig, folder: Path) -> dict[str, float]:
    """Seconds that training stands still for a save, in the background and not: the best of three."""
    shapes = parameter_shapes(model, LANGUAGE_MODEL)
    fragments = [
        Fragment(name, state, 0, torch.rand(prod(shape)))
        for name, shape in shapes.items()
        for state in (WEIGHT, *ADAMW_MOMENTS)
    ]
    stalls = {}
    for in_background in (False, True):
        store = CheckpointStore(str(folder / f"stall_{in_background}"), SingleProcess())
        saver = CheckpointSaver(store, CheckpointConfig(in_background=in_background, keep_last=1))
        for step in (1, 2, 3):
            saver.save(_snapshot(step, shapes, fragments))
            saver.wait()
        name = "in the background" if in_background else "in the foreground"
        stalls[name] = min(result.stall_s for result in saver.collect())
    return stalls


def _snapshot(step: int, shapes: dict[str, tuple[int, ...]], fragments: list[Fragment]) -> CheckpointSnapshot:
    return CheckpointSnapshot(
        progress=Progress(step=step),
        fragments=fragments,
        parameters={name: ParameterInfo(shape, True, step) for name, shape in shapes.items()},
        metadata=RunMetadata(run_id="benchmark", config={}, written_by={}),
        attachments={},
    )


def checkpoint(arguments: argparse.Namespace) -> None:
    """Measure, print a table, and a JSON line for docs/benchmarks.md."""
    model = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name)
        distft_source = str(folder / "distft")
        manifest = write_distft(RandomCheckpoint(model), distft_source, world_size=2)
        num_bytes = sum(file.num_bytes for file in manifest.files)
        is_large = num_bytes > 4 << 30
        stages = () if is_large else (2, 3)
        deepspeed_sources = {stage: str(folder / f"deepspeed_{stage}") for stage in stages}
        for stage, target in deepspeed_sources.items():
            convert_with_distft(distft_source, target, {"to": "deepspeed", "ranks": 2, "zero_stage": stage})
        out = folder / "out"
        results: dict[str, tuple[float, float]] = {}
        # Candidates take turns, so that a disk that is slow for a while slows all of them.
        for turn in range(arguments.turns):
            for candidate, measure in candidates(distft_source, deepspeed_sources, out).items():
                is_slow = candidate.startswith(("ds_", "zero_"))
                if (is_slow and turn) or (is_large and candidate not in RUN_ON_LARGE_MODEL):
                    continue
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                subprocess.run(["sync"], check=True)
                subprocess.run(f"cat {distft_source}/* > /dev/null", shell=True, check=True)
                found = measure()
                print(f"{candidate}: {found[0]:.2f} s", flush=True)
                best = results.get(candidate, found)
                results[candidate] = (min(best[0], found[0]), max(best[1], found[1]))
        shutil.rmtree(out, ignore_errors=True)
        stalls = {} if is_large else measure_stall(model, folder)
    _print_table(arguments.shape, num_bytes, results, stalls)


def _print_table(
    shape: str, num_bytes: int, results: dict[str, tuple[float, float]], stalls: dict[str, float]
) -> None:
    copied_s = results["cp"][0]
    print(f"\n{shape} parameters with both moments, {num_bytes / 1e9:.2f} GB, written at 2 ranks")
    print("| what | seconds | times cp | MiB above idle |")
    print("|------|--------:|---------:|---------------:|")
    for name, (seconds, memory) in results.items():
        print(f"| {name} | {seconds:.2f} | {seconds / copied_s:.1f} | {memory:,.0f} |")
    for name, seconds in stalls.items():
        print(f"| a save {name}: training stands still | {seconds:.3f} | {seconds / copied_s:.2f} | |")
    record = {
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "bytes": num_bytes,
        "seconds": {name: round(seconds, 2) for name, (seconds, _) in results.items()},
        "stall_s": {name: round(seconds, 3) for name, seconds in stalls.items()},
    }
    print(json.dumps(record))
