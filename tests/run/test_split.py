"""Complete runs whose validation rows are split off their training data."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.cli.main import main
from distft.config import parse
from distft.errors import ConfigError, DataError
from distft.run.audit import audit_run
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.run.pretrained import evaluate_checkpoint
from distft.topology import Topology


def config_of(data: Path, run_dir: Path, pretrained: Path, **changes: Any) -> dict[str, Any]:
    return fine_tuning(
        data,
        run_dir,
        pretrained,
        validation={"type": "split", "share": 0.25},
        checkpoint={"every_steps": 3, "in_background": False},
        **changes,
    )


def test_a_run_trains_on_the_rest_and_is_evaluated_on_the_split_again(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    raw = config_of(data, tmp_path, pretrained)
    run_until_power_cut(raw, 7)
    run(Topology(), raw)
    found, unknown = audit_run(str(tmp_path))
    assert unknown == ""
    assert found.is_exact
    (use,) = found.uses_per_row or ()
    assert (use.num_rows, use.least, use.most) == (36, 2, 2)  # two epochs of 48 rows but a quarter
    notes: list[str] = []
    measured = evaluate_checkpoint(str(tmp_path), [], Topology(), on_note=notes.append)
    assert not any("have trained the model" in note for note in notes)
    assert measured["accuracy"] == logged(tmp_path, "validation/accuracy")[9]
    given = ["validation.type=labelled", f"validation.path={data / 'test.jsonl'}"]
    assert evaluate_checkpoint(str(tmp_path), given, Topology()) == evaluate_checkpoint(
        str(tmp_path), given[1:], Topology()
    )
    other = evaluate_checkpoint(str(tmp_path), ["validation.split_seed=1"], Topology(), on_note=notes.append)
    assert any("rows that are measured here may have trained the model" in note for note in notes)
    assert other["loss"] != measured["loss"]
    changed = raw | {"validation": {"type": "split", "share": 0.5}}
    with pytest.raises(ConfigError, match=r"validation\.share was 0\.25 and is now 0\.5"):
        run(Topology(), changed)


def test_a_check_tells_both_sides(
    data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config_of(data, tmp_path / "run", pretrained)))
    assert main(["config", "check", str(path), "validation={type: split, num_folds: 4, fold: 1}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "data        36 of 48 rows train (fold 1 of 4, split_seed 0, by label)" in lines
    assert (
        "validation  12 of 48 rows of the training data validate (fold 1 of 4, split_seed 0, by label)"
        in lines
    )


def test_a_label_seen_only_in_a_validation_file_is_an_error_before_training(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "the cat", "label": "cat"}\n{"text": "the cow", "label": "cow"}\n')
    raw = fine_tuning(
        data, tmp_path / "run", pretrained, validation={"type": "labelled", "path": str(held_out)}
    )
    config: RunConfig = parse(RunConfig, raw)
    with pytest.raises(DataError) as raised:
        read_inputs(config)
    assert str(raised.value).startswith(
        f"validation.path: {held_out}:2: label 'cow' is not one of the 3 that the model was trained on"
    )


def test_token_shards_are_not_split(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds out whole documents"):
        parse(RunConfig, pretraining(data, tmp_path, validation={"type": "split", "share": 0.1}))


def test_another_file_is_read_by_the_columns_of_the_training_data(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        renamed = [{"text": "none", "label": "x", "body": row["text"], "topic": row["label"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    own = {"type": "labelled", "path": str(tmp_path / "train.jsonl"), "text": "body", "label": "topic"}
    run(Topology(), config_of(data, tmp_path / "run", pretrained) | {"data": own})
    path = f"validation.path={tmp_path / 'test.jsonl'}"
    for overrides in ([path], ["validation.type=labelled", path]):
        found = evaluate_checkpoint(str(tmp_path / "run"), overrides, Topology())
        plain = [
            f"validation.path={data / 'test.jsonl'}",
            "validation.text=text",
            "validation.label=label",
        ]
        assert found == evaluate_checkpoint(str(tmp_path / "run"), plain, Topology())
