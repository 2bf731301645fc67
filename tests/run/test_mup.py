"""Runs in muP: the coordinate check, what a checkpoint records, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from coordinate_check import MAX_POWER, changes_of, main
from support.small_runs import fine_tuning, pretraining, run
from widths import at_width

from distft.checkpoint.committed import find_checkpoint
from distft.config import dump_yaml, parse
from distft.errors import ConfigError
from distft.run.config import RunConfig
from distft.topology import Topology

MUP = {"parametrization": "mup", "mup_base_d_model": 16, "mup_base_head_dim": 8}
NARROW, WIDE = 16, 128
# rates at which the narrow model learns
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"type": "adamw", "peak_lr": 0.01},
    "lion": {"type": "lion", "peak_lr": 0.005},
    "sgd": {"type": "sgd", "peak_lr": 1.0, "max_grad_norm": None},
    "muon": {"type": "muon", "peak_lr": 0.02},
    "spectral_muon": {"type": "muon", "update_scale": "spectral", "peak_lr": 0.05},
}


def _config(data: Path, run_dir: Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sizes = {"max_seq_len": 24, "d_model": NARROW, "num_layers": 2, "num_heads": 2, "init_std": None}
    batch = {"global_batch_size": 8, "micro_batch_size": 8, "seq_len": 24}
    return pretraining(data, run_dir, model={**sizes, **model}, batch=batch, num_threads=1, **changes)


def _written(path: Path, raw: dict[str, Any]) -> str:
    config: RunConfig = parse(RunConfig, raw)
    path.write_text(dump_yaml(config))
    return str(path)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_layer_changes_more_in_a_wider_model(
    data: Path, tmp_path: Path, optimizer: str, is_tied: bool
) -> None:
    raw = _config(data, tmp_path / "run", {**MUP, "tie_embeddings": is_tied}, optim=OPTIMIZERS[optimizer])
    path = _written(tmp_path / "run.yaml", raw)
    narrow, wide = (changes_of(at_width(path, [], width, "mup"), 3)[-1] for width in (NARROW, WIDE))
    limit = (WIDE / NARROW) ** (MAX_POWER + 0.1)  # of one seed
    ratios = {layer: wide[layer] / narrow[layer] for layer in narrow}
    assert all(1 / 4 < ratio < limit for ratio in ratios.values()), ratios


def test_the_coordinate_check_passes_in_mup_and_tells_what_grows_in_standard(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _written(tmp_path / "run.yaml", _config(data, tmp_path / "run", MUP))
    chart = tmp_path / "chart.svg"
    options = ["--widths", "16", "64", "128", "--seeds", "1", "--steps", "3", "-o", str(chart)]
    assert main([path, "optim.peak_lr=0.02", *options]) == 0
    standard, mup = capsys.readouterr().out.split("parametrization=mup")
    assert "does not pass" in standard
    assert "feed-forward" in standard.splitlines()[-1]
    assert "\npasses" in mup
    assert "mean absolute change" in chart.read_text()
    assert main([path, "--widths", "17"]) == 1
    assert "num_heads=2.125" in capsys.readouterr().err


@pytest.mark.parametrize("widens_heads", [False, True])
def test_widths_keep_their_base_and_the_kind_of_growth(
    data: Path, tmp_path: Path, widens_heads: bool
) -> None:
    path = _written(tmp_path / "run.yaml", _config(data, tmp_path / "run", MUP))
    model = at_width(path, [], 64, "mup", widens_heads=widens_heads).model
    assert model is not None
    found = model.model_dump(
        include={"d_model", "num_heads", "head_dim", "mup_base_d_model", "mup_base_head_dim"}
    )
    heads = {"num_heads": 2, "head_dim": 32} if widens_heads else {"num_heads": 8, "head_dim": 8}
    assert found == {"d_model": 64, **heads, "mup_base_d_model": 16, "mup_base_head_dim": 8}


def test_a_checkpoint_records_it_and_a_resume_or_fine_tune_with_another_is_refused(
    data: Path, tmp_path: Path
) -> None:
    model = {**MUP, "d_model": 32, "mup_base_head_dim": 16}
    short = {"max_steps": 2, "log_every_steps": 1}
    raw = _config(data, tmp_path / "run", model, train=short)
    run(Topology(), raw)
    manifest = find_checkpoint(str(tmp_path / "run")).manifest
    assert manifest.config["model"]["parametrization"] == "mup"
    lr_of = {name: group.settings["lr"] for group in manifest.groups for name in group.parameters}
    assert lr_of["blocks.0.attn.q.weight"] == pytest.approx(lr_of["embed.weight"] / 2)
    for changed in ({"d_model": 32}, {**model, "mup_base_d_model": 8}):
        with pytest.raises(ConfigError, match=r"parametrization|mup_base_d_model"):
            run(Topology(), _config(data, tmp_path / "run", changed, train={**short, "max_steps": 4}))
    tuned = fine_tuning(data, tmp_path / "tuned", tmp_path / "run", train=short, num_threads=1)
    run(Topology(), {**tuned, "trainable": ["*"]})  # the model and its parametrization come with the run
    assert find_checkpoint(str(tmp_path / "tuned")).manifest.config["model"]["mup_base_d_model"] == 16
    other = _config(data, tmp_path / "other", {"d_model": 32}, init_from=str(tmp_path / "run"), train=short)
    with pytest.raises(ConfigError, match="parametrization is 'mup' in"):
        run(Topology(), other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"parametrization": "mup"}}, "mup needs mup_base_d_model.*mup needs mup_base_head_dim"),
        ({"model": {"mup_base_d_model": 16}}, "mup_base_d_model=16 has no effect"),
        ({"model": MUP, "objective": {"type": "replaced_token"}}, "no rule for a generator"),
        (
            {"model": MUP, "optim": {"type": "muon", "matrices": ["*"]}},
            "optim.type=muon has no rule for the rate of embed.weight",
        ),
    ],
)
def test_what_has_no_rule_is_refused(
    data: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    raw = {**_config(data, tmp_path, {}), **changes}
    sizes = {"max_seq_len": 24, "d_model": 32, "num_layers": 2, "num_heads": 2}
    raw["model"] = {**sizes, **raw["model"]}
    with pytest.raises(ConfigError, match=f"(?s){reason}"):
        run(Topology(), raw)
