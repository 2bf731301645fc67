"""Complete runs of the self-supervised objectives: the same at every number of ranks, stage and resume."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import (
    events,
    fine_tuning,
    logged,
    make_text_data,
    pretraining,
    run,
    run_until_power_cut,
)

from distft.cli.main import main
from distft.topology import Topology

FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
# Those that one model can learn together, in a mixture with a stream each.
OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {
    "bidirectional": {
        "masked_lm": {"type": "masked_lm", "masked": "spans", "mask_rate": 0.3},
        "next_sentence": {"type": "next_sentence", "masking": {"masked": "words"}},
        "sentence_order": {"type": "sentence_order"},
        "replaced_token": {"type": "replaced_token", "generator_size": 0.5, "discriminator_weight": 5},
    },
    "causal": {
        "prefix_lm": {"type": "prefix_lm"},
        "span_corruption": {"type": "span_corruption"},
        "fim": {"type": "causal_lm", "fim": {"rate": 0.7}},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"), symbols=FIM_TOKENS)


def raw(data: Path, run_dir: Path, attention: str, **changes: Any) -> dict[str, Any]:
    """8 rows a step of three streams: some micro-batches have no row of a stream."""
    parts = {name: {"objective": objective} for name, objective in OBJECTIVES[attention].items()}
    config = pretraining(data, run_dir, objective={"type": "mixture", "parts": parts}, **changes)
    for use in ("data", "validation"):
        config[use] = {"type": "streams", "streams": {name: {"data": config[use]} for name in parts}}
    config["model"]["attention"] = attention
    config["train"] = {"max_steps": 6, "log_every_steps": 1}
    config["checkpoint"] = {"every_steps": 3}
    config["evaluation"] = {"max_sequences": 150}
    return config


def loss_names(run_dir: Path, prefix: str) -> set[str]:
    """The names of the losses, but the whole one, in metrics.jsonl: those with this prefix, without it."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line if name.endswith("/loss")}
    if not prefix:
        return {name for name in names if not name.startswith("validation/")}
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)} - {"loss"}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for attention in OBJECTIVES:
        run(Topology(), raw(data, folder / attention, attention))
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize("attention", OBJECTIVES)
@pytest.mark.parametrize(("world_size", "stage"), [(2, 1), (4, 3)])
def test_losses_do_not_depend_on_the_number_of_ranks_and_the_stage(
    data: Path, alone: Path, tmp_path: Path, world_size: int, stage: int, attention: str
) -> None:
    engine = {"type": "zero", "zero_stage": stage}
    run_ranks(run, world_size, raw(data, tmp_path, attention, engine=engine))
    terms = loss_names(alone / attention, "")
    for metric in ("loss", "validation/loss", "grad_norm", *terms):
        expected = logged(alone / attention, metric)
        assert expected
        assert logged(tmp_path, metric) == pytest.approx(expected, abs=5e-6), metric


@pytest.mark.ranks
def test_a_run_resumes_exactly_at_another_number_of_ranks(data: Path, alone: Path, tmp_path: Path) -> None:
    config = raw(data, tmp_path, "bidirectional")
    run_until_power_cut(config, 4)
    assert max(logged(tmp_path)) == 4
    run_ranks(run, 2, {**config, "engine": {"type": "zero", "zero_stage": 2}})
    assert logged(tmp_path) == pytest.approx(logged(alone / "bidirectional"), abs=5e-6)
    (resume,) = [event for event in events(tmp_path) if event["kind"] == "resume"]
    assert resume["step"] == 3


@pytest.mark.parametrize("attention", OBJECTIVES)
def test_training_and_validation_have_the_same_names_of_losses(alone: Path, attention: str) -> None:
    names = loss_names(alone / attention, "")
    assert names == loss_names(alone / attention, "validation/")
    assert len(names) == {"bidirectional": 8, "causal": 3}[attention]  # of parts, and of terms if several


def test_the_log_says_what_stands_for_a_mask_and_metrics_have_the_terms_names(alone: Path) -> None:
    lines = [event["summary"] for event in events(alone / "bidirectional") if event["kind"] == "data"]
    notes = [line for line in lines if "become the unknown token" in line]
    assert len(notes) == 3  # of each stream that masks; not again of the validation data
    assert all("`distft tokenizer train --symbol '<mask>'`" in note for note in notes)
    assert logged(alone / "bidirectional", "validation/next_sentence/next_sentence/accuracy")
    assert logged(alone / "bidirectional", "validation/next_sentence/masked_token/perplexity")
    assert logged(alone / "causal", "validation/prefix_lm/bits_per_byte")


def test_a_masked_language_model_can_be_fine_tuned_in_part(data: Path, alone: Path, tmp_path: Path) -> None:
    run(Topology(), fine_tuning(data, tmp_path, alone / "bidirectional"))
    assert logged(tmp_path, "validation/accuracy")


def test_a_bidirectional_model_does_not_generate(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(alone / "bidirectional"), "--prompt", "the cat"]) == 2
    assert "is a bidirectional model, which fills in hidden tokens" in capsys.readouterr().err


def test_evaluate_repeats_the_metrics_of_training(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for attention in OBJECTIVES:
        assert main(["evaluate", str(alone / attention), "evaluation.max_sequences=150"]) == 0
        expected = logged(alone / attention, "validation/loss")[6]
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss ")]
        assert float(line.split()[1]) == pytest.approx(expected, rel=1e-5)
