"""Measures distft, beside other tools: `python tools/benchmark.py train|checkpoint|tokenize|start|scale`.

The implementations take turns of a few steps, so that other load on the machine slows all of them alike. The
best turn of each counts.
"""

import argparse
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import checkpoint_benchmark
import scale_checkpoint
import scale_tokenize
import start_benchmark
import tokenize_benchmark
import torch
from benchmark_backbones import BACKBONES, LABELS, make_backbone_batches
from benchmark_rows import make_batches, make_packed_batches
from benchmark_steps import SHAPES, Setup, bare_step, distft_step, measure, torch_step, transformers_step

from distft.engine.interface import DTYPES
from distft.model.counts import num_parameters, training_flops
from distft.model.heads import LANGUAGE_MODEL
from distft.run.environment import configure_environment
from distft.train.throughput import measured_flops_per_s


def train(arguments: argparse.Namespace) -> None:
    """Measure, then print a table and a JSON line for docs/benchmarks.md."""
    configure_environment("auto")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SHAPES[arguments.shape]
    rows, seq_len = arguments.micro_batch_size, arguments.seq_len
    make = make_packed_batches if arguments.packed else make_batches
    batches = make(model, rows, seq_len, device)
    for precision in arguments.precision:
        setup = Setup(
            model=model,
            precision=precision,
            micro_batch_size=rows,
            seq_len=seq_len,
            compile=arguments.compile,
            device=device,
            batches=batches,
        )
        peak = measured_flops_per_s(device, DTYPES[precision])
        implementations = {"distft local": distft_step(setup, None)}
        for stage in arguments.zero_stage:
            implementations[f"distft zero {stage}"] = distft_step(setup, stage)
        implementations["bare torch loop"] = bare_step(setup)
        llama = transformers_step(setup)
        if llama is not None:
            implementations["transformers Llama"] = llama
        rates = measure(implementations, setup, turns=arguments.turns, steps=arguments.steps)
        peak = max(peak, measured_flops_per_s(device, DTYPES[precision]))
        _print_table(rates, setup, peak)


def train_backbones(arguments: argparse.Namespace) -> None:
    """Measure each backbone beside its counterpart in fp32, and print a table for docs/benchmarks.md."""
    configure_environment("auto")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, seq_len = arguments.micro_batch_size, arguments.seq_len
    lines = ["| model | parameters | distft, rows/s | counterpart | ratio |", "|---|---:|---:|---|---:|"]
    for name in arguments.model:
        backbone = BACKBONES[name]
        model = backbone.model(seq_len)
        objective = backbone.objective(model)
        setup = Setup(
            model=model,
            heads=objective.heads(LABELS if backbone.reads_images else None),
            objective=objective,
            precision="fp32",
            micro_batch_size=rows,
            seq_len=seq_len,
            compile=False,
            device=device,
            batches=make_backbone_batches(backbone, rows, seq_len, device),
        )
        with device:
            module, loss_of = backbone.counterpart(model, seq_len)
        counts = [num_parameters(model, setup.heads), sum(param.numel() for param in module.parameters())]
        steps = {"distft": distft_step(setup, None), backbone.what: torch_step(module, setup, loss_of)}
        rates = measure(steps, setup, turns=arguments.turns, steps=arguments.steps)
        own, other = (rate / setup.num_tokens * rows for rate in rates.values())
        lines.append(
            f"| `{name}` | {counts[0] / 1e6:.2f}M | {own:,.0f} | {backbone.what}, {other:,.0f} "
            f"({counts[1] / 1e6:.2f}M) | {own / other:.2f} |"
        )
    print(f"\n{rows} rows of {seq_len} tokens, or images; fp32; {_machine(device)}, commit {_commit()}")
    print("\n".join(lines))


def _print_table(rates: dict[str, float], setup: Setup, peak_flops_per_s: float) -> None:
    flops = training_flops(setup.model, setup.seq_len).of(setup.seq_len, setup.seq_len**2) / setup.seq_len
    baseline = rates.get("transformers Llama", rates["bare torch loop"])
    num = num_parameters(setup.model, LANGUAGE_MODEL)
    print(
        f"\n{num / 1e6:.1f}M parameters, {setup.precision}, compile {setup.compile}, "
        f"{setup.micro_batch_size} x {setup.seq_len} tokens, {_machine(setup.device)}; "
        f"matrix product {peak_flops_per_s / 1e9:,.0f} GFLOP/s"
    )
    print(f"| {'implementation':<20} | tokens/s | ratio | share of the matrix rate |")
    print(f"|{'-' * 22}|---------:|------:|-------------------------:|")
    for name, rate in rates.items():
        share = rate * flops / peak_flops_per_s
        print(f"| {name:<20} | {rate:8,.0f} | {rate / baseline:5.2f} | {share:24.1%} |")
    record = {
        "commit": _commit(),
        "machine": _machine(setup.device),
        "versions": {name: _version(name) for name in ("torch", "deepspeed", "transformers")},
        "precision": setup.precision,
        "compile": setup.compile,
        "tokens_per_s": {name: round(rate) for name, rate in rates.items()},
    }
    print(json.dumps(record))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {capability}"


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def scale(_: argparse.Namespace) -> None:
    """Print a table for docs/benchmarks.md."""
    print("| work | amount | requests | MB | seconds | MiB at the peak |\n|---|---:|---:|---:|---:|---:|")
    for rows in (scale_tokenize.scale_rows, scale_checkpoint.scale_rows):
        for row in rows():
            print(
                f"| {row.work} | {row.amount:,} | {row.requests:,} | {row.bytes / 1e6:,.1f} "
                f"| {row.seconds:.2f} | {row.peak_mib:,.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser(
        "train", help="training steps of distft, of a minimal torch loop, and of transformers"
    )
    verb.add_argument("--shape", choices=SHAPES, default="6.9M")
    verb.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    verb.add_argument("--micro-batch-size", type=int, default=8)
    verb.add_argument("--seq-len", type=int, default=256)
    verb.add_argument("--compile", action="store_true")
    verb.add_argument(
        "--packed", action="store_true", help="distft's rows hold several documents, which are kept apart"
    )
    verb.add_argument("--zero-stage", type=int, nargs="*", default=[1])
    verb.add_argument("--turns", type=int, default=5)
    verb.add_argument("--steps", type=int, default=3)
    verb.set_defaults(act=train)
    verb = verbs.add_parser("backbones", help="training steps of each type of model, beside its counterpart")
    verb.add_argument("--model", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    verb.add_argument("--micro-batch-size", type=int, default=8)
    verb.add_argument("--seq-len", type=int, default=128)
    verb.add_argument("--turns", type=int, default=5)
    verb.add_argument("--steps", type=int, default=4)
    verb.set_defaults(act=train_backbones)
    verb = verbs.add_parser("checkpoint", help="loading, resharding and converting, against cp and DeepSpeed")
    verb.add_argument("--shape", choices=checkpoint_benchmark.SHAPES, default="110M")
    verb.add_argument("--turns", type=int, default=3)
    verb.add_argument("--directory", help="for temporary files: 15 GB for 110M")
    verb.set_defaults(act=checkpoint_benchmark.checkpoint)
    verb = verbs.add_parser("tokenize", help="distft tokenize, against a bare sentencepiece loop")
    verb.add_argument("--corpus", help="a JSONL file; default: the standard library")
    verb.add_argument("--tokenizer", help="a .model file; default: a BPE and a unigram vocabulary of 8192")
    verb.add_argument("--megabytes", type=float, default=100, help="the corpus is repeated to this size")
    verb.add_argument("--workers", type=int, default=2)
    verb.add_argument("--turns", type=int, default=3)
    verb.add_argument("--directory", help="for temporary files")
    verb.set_defaults(act=tokenize_benchmark.tokenize_benchmark)
    verb = verbs.add_parser("start", help="seconds until a mistake is told, and until the first step")
    verb.add_argument("--turns", type=int, default=3)
    verb.set_defaults(act=start_benchmark.start)
    verb = verbs.add_parser("scale", help="requests, bytes, time and memory of 1, 10 and 100 times the work")
    verb.set_defaults(act=scale)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
