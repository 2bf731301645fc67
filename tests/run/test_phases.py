"""Phases of a run: gradual unfreezing as plain torch does it, on any ranks, and after any restart."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rank_pool import run_ranks
from support.small_runs import events, fine_tuning, logged, pretraining, run, run_until_power_cut
from torch import Tensor

from distft.checkpoint.committed import find_checkpoint
from distft.checkpoint.manifest import Progress
from distft.cli.main import main
from distft.collectives import SingleProcess
from distft.config import parse
from distft.errors import ConfigError, Preempted
from distft.objective.interface import ObjectiveContext
from distft.run.check import check_run, describe_run
from distft.run.config import RunConfig
from distft.run.engines import build_engine
from distft.run.inputs import read_inputs
from distft.run.phases import config_of_phase, inputs_of_span, span_at
from distft.run.train import run_training
from distft.topology import Topology
from distft.train.early_stopping import EarlyStopping, EarlyStoppingConfig

STEPS, PEAK = 12, 0.01
TRIANGLE = {"type": "slanted_triangular", "cut_fraction": 0.25, "ratio": 8.0}
PHASES: list[dict[str, Any]] = [
    {"steps": 4, "trainable": ["norm.*"], "optim": {"peak_lr": 0.02, "schedule": TRIANGLE}},
    {"steps": 4, "trainable": ["@last_blocks:1", "norm.*"], "optim": {"weight_decay": 0.5}},
    {"optim": {"lr_scales": {"blocks.0.*": 1 / 2.6, "embed*": 1 / 2.6**2}}},
]


def _config(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    return pretraining(data, run_dir, **{"phases": PHASES, **changes})


def _run(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


def _weights(run_dir: Path) -> dict[str, Tensor]:
    checkpoint = find_checkpoint(str(run_dir))
    return {
        name: checkpoint.read(name, "weight", 0, math.prod(record.shape)).view(record.shape)
        for name, record in checkpoint.manifest.parameters.items()
    }


def _triangle(step: int, total: int) -> float:
    """Howard & Ruder 2018, equation 3, over the peak."""
    cut = math.floor(total * 0.25)
    share = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / 0.25 - 1))
    return (1 + share * 7) / 8


def _cosine(step: int) -> float:
    """The schedule of `pretraining`: a warm-up of two steps, then down to a tenth."""
    if step < 2:
        return (step + 1) / 2
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 2))) / 2


def _plain_torch(raw: dict[str, Any]) -> dict[str, Tensor]:
    """The same run by torch.optim.AdamW: `add_param_group` for what a phase adds."""
    plan, inputs = check_run(parse(RunConfig, raw), Topology())
    engine = build_engine(inputs, None, plan, SingleProcess(), torch.device("cpu"))
    model: Any = engine.module
    params = dict(model.named_parameters())
    objective = inputs.config.objective
    context = ObjectiveContext(inputs.model.padded_vocab_size, SingleProcess())
    optimizer: torch.optim.AdamW | None = None
    members: set[str] = set()
    for step in range(STEPS):
        phase = step // 4
        if step % 4 == 0:
            trainable = [
                name
                for name in params
                if name == "norm.weight" or phase == 2 or (phase == 1 and name.startswith("blocks.1."))
            ]
            for name, param in params.items():
                param.requires_grad_(name in trainable)
            for name in [name for name in trainable if name not in members]:
                group = {"params": [params[name]], "name": name}
                if optimizer is None:
                    optimizer = torch.optim.AdamW([group], betas=(0.9, 0.95), eps=1e-8)
                else:
                    optimizer.add_param_group(group)
                members.add(name)
        assert optimizer is not None
        for group in optimizer.param_groups:
            name = group["name"]
            is_decayed = params[name].dim() >= 2 and "embed" not in name
            group["weight_decay"] = (0.5 if phase == 1 else 0.1) if is_decayed else 0.0
            lr = 0.02 * _triangle(step, 4) if phase == 0 else PEAK * _cosine(step)
            scales = {"blocks.0.": 1 / 2.6, "embed": 1 / 2.6**2} if phase == 2 else {}
            group["lr"] = lr * next((s for p, s in scales.items() if name.startswith(p)), 1.0)
        batch = inputs.train.batch(step * 8, step * 8 + 8)
        (loss_sum,) = objective.loss_sums(model, batch, context).values()
        (count,) = objective.num_targets(batch).values()
        optimizer.zero_grad()
        torch.autograd.backward(loss_sum / count)
        torch.nn.utils.clip_grad_norm_([params[n] for n in members if params[n].requires_grad], 1.0)
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_gradual_unfreezing_is_that_of_plain_torch(data: Path, tmp_path: Path, stage: int | None) -> None:
    raw = _config(data, tmp_path / "run")
    if stage is None:
        run(Topology(), raw)
    else:
        run_ranks(_run, 2, {**raw, "engine": {"type": "zero", "zero_stage": stage}}, timeout_s=180)
    expected = _plain_torch(_config(data, tmp_path / "plain"))
    found = _weights(tmp_path / "run")
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6


@pytest.mark.ranks
@pytest.mark.parametrize("cut_step", [2, 4, 6, 11])
def test_a_run_with_phases_resumes_in_any_of_them(data: Path, tmp_path: Path, cut_step: int) -> None:
    """Also at their boundary, on other ranks and at another stage."""
    whole, cut = _config(data, tmp_path / "whole"), _config(data, tmp_path / "cut")
    run(Topology(), whole)
    run_until_power_cut(cut, cut_step)
    stage = {2: 1, 4: 2, 6: 3, 11: 2}[cut_step]
    run_ranks(_run, 2, {**cut, "engine": {"type": "zero", "zero_stage": stage}}, timeout_s=180)
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=2e-6)
    progress = find_checkpoint(str(tmp_path / "cut")).manifest.progress
    assert progress.phase_starts == (0, 4, 8)
    updates = {n: p.updates for n, p in find_checkpoint(str(tmp_path / "cut")).manifest.parameters.items()}
    assert (updates["norm.weight"], updates["blocks.1.attn.q.weight"], updates["embed.weight"]) == (12, 8, 4)


def test_frozen_weights_do_not_move(data: Path, tmp_path: Path) -> None:
    raw = _config(
        data,
        tmp_path / "run",
        phases=[{"steps": 6, "trainable": ["@norms"]}, {"trainable": ["@biases", "@norms", "!norm.*"]}],
        model={**pretraining(data, tmp_path)["model"], "mlp_bias": True},
    )
    plan, inputs = check_run(parse(RunConfig, raw), Topology())
    before = dict(
        build_engine(inputs, None, plan, SingleProcess(), torch.device("cpu")).module.named_parameters()
    )
    run(Topology(), raw)
    moved = {
        name for name, value in _weights(tmp_path / "run").items() if not torch.equal(value, before[name])
    }
    assert moved == {name for name in before if "norm" in name or name.endswith("bias")}


def test_a_stop_at_the_end_of_a_phase_is_a_stop(data: Path, tmp_path: Path) -> None:
    raw = _config(data, tmp_path / "run")
    config: RunConfig = parse(RunConfig, raw)
    calls = 0

    def stop_in_step_four() -> Any:
        nonlocal calls
        calls += 1
        return "requested" if calls == 4 else None

    with pytest.raises(Preempted, match=r"Stopped at step [45]"):
        run_training(config, Topology(), stop_in_step_four)
    run(Topology(), raw)
    run(Topology(), _config(data, tmp_path / "whole"))
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "whole"), abs=2e-6)


def test_random_blocks_are_a_function_of_the_seed(data: Path, tmp_path: Path) -> None:
    """LISA: one block at a time beside embeddings and head, another after every two steps."""
    blocks = {"num_blocks": 1, "every_steps": 2}
    raw = _config(data, tmp_path / "run", phases=[{"random_blocks": blocks}], seed=3)
    inputs = read_inputs(parse(RunConfig, raw))
    drawn = [inputs_of_span(inputs, span_at(inputs, (), step)).trainable for step in range(12)]
    number_of_blocks = [{name.split(".")[1] for name in names if "blocks" in name} for names in drawn]
    assert all(len(numbers) == 1 for numbers in number_of_blocks)
    assert all(drawn[step] == drawn[step + 1] for step in range(0, 12, 2))
    assert {number for numbers in number_of_blocks for number in numbers} == {"0", "1"}
    assert all("embed.weight" in names and "norm.weight" in names for names in drawn)
    run(Topology(), raw)
    run_until_power_cut({**raw, "run_dir": str(tmp_path / "cut")}, 7)
    run(Topology(), {**raw, "run_dir": str(tmp_path / "cut")})
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "run"), abs=2e-6)


def test_a_phase_ends_when_validation_stalls(data: Path, tmp_path: Path) -> None:
    """With a rate of almost nothing, no evaluation improves by 0.5."""
    stalled = {"metric": "loss", "patience": 2, "min_delta": 0.5}
    phases = [{"until_stalled": stalled, "optim": {"peak_lr": 1e-6}}, {"trainable": ["norm.*"]}]
    raw = _config(data, tmp_path / "run", phases=phases, evaluation={"every_steps": 2})
    run(Topology(), raw)
    progress = find_checkpoint(str(tmp_path / "run")).manifest.progress
    assert progress.phase_starts == (0, 6)  # the best of step 2, and two evaluations without a better one
    run_until_power_cut({**raw, "run_dir": str(tmp_path / "cut")}, 5)
    run(Topology(), {**raw, "run_dir": str(tmp_path / "cut")})
    assert find_checkpoint(str(tmp_path / "cut")).manifest.progress == progress


def test_a_run_stops_early_and_keeps_its_best_commit(data: Path, tmp_path: Path) -> None:
    """A rate that is far too high makes it worse and worse after the first evaluations."""
    run(Topology(), pretraining(data, tmp_path / "base"))
    changes: dict[str, Any] = {
        "optim": {"peak_lr": 1.0, "schedule": {"type": "constant"}},
        "train": {
            "max_steps": 60,
            "log_every_steps": 1,
            "early_stopping": {"metric": "loss", "patience": 3},
        },
        "evaluation": {"every_steps": 2},
        "checkpoint": {"every_steps": 4, "keep_last": 1},
        "init_from": str(tmp_path / "base"),
    }
    raw = pretraining(data, tmp_path / "run", **changes)
    result = run(Topology(), raw)
    losses = logged(tmp_path / "run", "validation/loss")
    best_step = min(losses, key=lambda step: losses[step])
    assert result.step == best_step + 6 == max(losses)
    best = find_checkpoint(str(tmp_path / "run"))
    assert best.step == best_step
    assert best.manifest.progress.best_of_run is not None
    assert best.manifest.progress.best_of_run.value == pytest.approx(losses[best_step])
    assert find_checkpoint(str(tmp_path / "run"), newest=True).step == result.step
    for command in (["evaluate"], ["generate", "--prompt", "the", "--max-new-tokens", "2"]):
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 0
    told = next(event for event in events(tmp_path / "run") if event["kind"] == "early_stop")
    assert (told["best_step"], told["step"]) == (best_step, result.step)
    run(Topology(), raw)  # nothing is left to do
    assert events(tmp_path / "run")[-2]["reason"] == "train.early_stopping has ended the run"
    cut = {**raw, "run_dir": str(tmp_path / "cut")}
    run_until_power_cut(cut, best_step + 3)
    run(Topology(), cut)
    assert logged(tmp_path / "cut", "validation/loss") == pytest.approx(losses, abs=2e-6)
    assert find_checkpoint(str(tmp_path / "cut")).step == best_step


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"phases": [{"trainable": ["norm.*"]}, {}]}, "phases.0: set steps, epochs or until_stalled"),
        ({"phases": [{"steps": 3}, {"steps": 3}]}, "phases.1 is the last one and ends with the run"),
        ({"phases": [{"steps": 2, "epochs": 1.0}, {}]}, "set steps or epochs, not both"),
        ({"phases": [{"steps": 2}, {}]}, "phases.1 trains the same parameters with the same settings"),
        (
            {"phases": [{"steps": 2, "trainable": ["norm.*"]}, {"trainable": ["norm.weight"]}]},
            "phases.1 trains the same parameters with the same settings",
        ),
        (
            {"phases": [{"steps": 12, "trainable": ["norm.*"]}, {}]},
            "phases.1 has no room: it begins at step 12",
        ),
        (
            {"phases": [{"steps": 13, "trainable": ["norm.*"]}, {}]},
            "phases.0 is too long: it ends at step 13 of 12",
        ),
        (
            {"phases": [{"steps": 2, "trainable": ["head.*"]}, {}]},
            "phases.0.trainable: pattern 'head.*' matches none",
        ),
        ({"trainable": ["@last_blocks:3"]}, "'@last_blocks:3' matches none"),
        ({"trainable": ["@blocks:0-99"]}, "@blocks:N-M, and the model has 2 blocks."),
        ({"trainable": ["@blocks:1-0"]}, "'@blocks:1-0' matches none"),
        ({"phases": [{"steps": 2, "trainable": ["@heads"]}, {}]}, "'@heads' matches none of the"),
        ({"phases": [{"steps": 2, "trainable": ["!*"]}, {}]}, "leaves nothing to train"),
        ({"phases": [{"steps": 2, "optim": {"peak_lrs": 1}}, {}]}, "phases.0.optim.peak_lrs=1 is not a set"),
        ({"phases": [{"steps": 2, "optim": {"type": "adamw"}}, {}]}, "is the same in all phases"),
        (
            {"phases": [{"steps": 2, "optim": {"lr_scales": {"x": 2.0}}}, {}]},
            "phases.0: optim.lr_scales: pattern 'x'",
        ),
        ({"phases": [{"until_stalled": {}}, {}]}, "phases.0.until_stalled needs validation and evaluation"),
        (
            {"phases": [{"random_blocks": {"num_blocks": 3, "every_steps": 1}}]},
            "phases.0.random_blocks.num_blocks=3 is more than the 2 blocks",
        ),
        (
            {"train": {"max_steps": 12, "early_stopping": {}}},
            "train.early_stopping needs validation and evaluation.every_steps",
        ),
    ],
)
def test_what_no_one_can_mean_is_refused_before_training(
    data: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read_inputs(parse(RunConfig, pretraining(data, tmp_path / "run", **changes)))
    assert problem in str(error.value)


def test_label_smoothing_by_phase_needs_an_objective_that_has_it(data: Path, tmp_path: Path) -> None:
    raw = _config(data, tmp_path / "run", phases=[{"steps": 2, "label_smoothing": 0.1, "dropout": 0.2}, {}])
    smooth = config_of_phase(parse(RunConfig, raw), 0)
    settings = {**smooth.model_dump()["objective"], **smooth.model_dump()["model"]}
    assert (settings["label_smoothing"], settings["dropout"]) == (0.1, 0.2)
    with pytest.raises(ConfigError, match=r"phases.0.label_smoothing: objective.type=regression has no"):
        config_of_phase(parse(RunConfig, {**raw, "objective": {"type": "regression"}}), 0)


def test_a_metric_that_no_evaluation_reports_ends_the_run_by_name(data: Path, tmp_path: Path) -> None:
    run(Topology(), pretraining(data, tmp_path / "base"))
    stopping = {"early_stopping": {"metric": "acuracy"}, "num_epochs": 2}
    raw = fine_tuning(
        data, tmp_path / "run", tmp_path / "base", train=stopping, evaluation={"every_steps": 1}
    )
    with pytest.raises(ConfigError, match=r"metric=acuracy is no metric.*Did you mean 'accuracy'"):
        run(Topology(), raw)
    assert logged(tmp_path / "run") == {}


def test_what_was_best_counts_for_its_own_metric_only(data: Path, tmp_path: Path) -> None:
    """Another metric on a resume begins anew; without early stopping the run is its newest commit."""
    stopping = {"metric": "accuracy", "patience": 50}
    changes: dict[str, Any] = {"evaluation": {"every_steps": 2}, "checkpoint": {"every_steps": 4}}
    raw = pretraining(data, tmp_path / "run", **changes)
    run_until_power_cut({**raw, "train": {**raw["train"], "early_stopping": stopping}}, 9)
    saved = find_checkpoint(str(tmp_path / "run"), newest=True).manifest.progress.best_of_run
    assert saved is not None
    assert saved.metric == "accuracy"
    by_loss = {**raw["train"], "max_steps": 14, "early_stopping": {"metric": "loss", "patience": 50}}
    run(Topology(), {**raw, "train": by_loss})
    best = find_checkpoint(str(tmp_path / "run"), newest=True).manifest.progress.best_of_run
    losses = logged(tmp_path / "run", "validation/loss")
    assert best is not None
    assert (best.metric, best.mode) == ("loss", "min")
    assert best.value == pytest.approx(min(value for step, value in losses.items() if step > 8))
    run(Topology(), {**raw, "train": {**raw["train"], "max_steps": 16}})
    assert find_checkpoint(str(tmp_path / "run")).step == 16


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_best(value: float) -> None:
    stopping = EarlyStoppingConfig(metric="loss", patience=2)
    watch = EarlyStopping(Progress(), of_run=stopping)
    watch.add({"loss": value}, 2)
    assert not watch.is_best(2)
    watch.add({"loss": 3.0}, 4)
    assert watch.is_best(4)
    for step in (6, 8):
        assert not watch.is_run_stalled
        watch.add({"loss": value}, step)
    assert watch.is_run_stalled
    assert watch.best_of_run is not None
    assert (watch.best_of_run.value, watch.best_of_run.step) == (3.0, 4)


def test_a_best_commit_that_is_gone_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"max_steps": 4, "log_every_steps": 1, "early_stopping": {"metric": "accuracy", "mode": "min"}}
    run(Topology(), pretraining(data, tmp_path / "run", train=train, evaluation={"every_steps": 2}))
    best = find_checkpoint(str(tmp_path / "run"))
    assert best.step == 2
    shutil.rmtree(best.path)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "the run's best commit, of step 2" in capsys.readouterr().err


def test_phases_that_never_began_are_told(data: Path, tmp_path: Path) -> None:
    stalled = {"metric": "loss", "patience": 50}
    phases = [{"until_stalled": stalled, "trainable": ["norm.*"]}, {}]
    raw = _config(data, tmp_path / "run", phases=phases, evaluation={"every_steps": 4})
    lines = describe_run(parse(RunConfig, raw), 1).lines
    assert any("phase 2" in line and "unless the phase before stalls earlier" in line for line in lines)
    run(Topology(), raw)
    notes = [event["note"] for event in events(tmp_path / "run") if event["kind"] == "note"]
    assert "the run ended in phase 1 of 2: the others never began" in notes


def test_needs_and_remarks_are_those_of_the_phases(data: Path, tmp_path: Path) -> None:
    """A run-level `trainable` that every phase replaces says nothing about the run."""
    raw = _config(data, tmp_path / "run", trainable=["norm.*"])
    raw["phases"] = [{"steps": 6, "trainable": ["norm.*"]}, {"trainable": ["*"]}]
    found = describe_run(parse(RunConfig, raw), 1)
    whole = describe_run(parse(RunConfig, {**raw, "phases": [], "trainable": ["*"]}), 1)
    head = describe_run(parse(RunConfig, {**raw, "phases": []}), 1)
    assert found.needs.flops == pytest.approx((whole.needs.flops + head.needs.flops) / 2)
    assert found.needs.num_trainable == whole.needs.num_trainable
    assert not [remark for remark in found.remarks if "frozen" in remark]


def test_the_phases_of_a_run_do_not_change_on_a_resume(data: Path, tmp_path: Path) -> None:
    run_until_power_cut(_config(data, tmp_path / "run"), 5)
    with pytest.raises(ConfigError, match=r"phases was 3 entries and is now 2 entries\."):
        run(Topology(), _config(data, tmp_path / "run", phases=PHASES[1:]))
    changed = [PHASES[0], {**PHASES[1], "steps": 3}, PHASES[2]]
    with pytest.raises(ConfigError, match=r"phases\.1\.steps was 4 and is now 3\."):
        run(Topology(), _config(data, tmp_path / "run", phases=changed))
