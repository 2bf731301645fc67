"""An encoder with a decoder: pretrained, resumed, fine-tuned in part on pairs, used and converted."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import logged, make_text_data, pretraining, run, run_until_power_cut

from distft.cli.main import main
from distft.config import parse
from distft.errors import ConfigError, DataError
from distft.run.config import RunConfig
from distft.run.generate import GenerationOptions, generate_text
from distft.run.inputs import read_inputs
from distft.topology import Topology

MODEL: dict[str, Any] = {
    "type": "encoder_decoder",
    "max_seq_len": 24,
    "d_model": 16,
    "num_encoder_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
}
SPANS = {"type": "span_corruption"}
PROMPTS = {"type": "prefix_lm", "prefix": "prompt"}
PAIRS = {"cat": "red", "dog": "moon", "bird": "stone"}


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with a tokenizer that has sentinels, and pairs to translate."""
    folder = tmp_path_factory.mktemp("spans") / "data"
    make_text_data(folder, symbols=tuple(f"<extra_id_{number}>" for number in range(8)))
    rows = [{"prompt": f"the {name} on", "completion": word} for name, word in PAIRS.items()]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return folder


def translating(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    pairs = {"type": "completion", "path": str(folder / "pairs.jsonl")}
    options = {"data": pairs, "validation": pairs, "objective": PROMPTS}
    raw = pretraining(folder, run_dir, **{"model": MODEL, **options, **changes})
    return {**raw, "tokenizer": str(folder / "tokenizer.model")}


def _resumed(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


@pytest.mark.ranks
def test_a_run_resumes_on_other_ranks_and_learns_to_translate_with_a_frozen_encoder(
    spans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = (
        pretraining(spans, tmp_path / name, model={**MODEL, "dropout": 0.1}, objective=SPANS)
        for name in ("whole", "cut")
    )
    run(Topology(), whole)
    run_until_power_cut(cut, 6)
    run_ranks(_resumed, 2, {**cut, "engine": {"type": "zero", "zero_stage": 3}}, timeout_s=120)
    expected = logged(tmp_path / "whole")
    assert logged(tmp_path / "cut") == pytest.approx(expected, abs=2e-6)
    assert expected[12] < expected[1]
    tuned = translating(
        spans,
        tmp_path / "tuned",
        model=None,
        init_from=str(tmp_path / "cut"),
        trainable=["decoder.*", "embed.*"],
        batch={"global_batch_size": 8, "micro_batch_size": 8, "seq_len": 24},
        train={"max_steps": 150, "log_every_steps": 50},
        optim={"peak_lr": 0.02, "schedule": {"type": "cosine", "warmup_steps": 2}},
    )
    assert run(Topology(), tuned).metrics["validation/accuracy"] > 0.99
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "tuned")]) == 0
    prompts = [f"the {name} on" for name in PAIRS]
    options = GenerationOptions(max_new_tokens=9, temperature=0)
    texts = generate_text(str(tmp_path / "tuned"), prompts, options, on_note=print)
    assert [text.strip() for text in texts] == list(PAIRS.values())
    capsys.readouterr()
    convert = ["checkpoint", "convert", str(tmp_path / "tuned"), str(tmp_path / "hf"), "--to", "huggingface"]
    assert main(convert) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "t5"
    assert generate_text(str(tmp_path / "hf"), prompts, options, on_note=print) == texts


def test_rows_end_their_sources_with_eos_and_keep_the_rest_of_what_they_are(
    spans: Path, tmp_path: Path
) -> None:
    inputs = read_inputs(parse(RunConfig, translating(spans, tmp_path / "run")))
    batch = inputs.train.batch(0, 3)
    tokenizer = inputs.tokenizer
    for ids, is_prefix, labels in zip(
        batch.input_ids.tolist(),  # type: ignore[union-attr]
        batch.is_prefix.tolist(),  # type: ignore[union-attr]
        batch.targets["next_token"].tolist(),  # type: ignore[union-attr]
        strict=True,
    ):
        source = [token for token, mark in zip(ids, is_prefix, strict=True) if mark]
        target = [label for label in labels if label >= 0]
        assert source[-1] == target[-1] == tokenizer.eos_id
        name = tokenizer.decode(source[:-1]).split()[1]
        assert tokenizer.decode(target[:-1]).strip() == PAIRS[name]


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "classification"},
        {"type": "contrastive", "views": "dropout"},
        {"type": "prefix_lm"},
    ],
    ids=lambda objective: str(objective["type"]),
)
def test_other_objectives_train_all_of_its_weights(
    spans: Path, tmp_path: Path, objective: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = pretraining(spans, tmp_path / "run", model={**MODEL, "dropout": 0.1}, objective=objective)
    if objective["type"] == "classification":
        raw["data"] = {"type": "labelled", "path": str(spans / "train.jsonl")}
        raw["validation"] = {"type": "labelled", "path": str(spans / "test.jsonl")}
        raw["tokenizer"] = str(spans / "tokenizer.model")
    run(Topology(), {**raw, "train": {"max_steps": 4, "log_every_steps": 1}})
    embed = ["embed", str(tmp_path / "run"), str(spans / "test.jsonl"), "-o"]
    capsys.readouterr()
    assert main([*embed, str(tmp_path / "vectors.npy")]) == 0
    assert main([*embed, str(tmp_path / "others.npy"), "--pooling", "mean"]) == 2
    assert "--pooling=mean with model.type=encoder_decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "objective.type=causal_lm with model.type=encoder_decoder: its rows have no source"),
        ({"objective": {"type": "masked_lm"}}, "objective.type=masked_lm with model.type=encoder_decoder"),
        (
            {"objective": {"type": "next_sentence", "masking": {}}},
            "next_sentence and masking with model.type=encoder_decoder: its decoder would learn nothing",
        ),
        ({"objective": {"type": "replaced_token"}}, "Transformer's blocks"),
        (
            {"objective": {"type": "contrastive", "pooling": "mean"}},
            "objective.pooling=mean with model.type=encoder_decoder",
        ),
        ({"objective": PROMPTS}, "these rows are packed documents without prompts"),
    ],
)
def test_objectives_that_it_cannot_have_are_refused_by_name(
    data: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    config = parse(RunConfig, pretraining(data, tmp_path / "run", model=MODEL, **changes))
    with pytest.raises(ConfigError) as error:
        read_inputs(config)
    assert str(error.value).count(problem) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"engine": {"type": "local", "activation_checkpointing": "full"}},
            "engine.activation_checkpointing=full: only the",
        ),
        (
            {"engine": {"type": "local", "fp8": "tensorwise", "param_dtype": "bf16"}},
            "engine.fp8=tensorwise needs model.type=transformer",
        ),
        ({"model": {**MODEL, "start_id": 5000}}, "model.start_id=5000 is not an id of the tokenizer's"),
    ],
    ids=["checkpointing", "fp8", "start_id"],
)
def test_what_it_cannot_do_is_said_by_the_check(
    spans: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    raw = pretraining(spans, tmp_path / "run", **{"model": MODEL, "objective": SPANS, **changes})
    with pytest.raises(ConfigError) as error:
        read_inputs(parse(RunConfig, raw))
    assert problem in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_plain_directory_is_evaluated_with_an_objective_that_fits(
    spans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Topology(), translating(spans, tmp_path / "run", train={"max_steps": 2}))
    hf = str(tmp_path / "hf")
    assert main(["checkpoint", "convert", str(tmp_path / "run"), hf, "--to", "huggingface"]) == 0
    pairs = ["validation.type=completion", f"validation.path={spans / 'pairs.jsonl'}"]
    capsys.readouterr()
    assert main(["evaluate", hf, *pairs]) == 0
    assert "objective.type is prefix_lm" in capsys.readouterr().err
    assert main(["evaluate", hf, *pairs, "objective.type=causal_lm"]) == 2
    assert "objective.type=causal_lm with model.type=encoder_decoder" in capsys.readouterr().err


def test_a_row_without_a_source_is_named_before_training(spans: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "", "completion": "b"}\n'
    )
    pairs = {"type": "completion", "path": str(tmp_path / "pairs.jsonl")}
    raw = translating(spans, tmp_path / "run", data=pairs, validation=None)
    with pytest.raises(DataError, match=r"pairs.jsonl:2: 'prompt' encodes to no tokens"):
        read_inputs(parse(RunConfig, raw))


def test_a_source_that_fills_the_row_is_named_before_anything_is_generated(
    spans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = translating(spans, tmp_path / "run", train={"max_steps": 2})
    run(Topology(), raw)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "-p", "the cat " * 9]) == 2
    assert "an encoder reads a source whole: shorten it to model.max_seq_len=24" in capsys.readouterr().err


def test_a_deeper_stack_begins_with_the_blocks_of_the_other(spans: Path, tmp_path: Path) -> None:
    run(
        Topology(), pretraining(spans, tmp_path / "run", model=MODEL, objective=SPANS, train={"max_steps": 2})
    )
    raw = pretraining(
        spans,
        tmp_path / "next",
        model={**MODEL, "num_encoder_layers": 2, "num_decoder_layers": 3},
        init_from=str(tmp_path / "run"),
        objective=SPANS,
    )
    with pytest.raises(ConfigError, match=r"num_decoder_layers is 2 in .* and 3 here"):
        read_inputs(parse(RunConfig, raw))
    allowed = {**raw, "allow_model_changes": ["num_decoder_layers"]}
    assert read_inputs(parse(RunConfig, allowed)).init_from is not None
