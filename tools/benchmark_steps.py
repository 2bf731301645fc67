"""Training steps of distft, of a minimal torch loop and of transformers, and the rate of each."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distft.checkpoint.sources import InitialSource
from distft.collectives import ProcessGroup, SingleProcess
from distft.data.batch import Batch
from distft.data.targets import NEXT_TOKEN
from distft.engine.interface import DTYPES, Engine
from distft.engine.local import LocalEngine
from distft.engine.memory import allocate
from distft.engine.settings import LocalConfig
from distft.model.config import ModelConfig
from distft.model.heads import LANGUAGE_MODEL, Heads
from distft.model.initialisation import initial_fragment
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import Objective, ObjectiveContext
from distft.objective.settings import CausalLM
from distft.optim.adamw import AdamWConfig
from distft.optim.groups import parameter_groups
from distft.run.model import build_module
from distft.topology import BatchPlan, Topology
from distft.train.step import train_step

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

    model: ModelConfig
    heads: Heads = field(default_factory=lambda: LANGUAGE_MODEL)
    objective: Objective = field(default_factory=CausalLM)
    precision: str
    micro_batch_size: int
    seq_len: int
    compile: bool
    device: torch.device
    batches: list[Batch]

    @property
    def num_tokens(self) -> int:
        return self.batches[0].num_tokens


def distft_step(setup: Setup, zero_stage: int | None) -> Step:
    """A step of distft on ZeRO at `zero_stage`, or on the local engine if it is None."""
    module = build_module(setup.model, setup.heads)
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
    objective = setup.objective
    assert model.vocabulary_size is not None
    context = ObjectiveContext(model.vocabulary_size, SingleProcess())
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
    return torch_step(module, setup, _next_token_loss(module.logits))


def transformers_step(setup: Setup, *, compiled: bool = False) -> Step | None:
    """A step of the same loop over transformers' Llama of the same shape; None if it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    model = setup.model
    assert isinstance(model, TransformerConfig)
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
    return torch_step(module, setup, _next_token_loss(lambda ids: module(ids).logits))


def _next_token_loss(logits_of: Callable[[Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        logits = logits_of(batch.input_ids)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets[NEXT_TOKEN].flatten())

    return loss


def torch_step(module: nn.Module, setup: Setup, loss_of: Callable[[Batch], Tensor]) -> Step:
    dtype = DTYPES[setup.precision]  # type: ignore[index]
    module.to(dtype)  # weights in the compute dtype, the usual choice in a minimal loop
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    batches = _cycle(setup.batches)

    def step() -> None:
        torch.autograd.backward(loss_of(next(batches)))
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
