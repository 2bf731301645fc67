"""Models other than the Transformer: pretrained, resumed, fine-tuned in part, used and converted."""

from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.cli.main import main
from distft.config import parse
from distft.errors import ConfigError
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.topology import Topology

SIZES = {"max_seq_len": 24, "d_model": 16, "num_layers": 2}
ZERO = {"type": "zero", "zero_stage": 3}


def _resumed(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["lstm", "cnn"])
def test_a_run_resumes_on_other_ranks_is_fine_tuned_in_part_and_used(
    data: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**SIZES, "type": kind, **({"kernel_sizes": [2, 3], "d_model": 16} if kind == "cnn" else {})}
    whole, cut = (pretraining(data, tmp_path / name, model=model) for name in ("whole", "cut"))
    run(Topology(), whole)
    run_until_power_cut(cut, 6)
    run_ranks(_resumed, 2, {**cut, "engine": ZERO}, timeout_s=120)
    expected = logged(tmp_path / "whole")
    assert logged(tmp_path / "cut") == pytest.approx(expected, abs=2e-6)
    assert expected[12] < expected[1]
    tuned = fine_tuning(data, tmp_path / "tuned", tmp_path / "cut", trainable=["classifier.*", "blocks.1.*"])
    assert 0 <= run(Topology(), tuned).metrics["validation/accuracy"] <= 1
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "tuned")]) == 0
    prompts = ["-p", "the cat", "-p", "a"]
    assert main(["generate", str(tmp_path / "cut"), *prompts, "--max-new-tokens", "4"]) == 0
    assert "the cat" in capsys.readouterr().out
    found = tmp_path / "cut"
    assert main(["checkpoint", "convert", str(found), str(tmp_path / "universal"), "--to", "universal"]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "universal")]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "convert", str(found), str(tmp_path / "hf"), "--to", "huggingface"]) == 2
    assert f"model.type={kind}, which has no export to transformers" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"objective": {"type": "prefix_lm"}}, "objective.type=prefix_lm needs model.type=transformer"),
        (
            {"objective": {"type": "replaced_token"}, "model": {"direction": "bidirectional"}},
            "objective.type=replaced_token needs model.type=transformer: its generator has",
        ),
        (
            {"objective": {"type": "masked_lm"}},
            "Set model.direction=bidirectional, or objective",
        ),
        ({"model": {"direction": "bidirectional"}}, "Set model.direction=causal, or another objective"),
    ],
)
def test_objectives_that_a_model_cannot_have_are_refused_by_name(
    data: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    model = {**SIZES, "type": "gru", **changes.pop("model", {})}
    config = parse(RunConfig, pretraining(data, tmp_path / "run", model=model, **changes))
    with pytest.raises(ConfigError) as error:
        read_inputs(config)
    assert problem in str(error.value)


def test_another_type_of_model_has_no_use_for_the_weights(data: Path, tmp_path: Path) -> None:
    run(Topology(), pretraining(data, tmp_path / "run", train={"max_steps": 2}))
    model = {**SIZES, "type": "lstm"}
    raw = pretraining(data, tmp_path / "next", model=model, init_from=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"model.type is transformer in .* and lstm here"):
        read_inputs(parse(RunConfig, raw))
