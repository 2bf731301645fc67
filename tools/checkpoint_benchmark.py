"""Checkpoints, side by side in one run: `python tools/benchmark.py checkpoint`.

Random state of a model with both moments, as two ranks write it. Every contestant runs in a process of its
own, after its imports and with the files in the page cache; memory is what its process, and any that it
starts, reached above an idle interpreter with the same imports.
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

from distft.checkpoint.background import Saver
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.convert import ConvertConfig, convert
from distft.checkpoint.fragments import MOMENTS, STATES, WEIGHT, Fragment
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord
from distft.checkpoint.reshard import contiguous_layout, write_distft
from distft.checkpoint.sources import read_state
from distft.checkpoint.store import CheckpointConfig, CheckpointStore, Draft, ParameterInfo, RunRecord
from distft.collectives import SingleProcess
from distft.model.config import ModelConfig
from distft.model.head import LanguageModelHead
from distft.run.inputs import parameter_shapes

SHAPES = {
    "tiny": ModelConfig(vocab_size=512, max_seq_len=128, d_model=64, num_layers=2, num_heads=4),
    "110M": ModelConfig(vocab_size=32000, max_seq_len=2048, d_model=768, num_layers=12, num_heads=12),
    "1.1B": ModelConfig(vocab_size=32000, max_seq_len=2048, d_model=2048, num_layers=20, num_heads=16),
}
LOADING_RANKS = 4
LARGE = ("cp", "reshard to 4", "to huggingface", "load at 4 ranks")  # what is tried on a model of 10 GB


class RandomCheckpoint:
    """State drawn when it is asked for: a source without files."""

    format = "random"
    path = "random"

    def __init__(self, model: ModelConfig) -> None:
        states = {state: StateRecord(dtype="float32") for state in STATES}
        self.manifest = Manifest(
            run_id="benchmark",
            progress=Progress(step=100),
            config={"model": model.model_dump(mode="json")},
            written_by={"param_dtype": "fp32"},
            parameters={
                name: ParameterRecord(shape=shape, trainable=True, updates=100, states=states)
                for name, shape in parameter_shapes(model, LanguageModelHead()).items()
            },
            files=[],
        )

    def has(self, parameter: str, state: str) -> bool:
        return parameter in self.manifest.parameters and state in STATES

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self.manifest.parameters[parameter].shape

    def updates(self, parameter: str) -> int:
        return self.manifest.parameters[parameter].updates

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((parameter, state, start)) % 2**63)
        return torch.rand(stop - start, generator=generator)

    def faults(self) -> list[str]:
        return []


def our_tool(source: str, target: str, settings: dict[str, object]) -> None:
    convert(Checkpoint.open(source), target, ConvertConfig.model_validate(settings), lambda _: None)


def load_share(source: str, rank: int) -> None:
    """What one of four ranks does at a resume: check its share of the files, read its part of the state."""
    checkpoint = Checkpoint.open(source)
    numbers = range(rank, len(checkpoint.manifest.files), LOADING_RANKS)
    assert not checkpoint.faults(list(numbers))
    numels = {name: prod(record.shape) for name, record in checkpoint.manifest.parameters.items()}
    for name, (start, stop) in contiguous_layout(numels, LOADING_RANKS)[rank].items():
        for state in STATES:
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
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, that of the imports
    idle_kib = _peak_kib()
    began = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        work(*arguments)
    seconds = time.perf_counter() - began
    of_children_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    pipe.send((seconds, (max(_peak_kib(), of_children_kib) - idle_kib) / 1024))


def _peak_kib() -> int:
    """Of this process: not what getrusage says, which counts the parent that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def run_alone(*works: tuple[Callable[..., None], tuple[object, ...]]) -> tuple[float, float]:
    """Seconds until all of `works`, started together, are done, and the largest peak memory of one, MiB."""
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


def contestants(ours: str, theirs: dict[int, str], out: Path) -> dict[str, Callable[[], tuple[float, float]]]:
    """By name; each gives seconds and MiB."""

    def tool(name: str, settings: dict[str, object], source: str = ours) -> Callable[[], tuple[float, float]]:
        return lambda: run_alone((our_tool, (source, str(out / name), settings)))

    table: dict[str, Callable[[], tuple[float, float]]] = {
        "cp": lambda: copy(ours, str(out / "cp")),
        "load at 4 ranks": lambda: run_alone(*((load_share, (ours, r)) for r in range(LOADING_RANKS))),
        "reshard to 4": tool("reshard", {"to": "distft", "ranks": 4}),
        "to universal": tool("universal", {"to": "universal"}),
        "to huggingface": tool("huggingface", {"to": "huggingface"}),
    }
    for stage, source in theirs.items():
        tag = str(next(path for path in Path(source).iterdir() if path.is_dir()))
        table[f"ds_to_universal, stage {stage}"] = partial(
            run_alone, (ds_to_universal, (tag, str(out / f"universal_{stage}")))
        )
        table[f"zero_to_fp32, stage {stage}"] = partial(
            run_alone, (zero_to_fp32, (source, str(out / f"fp32_{stage}")))
        )
    return table


def measure_stall(model: ModelConfig, folder: Path) -> dict[str, float]:
    """Seconds that training stands still for a save: the best of three, in the background and not."""
    shapes = parameter_shapes(model, LanguageModelHead())
    fragments = [
        Fragment(name, state, 0, torch.rand(prod(shape)))
        for name, shape in shapes.items()
        for state in (WEIGHT, *MOMENTS)
    ]
    stalls = {}
    for in_background in (False, True):
        store = CheckpointStore(str(folder / f"stall_{in_background}"), SingleProcess())
        saver = Saver(store, CheckpointConfig(in_background=in_background, keep_last=1))
        for step in (1, 2, 3):
            saver.save(_draft(step, shapes, fragments))
            saver.wait()
        name = "in the background" if in_background else "in the foreground"
        stalls[name] = min(saved.stall_s for saved in saver.collect())
    return stalls


def _draft(step: int, shapes: dict[str, tuple[int, ...]], fragments: list[Fragment]) -> Draft:
    record = RunRecord(
        run_id="benchmark",
        config={},
        label_names=None,
        tokenizer=None,
        written_by={},
        groups=[],
        tied={},
        probe=None,
    )
    return Draft(
        progress=Progress(step=step),
        fragments=fragments,
        parameters={name: ParameterInfo(shape, True, step) for name, shape in shapes.items()},
        record=record,
        attachments={},
    )


def checkpoint(arguments: argparse.Namespace) -> None:
    """Measure, print a table, and a JSON line for docs/benchmarks.md."""
    model = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name)
        ours = str(folder / "ours")
        manifest = write_distft(RandomCheckpoint(model), ours, world_size=2)
        num_bytes = sum(file.num_bytes for file in manifest.files)
        is_large = num_bytes > 4 << 30
        theirs = {} if is_large else {2: str(folder / "theirs_2"), 3: str(folder / "theirs_3")}
        for stage, target in theirs.items():
            our_tool(ours, target, {"to": "deepspeed", "ranks": 2, "zero_stage": stage})
        out = folder / "out"
        results: dict[str, tuple[float, float]] = {}
        # In turns, so that a disk that is slow for a while is slow to all of them.
        for turn in range(arguments.turns):
            for contestant, act in contestants(ours, theirs, out).items():
                is_slow = contestant.startswith(("ds_", "zero_"))
                if (is_slow and turn) or (is_large and contestant not in LARGE):
                    continue
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                subprocess.run(["sync"], check=True)
                subprocess.run(f"cat {ours}/* > /dev/null", shell=True, check=True)
                found = act()
                print(f"{contestant}: {found[0]:.2f} s", flush=True)
                best = results.get(contestant, found)
                results[contestant] = (min(best[0], found[0]), max(best[1], found[1]))
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
