"""Preferences from data to evaluation: the reference is computed once, and a run resumes anywhere."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_pool import run_ranks
from support.small_runs import WORDS, events, logged, pretraining, run, run_until_power_cut

from distft.cli.main import main
from distft.config import parse
from distft.data.batch import Batch
from distft.data.preferences import PreferencesConfig
from distft.data.targets import ANSWER
from distft.errors import CheckpointError, ConfigError, DataError
from distft.objective.preference import Preference
from distft.run import reference
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.run.prediction_rows import PredictOptions
from distft.run.pretrained import evaluate_checkpoint, load_model, open_model
from distft.run.text_predictor import read_texts
from distft.topology import Topology

NUM_PAIRS, NUM_HELD_OUT = 24, 7
ZERO = {"type": "zero", "zero_stage": 2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of very unequal lengths, whose better answer says an animal and whose worse one does not."""
    folder, source = tmp_path_factory.mktemp("pairs"), random.Random(5)
    for name, num_rows in (("train", NUM_PAIRS), ("held_out", NUM_HELD_OUT)):
        lines = []
        for _ in range(num_rows):
            row = {
                "prompt": " ".join(source.choice(WORDS) for _ in range(source.randrange(1, 5))),
                "chosen": f" {source.choice(['cat', 'dog', 'bird'])}",
                "rejected": " "
                + " ".join(source.choice(["tree", "mat"]) for _ in range(source.randrange(1, 3))),
            }
            lines.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def tuning(data: Path, pairs: Path, run_dir: Path, init_from: Path, /, **changes: Any) -> dict[str, Any]:
    raw = pretraining(data, run_dir)
    del raw["model"]
    return {
        **raw,
        "init_from": str(init_from),
        "objective": {"type": "preference"},
        "data": {"type": "preferences", "path": str(pairs / "train.jsonl")},
        "validation": {"type": "preferences", "path": str(pairs / "held_out.jsonl")},
        "optim": {"peak_lr": 0.003},
        **changes,
    }


def _answer_logps(path: Path, pairs: Path) -> list[list[float]]:
    """Of every answer of the held-out rows, from the logits of a whole forward of the row alone."""
    trained = open_model(str(path))
    model = load_model(trained, torch.device("cpu"))
    eos, found = trained.tokenizer.eos_id, []
    for line in (pairs / "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = trained.tokenizer.encode(row["prompt"])
        own = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*trained.tokenizer.encode(row["prompt"] + row[side]), eos]])
            with torch.no_grad():
                logp = model(ids[:, :-1])["lm_head"].double().log_softmax(-1)
            of_tokens = logp.gather(2, ids[:, 1:, None])[0, :, 0]
            own.append(float(of_tokens[len(prompt) - 1 :].sum()))
        found.append(own)
    return found


def _mean(values: Any) -> float:
    return float(np.mean(values))


def test_evaluation_gives_the_rewards_of_held_out_pairs(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path
) -> None:
    beta = 0.2
    raw = tuning(data, pairs, tmp_path / "run", pretrained, objective={"type": "preference", "beta": beta})
    result = run(Topology(), raw)
    found = evaluate_checkpoint(str(tmp_path / "run"), [], Topology())
    reference, policy = (np.array(_answer_logps(path, pairs)) for path in (pretrained, tmp_path / "run"))
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    assert found == {
        "loss": pytest.approx(_mean(np.log1p(np.exp(-margins))), abs=1e-5),
        "accuracy": _mean(margins > 0),
        "rewards/chosen": pytest.approx(_mean(rewards[:, 0]), abs=1e-5),
        "rewards/rejected": pytest.approx(_mean(rewards[:, 1]), abs=1e-5),
        "rewards/margin": pytest.approx(_mean(margins), abs=1e-5),
        "log_probabilities/chosen": pytest.approx(_mean(policy[:, 0]), abs=1e-4),
        "log_probabilities/rejected": pytest.approx(_mean(policy[:, 1]), abs=1e-4),
        "log_probabilities/accuracy": _mean(policy[:, 0] > policy[:, 1]),
    }
    assert found["rewards/margin"] > 0.01
    assert {name: result.metrics[f"validation/{name}"] for name in found} == pytest.approx(found, abs=1e-6)
    losses = logged(tmp_path / "run")
    assert losses[1] == pytest.approx(np.log(2), abs=1e-5)  # the model is its reference
    assert losses[12] < losses[1]
    margins_of_steps = logged(tmp_path / "run", "rewards/margin")
    assert margins_of_steps[1] == pytest.approx(0, abs=1e-5)
    assert margins_of_steps[12] > 0.01
    assert set(logged(tmp_path / "run", "accuracy").values()) <= {n / 16 for n in range(17)}


def _forbid_computation() -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference is computed again")

    Preference.reference_values = refuse  # type: ignore[assignment,method-assign]


def _resume(topology: Topology, raw: dict[str, Any]) -> float:
    _forbid_computation()
    return run(topology, raw).metrics["validation/loss"]


@pytest.mark.ranks
@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo"])
def test_a_run_resumes_on_other_ranks_with_the_stored_reference(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path, loss: str
) -> None:
    changes = {
        "objective": {"type": "preference", "loss": loss},
        "train": {"max_steps": 8, "log_every_steps": 1},
    }
    whole = tuning(data, pairs, tmp_path / "whole", pretrained, **changes)
    straight = run(Topology(), whole).metrics["validation/loss"]
    raw = tuning(data, pairs, tmp_path / "cut", pretrained, **changes)
    run_until_power_cut(raw, 5)
    for found in run_ranks(_resume, 2, raw | {"engine": {"type": "zero", "zero_stage": 3}}):
        assert found == pytest.approx(straight, abs=3e-6)
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=3e-6)


def _files(run_dir: Path) -> dict[Path, str]:
    root = run_dir / "checkpoints" / "reference"
    return {path: path.read_text() for path in sorted(root.glob("*/rows_*.jsonl"))}


def _compute(topology: Topology, raw: dict[str, Any], block_size: int) -> None:
    reference._BLOCK_SEQUENCES = block_size
    run(topology, raw)


@pytest.mark.ranks
def test_ranks_share_the_computation_and_an_interrupted_one_goes_on(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_BLOCK_SEQUENCES", 5)
    short = {"train": {"max_steps": 1, "log_every_steps": 1}}
    alone = tuning(data, pairs, tmp_path / "alone", pretrained, **short)
    values_of, num_calls = Preference.reference_values, 0

    def interrupted(*arguments: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 7:
            raise RuntimeError("power cut")
        return values_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Preference, "reference_values", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            run(Topology(), alone)
        before = _files(tmp_path / "alone")
        assert len(before) == 2  # blocks of 5 pairs in micro-batches of 2, so that the third is lost
        first = next(iter(before))
        first.write_text(before[first].replace("-", "", 1))  # damaged
        num_calls = 100
        run(Topology(), alone)
        assert num_calls == 100 + 3 + (3 + 3 + 2) + (
            3 + 1
        )  # the damaged block, the rest of 24 pairs, and 7 others
    found = _files(tmp_path / "alone")
    assert {path: found[path] for path in before} == before
    run_ranks(_compute, 2, tuning(data, pairs, tmp_path / "two", pretrained, engine=ZERO, **short), 5)
    for one, two in zip(found.values(), _files(tmp_path / "two").values(), strict=True):
        rows = [[json.loads(line)["values"] for line in text.splitlines()[:-1]] for text in (one, two)]
        assert np.array(rows[0]) == pytest.approx(np.array(rows[1]), abs=1e-5)


def test_a_changed_reference_is_refused_and_changed_data_computed_anew(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path
) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows"
    shutil.copytree(pretrained, base)
    shutil.copytree(pairs, rows)
    raw = tuning(data, rows, tmp_path / "run", base, train={"max_steps": 4, "log_every_steps": 1})
    run(Topology(), raw)
    further = raw | {"train": {"max_steps": 8, "log_every_steps": 1}}
    held_out = (rows / "held_out.jsonl").read_text().splitlines(keepends=True)
    (rows / "held_out.jsonl").write_text("".join(held_out[:-1]))
    assert run(Topology(), further).step == 8
    notes = [event["note"] for event in events(tmp_path / "run") if event["kind"] == "note"]
    computed = [note.rpartition("rows of ")[2] for note in notes if "reference" in note]
    assert computed == ["train and validation", "validation"]

    shutil.rmtree(base)
    run(Topology(), pretraining(data, base, seed=1))
    last = raw | {"train": {"max_steps": 12, "log_every_steps": 1}}
    with pytest.raises(ConfigError, match=r"what another reference gives.*: weights differ\. Restore"):
        run(Topology(), last)
    shutil.rmtree(base)
    # Without its reference the run evaluates what it has stored, and nothing else.
    assert evaluate_checkpoint(str(tmp_path / "run"), [], Topology())["loss"] > 0
    new = rows / "new.jsonl"
    new.write_text(held_out[-1])
    with pytest.raises(ConfigError, match=r"(?s)base.*It is needed: the run has not stored"):
        evaluate_checkpoint(str(tmp_path / "run"), [f"validation.path={new}"], Topology())


def test_runs_share_what_an_equal_reference_gives_equal_rows(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of a search over beta and seeds; nothing damaged or of another reference is used."""
    values_of, num_computed, shared = Preference.reference_values, 0, tmp_path / "shared"

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal num_computed
        num_computed += 1
        return values_of(*arguments)

    monkeypatch.setattr(Preference, "reference_values", counted)

    def tuned(name: str, **changes: Any) -> int:
        """The number of micro-batches that the run computed of its reference."""
        nonlocal num_computed
        num_computed = 0
        objective = {"type": "preference", "reference_dir": str(shared), **changes.pop("objective", {})}
        short = {"train": {"max_steps": 1, "log_every_steps": 1}, "validation": None}
        run(
            Topology(),
            tuning(data, pairs, tmp_path / name, pretrained, objective=objective, **short, **changes),
        )
        return num_computed

    whole = NUM_PAIRS // 2
    assert tuned("first") == whole
    (block,) = shared.rglob("rows_*.jsonl")
    text = block.read_text()
    assert tuned("second", objective={"beta": 0.7, "loss": "ipo"}, seed=5) == 0
    assert list(_files(tmp_path / "second").values()) == [text], "a run has all that it needs"
    assert tuned("precise", engine={"type": "local", "param_dtype": "bf16"}) == whole
    block.write_text(text.replace("1", "2", 1))
    assert tuned("third") == whole
    assert block.read_text() == text
    (block.parent / "predictions.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"name another objective\.reference_dir"):
        tuned("fourth")
    assert num_computed == 0
    shutil.rmtree(shared)
    assert tuned("second", objective={"beta": 0.7, "loss": "ipo"}, seed=5) == 0, "it has its own copy"


def test_new_pairs_are_evaluated_with_any_reference(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path
) -> None:
    run(Topology(), tuning(data, pairs, tmp_path / "run", pretrained))
    rows = (pairs / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "new.jsonl").write_text("".join(rows[3:]))
    given = [f"validation.path={tmp_path / 'new.jsonl'}"]
    found = evaluate_checkpoint(str(tmp_path / "run"), given, Topology())
    assert found["rewards/margin"] > 0.01
    itself = evaluate_checkpoint(
        str(tmp_path / "run"), [f"objective.reference={tmp_path / 'run'}"], Topology()
    )
    assert itself["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert itself["rewards/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None, "model": True}, "compares the model with a reference: set init_from"),
        ({"objective": {"type": "preference", "reference": "gone"}}, "objective.reference: "),
        ({"data": {"type": "tokens"}}, "these rows have none: set data.type=preferences"),
        ({"objective": {"type": "causal_lm"}}, "these rows are none: set data.type=tokens"),
    ],
)
def test_a_reference_or_pairs_that_are_missing_are_told_before_training(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    raw, plain = tuning(data, pairs, tmp_path / "run", pretrained), pretraining(data, tmp_path / "run")
    if "model" in changes:
        tokenizer = str(data / "tokenizer.model")
        changes = {"init_from": None, "model": plain["model"], "tokenizer": tokenizer}
    if "data" in changes:
        changes = {"data": plain["data"], "validation": None}
    config: RunConfig = parse(RunConfig, raw | changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read_inputs(config)
    assert not (tmp_path / "run").exists()


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("has_prompt", [True, False])
def test_messages_become_text_by_the_chat_template(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path, has_prompt: bool
) -> None:
    template = (
        "{% for m in messages %}{{ m.role[0] }} {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    (tmp_path / "template.jinja").write_text(template)
    before = [_message("user", "the cat"), _message("assistant", "sat"), _message("user", "on")]
    answers = {
        name: [_message("assistant", text)] for name, text in (("chosen", "tree"), ("rejected", "a mat"))
    }
    row = {"prompt": before, **answers} if has_prompt else {n: before + a for n, a in answers.items()}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    chats: dict[str, Any] = {
        "type": "preferences",
        "format": "messages",
        "path": str(tmp_path / "chat.jsonl"),
    }
    chats |= {} if has_prompt else {"prompt": None}
    raw = tuning(data, pairs, tmp_path / "run", pretrained, data=chats, validation=None)
    raw |= {"chat": {"template": str(tmp_path / "template.jinja")}}
    raw["batch"] = raw["batch"] | {"seq_len": 24}
    inputs = read_inputs(parse(RunConfig, raw))
    assert inputs.tokenizer is not None
    batch, decode, eos = inputs.train.batch(0, 1), inputs.tokenizer.decode, inputs.tokenizer.eos_id
    assert isinstance(batch, Batch)
    labels = batch.targets[ANSWER]
    assert [decode(ids[ids >= 0].tolist()) for ids in labels] == ["tree", "a mat"]
    assert [int(ids[ids >= 0][-1]) for ids in labels] == [eos, eos]
    assert "cata satu ona tree" in decode(batch.input_ids[0].tolist())
    run(Topology(), {**raw, "train": {"max_steps": 1}})
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text(json.dumps({"prompt" if has_prompt else "messages": before[:1]}) + "\n")
    options = ["-o", str(output), "--max-new-tokens", "2"]
    assert main(["predict", str(tmp_path / "run"), str(rows), *options]) == 0
    assert json.loads(output.read_text())["messages"] == before[:1]
    bad = {**row, "rejected": answers["chosen"] if has_prompt else before + answers["chosen"]}
    foreign = {**row, "chosen": [_message("user", "tree")]}
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, bad, foreign)))
    with pytest.raises(DataError) as raised:
        read_inputs(parse(RunConfig, raw))
    first, second = str(raised.value).splitlines()
    assert "chat.jsonl:2: 'chosen' and 'rejected' are equal, so that neither is better" in first
    assert "chat.jsonl:3: " in second
    assert (
        "must go on behind the prompt with a message of the assistant" in second or "has no prompt" in second
    )


def test_texts_to_continue_are_in_the_column_of_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "why", "prompt": 1}\n')
    path = str(tmp_path / "rows.jsonl")
    data = PreferencesConfig(path="train.jsonl", prompt="question")
    assert read_texts(data, path, PredictOptions()) == ([{"line": 1, "question": "why"}], ["why"])


def test_with_adapters_the_base_is_the_reference(
    data: Path, pairs: Path, pretrained: Path, tmp_path: Path
) -> None:
    short = {"train": {"max_steps": 4, "log_every_steps": 1}}
    raw = tuning(data, pairs, tmp_path / "run", pretrained, lora={"rank": 2}, **short)
    result = run(Topology(), raw)
    texts = _files(tmp_path / "run").values()
    stored = [[json.loads(line)["values"] for line in text.splitlines()[:-1]] for text in texts]
    (held_out,) = (values for values in stored if len(values) == NUM_HELD_OUT)
    assert np.array(held_out) == pytest.approx(np.array(_answer_logps(pretrained, pairs)), abs=1e-4)
    assert logged(tmp_path / "run")[1] == pytest.approx(np.log(2), abs=1e-5)
    found = evaluate_checkpoint(str(tmp_path / "run"), [], Topology())
    assert found["rewards/margin"] > 0.001
    assert {name: result.metrics[f"validation/{name}"] for name in found} == pytest.approx(found, abs=1e-5)
