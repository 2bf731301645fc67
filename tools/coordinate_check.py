"""Trains a few steps at several widths: do the activations of every layer change as much at each width?

    python tools/coordinate_check.py configs/mup_shakespeare.yaml --widths 64 128 256 -o runs/coordinates.html

The coordinate check of muP (Yang et al. 2022, arXiv:2203.03466, appendix D.1): by how much the activations on
one batch differ from those before the first step, as a mean of absolute values, by kind of layer. In the
right parametrization no change grows with the width. Steps have the rate `optim.peak_lr` from the first on.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from widths import PARAMETRIZATIONS, at_width, base_model

from distft.collectives import SingleProcess
from distft.engine.settings import LocalConfig
from distft.errors import DistftError
from distft.model.attention import Attention
from distft.model.block import Block
from distft.model.transformer import Transformer
from distft.report.chart import Chart
from distft.report.chart_file import curves, require_chart_file, write_chart
from distft.run.check import check_run
from distft.run.config import RunConfig, load_run_config
from distft.run.engines import build_engine
from distft.run.training_module import build_objective_context
from distft.topology import Topology
from distft.train.step import train_step

MAX_POWER = (
    0.2  # of the width, by which a change may grow; in the standard parametrization some grow by 0.5 to 1
)
CPU = torch.device("cpu")
LAST_NORM = "the last norm"


@dataclass(frozen=True, kw_only=True)
class Change:
    """Mean absolute change of the activations of one kind of layer since the start."""

    parametrization: str
    layer: str
    width: int
    step: int
    change: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", help="of a run on local or ZeRO; it is computed in fp32 on the CPU")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2, help="initial weights to average over")
    parser.add_argument("--widen-heads", action="store_true", help="wider heads, and not more of them")
    parser.add_argument(
        "--parametrizations", nargs="+", choices=PARAMETRIZATIONS, default=list(PARAMETRIZATIONS)
    )
    parser.add_argument("-o", "--output", type=Path, help="a chart, such as coordinates.html or .svg")
    given = parser.parse_intermixed_args(arguments)
    try:
        if given.output is not None:
            require_chart_file(given.output)
        passes = {name: _check(given, name) for name in given.parametrizations}
        if given.output is not None:
            write_chart(changes_chart([row for rows, _ in passes.values() for row in rows]), given.output)
            print(given.output)
    except DistftError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if passes.get("mup", (None, True))[1] else 1


def _check(given: argparse.Namespace, parametrization: str) -> tuple[list[Change], bool]:
    """All changes, and whether none of the last step grows with the width. Prints a table of it."""
    rows = []
    own = base_model(load_run_config(given.config, given.overrides))
    for width in sorted(given.widths):
        measured = [
            changes_of(
                at_width(
                    given.config,
                    [*given.overrides, f"seed={seed}"],
                    width,
                    parametrization,
                    widens_heads=given.widen_heads,
                ),
                given.steps,
            )
            for seed in range(given.seeds)
        ]
        rows += [
            Change(
                parametrization=parametrization,
                layer=layer,
                width=width,
                step=step,
                change=mean(of_seed[step - 1][layer] for of_seed in measured),
            )
            for step in range(1, given.steps + 1)
            for layer in measured[0][0]
        ]
    powers = powers_of_width([row for row in rows if row.step == given.steps])
    grows = [layer for layer, power in powers.items() if not power <= MAX_POWER]
    print(
        f"parametrization={parametrization}, base {own.mup_base_d_model or own.d_model}: "
        f"after {given.steps} steps"
    )
    print(f"{'layer':<18}", *(f"{width:>9}" for width in sorted(given.widths)), f"{'power':>9}")
    for layer, power in powers.items():
        values = [row.change for row in rows if row.layer == layer and row.step == given.steps]
        mark = "  grows" if layer in grows else ""
        print(f"{layer:<18}", *(f"{value:>9.4f}" for value in values), f"{power:>9.2f}{mark}")
    print("does not pass: " + ", ".join(grows) + " grow with the width" if grows else "passes")
    return rows, not grows


def powers_of_width(rows: Sequence[Change]) -> dict[str, float]:
    """p of each layer, where its change is about width ** p: the slope of a line through the logarithms."""
    powers = {}
    for layer in dict.fromkeys(row.layer for row in rows):
        points = [(math.log(row.width), row.change) for row in rows if row.layer == layer]
        if not all(change > 0 and math.isfinite(change) for _, change in points):
            powers[layer] = math.nan
            continue
        x_mean, y_mean = mean(x for x, _ in points), mean(math.log(y) for _, y in points)
        spread = sum((x - x_mean) ** 2 for x, _ in points)
        powers[layer] = sum((x - x_mean) * (math.log(y) - y_mean) for x, y in points) / (spread or math.nan)
    return powers


def changes_of(config: RunConfig, num_steps: int) -> list[dict[str, float]]:
    """For each step the mean absolute change of each kind of layer since the start, on the first batch."""
    local = {"type": "local", "param_dtype": "fp32", "compile": False}
    config = config.model_copy(update={"engine": LocalConfig.model_validate(local)})
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    plan, inputs = check_run(config, Topology())
    engine = build_engine(inputs, None, plan, SingleProcess(), CPU)
    context = build_objective_context(inputs, plan, SingleProcess(), CPU)
    objective, module = config.objective, engine.module
    assert isinstance(module, Transformer)
    probe = inputs.train.batch(0, plan.micro_batch_size).to(CPU)

    def activations() -> dict[str, list[Tensor]]:
        with recorded(module) as found, torch.no_grad():
            objective.loss_sums(engine.model, probe, context)
        return found

    before, changes = activations(), []
    for step in range(num_steps):
        batches = [
            inputs.train.batch(micro.start, micro.stop).to(CPU) for micro in plan.micro_batches(step, 0)
        ]
        train_step(
            engine,
            objective.prepare_step(engine.model, batches, context),
            loss_sums=lambda model, batch: objective.loss_sums(model, batch, context),
            num_targets=objective.num_targets,
            weights=objective.term_weights(step),
            group_lr=lambda group: config.optim.peak_lr * group.lr_scale,
        )
        changes.append(_mean_changes(before, activations()))
    engine.close()
    return changes


def _mean_changes(
    before: Mapping[str, Sequence[Tensor]], after: Mapping[str, Sequence[Tensor]]
) -> dict[str, float]:
    return {
        layer: mean(float((b - a).abs().mean()) for a, b in zip(before[layer], after[layer], strict=True))
        for layer in before
    }


@contextmanager
def recorded(model: Transformer) -> Iterator[dict[str, list[Tensor]]]:
    """The activations of the next forward by kind of layer, one tensor for each layer of the kind."""
    found: dict[str, list[Tensor]] = {}

    def record(kind: str, value: Tensor) -> None:
        found.setdefault(kind, []).append(value.detach().float().clone())

    def hook(kind: str) -> object:
        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            record(kind, output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

        return keep

    def scores(module: nn.Module, inputs: tuple[Tensor, ...], _output: object) -> None:
        assert isinstance(module, Attention)
        record("attention scores", _scores(module, inputs[0]))

    def logits(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        # Of every head that reads hidden states: objectives may ask an lm_head for its loss alone.
        lm_head = getattr(model, "lm_head", None)
        if lm_head is not None:
            record("logits", lm_head(output))

    kinds = {Attention: "attention", Block: "residual stream"}
    handles = [model.embed.register_forward_hook(hook("embedding"))]  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, Attention):
            handles.append(module.register_forward_hook(scores))
        if type(module) in kinds:
            handles.append(module.register_forward_hook(hook(kinds[type(module)])))  # type: ignore[arg-type]
        if isinstance(module, Block):
            handles.append(module.mlp.register_forward_hook(hook("feed-forward")))  # type: ignore[arg-type]
    for name, module in model.named_children():
        if name in model.heads and name != "lm_head":
            handles.append(module.register_forward_hook(hook(name)))  # type: ignore[arg-type]
    handles += [model.norm.register_forward_hook(hook(LAST_NORM)), model.norm.register_forward_hook(logits)]  # type: ignore[arg-type]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _scores(attention: Attention, x_BTC: Tensor) -> Tensor:
    """Products of queries and keys before rotation, times the scale."""
    heads = attention.num_heads // attention.num_kv_heads
    q_BTC, k_BTC, shape = attention.q(x_BTC), attention.k(x_BTC), x_BTC.shape[:2]
    q_BTHD = q_BTC.view(*shape, -1, attention.head_dim)
    k_BTHD = k_BTC.view(*shape, -1, attention.head_dim).repeat_interleave(heads, dim=2)
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    return torch.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD) * scale


def changes_chart(rows: Sequence[Change]) -> Chart:
    last = max(row.step for row in rows)
    spec = curves(
        [asdict(row) for row in rows if row.step == last],
        x=("width", "width (model.d_model)"),
        y=("change", f"mean absolute change after {last} steps"),
        color=("layer", "layer"),
        columns="parametrization",
        is_color_ordered=False,
        is_y_logarithmic=True,
    )
    return Chart(title="Coordinate check: change of activations by width", spec=spec)


if __name__ == "__main__":
    sys.exit(main())
