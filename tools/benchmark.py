"""Measures distft, beside other tools: `python tools/benchmark.py train|checkpoint|tokenize|start|scale`.

The implementations take turns of a few steps, so that other load on the machine slows all of them alike. The
best turn of each counts.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import checkpoint_benchmark
import scale_checkpoint
import scale_tokenize
import start_benchmark
import tokenize_benchmark
import torch
from benchmark_rows import make_batches, make_packed_batches
from torch import Tensor, nn

from distft.checkpoint.sources import InitialSource
from distft.collectives import ProcessGroup, SingleProcess
from distft.data.batch import Batch
from distft.data.targets import NEXT_TOKEN
from distft.engine.interface import DTYPES, Engine
from distft.engine.local import LocalEngine
from distft.engine.memory import allocate
from distft.engine.settings import LocalConfig
from distft.model.counts import num_parameters, training_flops
from distft.model.heads import LANGUAGE_MODEL
from distft.model.initialisation import initial_fragment
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.settings import CausalLM
from distft.optim.adamw import AdamWConfig
from distft.optim.groups import parameter_groups
from distft.run.environment import configure_environment
from distft.run.model import build_module
from distft.topology import BatchPlan, Topology
from distft.train.step import train_step
from distft.train.throughput import measured_flops_per_s

Step = Callable[[], None]

SHAPES = {
    "6.9M": TransformerConfig(
        vocab_size=8192,
        max_seq_len=1024,
        d_model=256,
        num_layers=6,
        num_heads=8,
        d_ff=704,
        tie_embeddings=True,
    ),
    "110M": TransformerConfig(
        vocab_size=32000,
        max_seq_len=2048,
        d_model=768,
        num_layers=12,
        num_heads=12,
        d_ff=2048,
        tie_embeddings=True,
    ),
    "1.3B": TransformerConfig(
        vocab_size=32000,
        max_seq_len=2048,
        d_model=2048,
        num_layers=24,
        num_heads=16,
        d_ff=5504,
        tie_embeddings=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Model, batches and precision that all implementations share."""

    model: TransformerConfig
    precision: str
    micro_batch_size: int
    seq_len: int
    compile: bool
    device: torch.device
    batches: list[Batch]

    @property
    def num_tokens(self) -> int:
        return self.micro_batch_size * self.seq_len


def distft_step(setup: Setup, zero_stage: int | None) -> Step:
    """A step of distft on ZeRO at `zero_stage`, or on the local engine if it is None."""
    module = build_module(setup.model, LANGUAGE_MODEL)
    if setup.compile:
        module.compile_blocks()
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    optim = AdamWConfig()
    groups = parameter_groups(shapes, set(shapes), optim, {})
    engine: Engine
    if zero_stage is None:
        local = LocalConfig.model_validate({"param_dtype": setup.precision, "compile": setup.compile})
        engine = LocalEngine(module, groups, settings=local, optim=optim, device=setup.device)
    else:
        from distft.engine.deepspeed_config import ZeroConfig
        from distft.engine.zero import ZeroEngine

        zero = ZeroConfig.model_validate(
            {"zero_stage": zero_stage, "param_dtype": setup.precision, "compile": setup.compile}
        )
        plan = BatchPlan(
            global_batch_size=setup.micro_batch_size,
            micro_batch_size=setup.micro_batch_size,
            seq_len=setup.seq_len,
            dp_world_size=1,
        )
        group = ProcessGroup(Topology(), setup.device, 600)
        engine = ZeroEngine(
            module,
            groups,
            settings=zero,
            optim=optim,
            plan=plan,
            collectives=group,
            device=setup.device,
        )
    model = setup.model
    engine.load_fragments(
        InitialSource(
            shapes,
            lambda name, shape, start, stop: initial_fragment(name, shape, start, stop, seed=0, config=model),
        )
    )
    objective = CausalLM()
    assert model.vocab_size is not None
    context = ObjectiveContext(model.vocab_size, SingleProcess())
    batches = _cycle(setup.batches)

    def step() -> None:
        train_step(
            engine,
            [next(batches)],
            loss_sums=lambda model, batch: objective.loss_sums(model, batch, context),
            num_targets=objective.num_targets,
            weights=objective.term_weights(0),
            group_lr=lambda _: 1e-4,
        )

    return step


def bare_step(setup: Setup, *, compiled: bool = False) -> Step:
    """A step of a minimal torch loop over the same model: torch's loss, clipping and AdamW."""
    module = build_module(setup.model, LANGUAGE_MODEL)
    allocate(module, setup.device, torch.float32)
    for param in module.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.02)
        else:
            nn.init.ones_(param)
    if compiled:
        module.compile_blocks()
    return _torch_step(module, setup, lambda batch: module.logits(batch.input_ids))


def transformers_step(setup: Setup, *, compiled: bool = False) -> Step | None:
    """A step of the same loop over transformers' Llama of the same shape; None if it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    model = setup.model
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_seq_len,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
    )
    with setup.device:  # on a GPU, drawing 1.3e9 weights takes no time
        module = LlamaForCausalLM(config)
    if compiled:  # block by block, as distft does it: 24 blocks at once take a minute
        for block in module.model.layers:
            block.compile()
    return _torch_step(module, setup, lambda batch: module(batch.input_ids).logits)


def _torch_step(module: nn.Module, setup: Setup, logits_of: Callable[[Batch], Tensor]) -> Step:
    dtype = DTYPES[setup.precision]  # type: ignore[index]
    module.to(dtype)  # weights in the compute dtype, the usual choice in a minimal loop
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    batches = _cycle(setup.batches)

    def step() -> None:
        batch = next(batches)
        logits = logits_of(batch)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets[NEXT_TOKEN].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _cycle(batches: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def measure(implementations: dict[str, Step], setup: Setup, *, turns: int, steps: int) -> dict[str, float]:
    """Tokens/s of each: the best of `turns` turns of `steps` steps each, in rotation."""
    best: dict[str, float] = {}
    for name, step in implementations.items():
        started = time.perf_counter()
        for _ in range(2):
            step()
        _synchronize(setup.device)
        print(f"{name}: warmed up in {time.perf_counter() - started:.1f} s", flush=True)
    for _ in range(turns):
        for name, step in implementations.items():
            _synchronize(setup.device)
            started = time.perf_counter()
            for _ in range(steps):
                step()
            _synchronize(setup.device)
            rate = setup.num_tokens * steps / (time.perf_counter() - started)
            best[name] = max(best.get(name, 0.0), rate)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
