"""Soups of weights and ensembles of fine-tuned classifiers, measured beside their members."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, run

from distft.checkpoint.average import AveragedCheckpoint
from distft.checkpoint.formats.detect import open_source
from distft.cli.main import main
from distft.errors import ConfigError
from distft.run import ensemble
from distft.run.ensemble import evaluate_ensemble
from distft.run.pretrained import evaluate_checkpoint
from distft.run.soup import greedy_soup
from distft.topology import Topology

SHORT = {"max_steps": 4, "log_every_steps": 4}


@pytest.fixture(scope="module")
def classifiers(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two of one model, and one whose learning rate ruins it."""
    runs = []
    for seed, lr in ((0, 0.01), (1, 0.02), (2, 3.0)):
        run_dir = tmp_path_factory.mktemp(f"classifier_{seed}")
        optim = {"peak_lr": lr, "schedule": {"type": "constant", "warmup_steps": 1}}
        run(
            Topology(),
            fine_tuning(data, run_dir, pretrained, trainable=["*"], seed=seed, optim=optim, train=SHORT),
        )
        runs.append(str(run_dir))
    return runs


@pytest.fixture(scope="module")
def folds(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    runs = []
    for fold in range(3):
        run_dir = tmp_path_factory.mktemp(f"fold_{fold}")
        split = {"type": "split", "num_folds": 3, "fold": fold}
        run(
            Topology(), fine_tuning(data, run_dir, pretrained, trainable=["*"], validation=split, train=SHORT)
        )
        runs.append(str(run_dir))
    return runs


def predictions(paths: Sequence[str], rows: Path, output: Path, *options: str) -> list[dict[str, Any]]:
    others = [word for path in paths[1:] for word in ("--with", path)]
    assert main(["predict", paths[0], str(rows), "-o", str(output), *others, *options]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def labels_of(rows: Path) -> list[str]:
    return [json.loads(line)["label"] for line in rows.read_text().splitlines()]


def test_evaluate_and_predict_agree_and_scikit_learn_with_both(
    data: Path, classifiers: list[str], tmp_path: Path
) -> None:
    report = evaluate_ensemble(classifiers, [], Topology())
    truth = labels_of(data / "test.jsonl")
    names = sorted(set(truth))
    for combine, metrics in report.ensembles.items():
        output = tmp_path / f"{combine}.jsonl"
        found = predictions(classifiers, data / "test.jsonl", output, "--combine", combine)
        predicted = [row["label"] for row in found]
        assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
        assert metrics["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
        if combine != "vote":
            rows = [[row["probabilities"][name] for name in names] for row in found]
            assert metrics["loss"] == pytest.approx(log_loss(truth, rows, labels=names))
    assert set(report.ensembles) == {"mean", "vote", "weights"}
    for path, (shown, of_member) in zip(classifiers, report.members, strict=True):
        assert shown.startswith(path)
        assert of_member == pytest.approx(evaluate_checkpoint(path, [], Topology()))
    assert report.weights is not None
    assert sum(report.weights) == pytest.approx(1)
    least = min(metrics["loss"] for _, metrics in report.members)
    assert report.ensembles["weights"]["loss"] <= min(least, report.ensembles["mean"]["loss"]) + 1e-9


def test_weights_are_found_on_the_runs_own_rows_if_others_are_measured(
    data: Path, classifiers: list[str]
) -> None:
    other = ["validation.type=labelled", f"validation.path={data / 'train.jsonl'}"]
    own, found = (evaluate_ensemble(classifiers[:2], given, Topology()) for given in ([], other))
    assert found.weights == own.weights
    assert found.members[0][1] != own.members[0][1]
    assert found.notes == ["the weights were found on the members' own validation data"]


def _loss(topology: Topology, *paths: str) -> float:
    return evaluate_ensemble(paths, [], topology).ensembles["mean"]["loss"]


@pytest.mark.ranks
def test_an_ensemble_measures_the_same_on_several_ranks(classifiers: list[str]) -> None:
    alone = _loss(Topology(), *classifiers[:2])
    assert run_ranks(_loss, 3, *classifiers[:2]) == pytest.approx([alone] * 3)


def test_folds_are_measured_out_of_fold(data: Path, folds: list[str], tmp_path: Path) -> None:
    report = evaluate_ensemble(folds, [], Topology())
    assert list(report.ensembles) == ["out of fold"]
    own = [metrics["accuracy"] for _, metrics in report.members]
    assert report.ensembles["out of fold"]["accuracy"] == pytest.approx(sum(own) / 3)  # of 16 rows each
    assert own == [evaluate_checkpoint(path, [], Topology())["accuracy"] for path in folds]
    test = ["validation.type=labelled", f"validation.path={data / 'test.jsonl'}"]
    together = evaluate_ensemble(folds, test, Topology())
    assert list(together.ensembles) == ["mean", "vote"]
    assert together.weights is None
    assert "each fold's rows are new to one member alone" in together.notes[0]
    found = predictions(folds, data / "test.jsonl", tmp_path / "out.jsonl")
    hits = [row["label"] == label for row, label in zip(found, labels_of(data / "test.jsonl"), strict=True)]
    assert together.ensembles["mean"]["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_all_members_whose_model_cannot_do_what_is_asked_are_named_before_the_work(
    data: Path, classifiers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble, "evaluate_model", lambda *_, **__: pytest.fail("a member is measured"))
    with pytest.raises(ConfigError) as error:
        evaluate_ensemble(classifiers, ["objective.r_drop=1.0"], Topology())
    lines = str(error.value).splitlines()
    assert len(lines) == len(classifiers)
    for line, path in zip(lines, classifiers, strict=True):
        assert line.startswith(path)
        assert "objective.r_drop=1 with model.dropout=0" in line
    rows, output = str(data / "test.jsonl"), str(tmp_path / "p.jsonl")
    arguments = ["predict", classifiers[0], rows, "-o", output, "--set", "objective.r_drop=1.0"]
    assert main(arguments) == 2
    assert not list(tmp_path.iterdir())


def test_members_that_hold_out_other_rows_are_refused(
    folds: list[str], classifiers: list[str], pretrained: Path
) -> None:
    with pytest.raises(ConfigError, match="may have trained another"):
        evaluate_ensemble([folds[0], classifiers[0]], [], Topology())
    with pytest.raises(ConfigError, match="may have trained another"):
        evaluate_ensemble(folds, ["validation.fold=0"], Topology())
    with pytest.raises(ConfigError, match="The members are folds"):
        greedy_soup(folds[:2])
    with pytest.raises(ConfigError, match=r"is named 2 times, so that it would count as often"):
        evaluate_ensemble([classifiers[0], *classifiers[:2]], [], Topology())
    with pytest.raises(ConfigError, match=r"objective\.type=causal_lm, and an ensemble is of classifiers"):
        evaluate_ensemble([classifiers[0], str(pretrained)], [], Topology())


def test_members_of_other_labels_are_refused(
    data: Path, pretrained: Path, classifiers: list[str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "train.jsonl").read_text().replace('"bird"}', '"fish"}'))
    raw = fine_tuning(
        data, tmp_path / "run", pretrained, data={"type": "labelled", "path": str(rows)}, train=SHORT
    )
    run(Topology(), {**raw, "validation": None})
    with pytest.raises(ConfigError, match=r"has other labels than .* it has 'fish' it lacks 'bird'"):
        evaluate_ensemble([classifiers[0], str(tmp_path / "run")], [], Topology())


def test_a_greedy_soup_keeps_what_does_not_worsen_it(classifiers: list[str], tmp_path: Path) -> None:
    soup = greedy_soup(classifiers, "loss")
    own = {path: evaluate_checkpoint(path, [], Topology())["loss"] for path in classifiers}
    assert [one.value for one in soup.ingredients] == pytest.approx(sorted(own.values()))
    assert not soup.ingredients[-1].is_kept  # the ruined one
    kept, value = [], float("inf")
    for path in sorted(own, key=own.__getitem__):  # by hand, each average written and evaluated
        out = tmp_path / str(len(kept)) / Path(path).name
        candidate = [*kept, path]
        if kept:
            assert main(["checkpoint", "average", *candidate, "-o", str(out)]) == 0
        loss = evaluate_checkpoint(str(out) if kept else path, [], Topology())["loss"]
        if loss <= value:
            kept, value = candidate, loss
    assert [one.path.rsplit("/checkpoints")[0] for one in soup.ingredients if one.is_kept] == kept
    assert soup.value == pytest.approx(value)


def test_the_command_writes_the_soup_and_prints_every_figure(
    classifiers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soup"
    arguments = ["checkpoint", "average", *classifiers[:2], "--greedy", "--metric", "loss", "-o", str(out)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["loss", "with", "soup"]
    assert lines[1].endswith("kept")
    assert lines[3].split()[0] == "soup"
    assert evaluate_checkpoint(str(out), [], Topology())["loss"] == pytest.approx(
        float(lines[3].split()[1]), rel=1e-5
    )
    assert isinstance(open_source(str(out), weights_only=True).manifest.written_by, dict)
    for wrong, message in (
        (["--metric", "loss"], "are for --greedy"),
        (["--greedy", "--weight", "1", "--weight", "2"], "--weight is not"),
        (["--greedy", "--metric", "los"], "los is no metric of the validation data"),
    ):
        arguments = ["checkpoint", "average", *classifiers[:2], "-o", str(tmp_path / "no"), *wrong]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_one_checkpoint_may_be_all_that_is_kept(classifiers: list[str]) -> None:
    soup = greedy_soup([classifiers[0], classifiers[2]], "loss")
    assert not isinstance(soup.source, AveragedCheckpoint)
    assert soup.summary.endswith("alone")


def test_the_table_has_a_line_for_each_member_and_way(
    classifiers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", classifiers[0], "--with", classifiers[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["loss", "accuracy", "macro_f1", "weight"]
    assert [line.split()[0] for line in lines[3:]] == ["mean", "vote", "weights"]
    assert main(["evaluate", classifiers[0], "--with", classifiers[1], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"members", "weights", "ensembles"}


def test_a_way_to_combine_needs_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for wrong, message in (
        ("vote", "name the others by --with"),
        ("sum", "must be one of mean, vote, weights"),
    ):
        (tmp_path / "manifest.json").touch()
        arguments = ["predict", str(tmp_path), "rows.jsonl", "-o", "out.jsonl", "--combine", wrong]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
