"""A search that cannot be: each mistake is one clear error, before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distft.config import load_yaml
from distft.errors import ConfigError
from distft.run.config import load_run_config, parse_run_config
from distft.search.search_file import fixed_points, load_search, require_own_directory
from distft.search.trial_runs import members, run_dir_of, run_settings, write_private

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "trec_split.yaml"
RATE = {"optim.peak_lr": [1.0e-3, 3.0e-3]}


def write(folder: Path, search: Any, **changes: Any) -> Path:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({**load_yaml(BASE), **changes, "search": search}))
    return path


def refused(folder: Path, search: Any, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_search(write(folder, search, **changes), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"space": {}, "num_trials": 2}, "space is empty"),
        ({"space": {"optim.peak_lr": []}, "num_trials": 2}, "1 item or more"),
        ({"space": {"optim.peak_lrr": [1.0]}, "num_trials": 2}, "Did you mean 'peak_lr'?"),
        ({"space": {"optim.peak_lr": [1.0, -1.0]}, "num_trials": 2}, "optim.peak_lr=-1.0"),
        (
            {"space": {"optim.peak_lr": {"type": "uniform", "low": 2, "high": 1}}, "num_trials": 2},
            "low=2 must be less than high=1",
        ),
        (
            {"space": {"optim.peak_lr": {"type": "log_uniform", "low": 0, "high": 1}}, "num_trials": 2},
            "must be more than 0",
        ),
        ({"space": {"run_dir": ["a", "b"]}, "num_trials": 2}, "run_dir is what the search sets"),
        ({"space": {"checkpoint.directory": ["a"]}, "num_trials": 2}, "checkpoint.directory is what"),
        ({"space": {"trackers": [[]]}, "num_trials": 2}, "trackers is what the search sets"),
        ({"space": {"search.ranks": [1]}, "num_trials": 2}, "search.ranks is of the search itself"),
        ({"space": {"optim": [{}], **RATE}, "num_trials": 2}, "is a part of optim"),
        ({"space": RATE}, "num_trials is missing"),
        (
            {"space": RATE, "num_trials": 2, "repeat_best": {"count": 1, "seeds": [0]}},
            "repeat_best.seeds: each trial trains with these seeds anyway",
        ),
        ({"space": RATE, "sampler": {"type": "grid"}, "num_trials": 3}, "the grid has 2 combinations"),
        (
            {
                "space": {"optim.peak_lr": {"type": "uniform", "low": 1e-4, "high": 1e-3}},
                "sampler": {"type": "grid"},
            },
            "a grid needs a list",
        ),
        ({"space": RATE, "num_trials": 2, "sampler": {"type": "optun"}}, "Did you mean 'optuna'?"),
        ({"space": RATE, "num_trials": 2, "seeds": [1, 1]}, "a seed twice"),
        ({"space": {**RATE, "ranks": [0, 1]}, "num_trials": 2}, "ranks=0 is not a number of ranks"),
        (
            {"space": RATE, "num_trials": 2, "folds": 3, "scheduler": {"type": "asha", "grace_steps": 1}},
            "a trial has 3 runs",
        ),
        (
            {
                "space": RATE,
                "num_trials": 2,
                "sampler": {"type": "optuna"},
                "scheduler": {"type": "population", "interval_steps": 200},
            },
            "needs all its trials at the start",
        ),
        (
            {"space": RATE, "num_trials": 2, "scheduler": {"type": "population", "interval_steps": 300}},
            "no multiple of evaluation.every_steps=200",
        ),
        (
            {
                "space": {"seed": [1, 2]},
                "num_trials": 2,
                "scheduler": {"type": "population", "interval_steps": 200},
            },
            "seed cannot change in the middle of a run",
        ),
        (
            {"space": RATE, "num_trials": 2, "scheduler": {"type": "population", "interval_steps": 200}},
            "must know the last step: set train.max_steps",
        ),
        (
            {"space": RATE, "num_trials": 2, "scheduler": {"type": "hyperband"}},
            "plans each trial's length in steps: set train.max_steps",
        ),
        ({"space": RATE, "num_trials": 2, "constraints": [{"metric": "loss"}]}, "set max, min or both"),
    ],
)
def test_a_search_that_cannot_be_is_refused_with_its_reason(
    tmp_path: Path, search: dict[str, Any], words: str
) -> None:
    assert words in refused(tmp_path, search)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = refused(tmp_path, {"space": RATE, "num_trial": 3}, "train.num_epoch=1", "optim.peak_lr=-1")
    assert "num_trials" in text
    assert "num_epochs" in text
    assert "peak_lr=-1" in text


def test_a_metric_of_validation_needs_validation_and_a_scheduler_evaluations(tmp_path: Path) -> None:
    search = {"space": RATE, "num_trials": 2}
    without = {"validation": None, "evaluation": {}}
    assert "validation is not set" in refused(tmp_path, search, **without)
    named = {**search, "metric": "validation/accuracy"}
    assert "search.metric=validation/accuracy is of validation data" in refused(tmp_path, named, **without)
    asha = {**search, "scheduler": {"type": "asha", "grace_steps": 10}}
    assert "set evaluation.every_steps" in refused(tmp_path, asha, evaluation={})
    assert load_search(write(tmp_path, {**search, "metric": "loss"}, **without)).search.metric == "loss"


def test_train_and_tune_each_name_the_other_for_the_wrong_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"space": RATE, "num_trials": 2})
    with pytest.raises(ConfigError, match="distft tune"):
        load_run_config(path)
    with pytest.raises(ConfigError, match=r"`distft train` trains one run"):
        load_search(BASE)


def test_overrides_reach_the_search_and_its_runs(tmp_path: Path) -> None:
    path = write(tmp_path, {"space": RATE, "num_trials": 2})
    found = load_search(path, ["search.num_trials=5", "train.num_epochs=2"])
    assert found.search.num_trials == 5
    assert found.config.train.num_epochs == 2


def test_the_runs_of_a_search_have_names_of_their_own_in_a_service_and_are_one_group(tmp_path: Path) -> None:
    trackers = [
        {"type": "wandb", "name": "mine", "mode": "offline"},
        {"type": "tensorboard"},
        {"type": "mlflow", "group": "own"},
    ]
    path = write(
        tmp_path, {"space": RATE, "num_trials": 1, "seeds": [3]}, trackers=trackers, run_dir="runs/found"
    )
    file = load_search(path)
    run_dir = run_dir_of(Path("runs/found"), 7, "seed_3")
    raw = run_settings(
        file.base, file.config, file.search, values={}, member=members(file.search)[0], run_dir=run_dir
    )
    wandb, tensorboard, mlflow = parse_run_config(raw).trackers
    assert (wandb.name, wandb.group) == ("mine 00007/seed_3", "found")
    assert tensorboard.type == "tensorboard"
    assert (mlflow.name, mlflow.group) == (None, "own")


def test_a_grid_is_shuffled_for_a_scheduler_that_judges_a_trial_by_those_before(tmp_path: Path) -> None:
    rates = [0.001 * (1 + number) for number in range(12)]
    search = {"space": {"optim.peak_lr": rates}, "sampler": {"type": "grid"}}
    plain = fixed_points(load_search(write(tmp_path, search)).search)
    assert plain == [{"optim.peak_lr": rate} for rate in rates]
    judged = {**search, "scheduler": {"type": "asha", "grace_steps": 1}}
    path = write(tmp_path, judged, evaluation={"every_steps": 1})
    shuffled = fixed_points(load_search(path).search)
    assert shuffled is not None
    assert shuffled != plain
    assert sorted(point["optim.peak_lr"] for point in shuffled) == rates
    assert fixed_points(load_search(path).search) == shuffled


def test_each_run_of_a_search_is_a_configuration_with_a_directory_of_its_own(tmp_path: Path) -> None:
    space = {**RATE, "model.dropout": {"type": "uniform", "low": 0.0, "high": 0.5}}
    path = write(tmp_path, {"space": space, "num_trials": 4, "seeds": [3, 4], "folds": 2})
    file = load_search(path)
    points = fixed_points(file.search)
    assert points is not None
    directories = set()
    for number, values in enumerate(points):
        for member in members(file.search):
            run_dir = run_dir_of(tmp_path, number, member.name)
            raw = run_settings(
                file.base, file.config, file.search, values=values, member=member, run_dir=run_dir
            )
            config: Any = parse_run_config(raw)
            directories.add(config.run_dir)
            assert config.optim.peak_lr == values["optim.peak_lr"]
            assert config.model.dropout == values["model.dropout"]
            assert (config.seed, config.validation.fold) == (member.seed, member.fold)
            assert config.num_threads == 1
    assert len(directories) == 4 * 2 * 2


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/events.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="is that of a run"):
        require_own_directory(tmp_path / "run")
    require_own_directory(tmp_path / "new")


def test_files_with_settings_are_for_their_owner_alone(tmp_path: Path) -> None:
    write_private(tmp_path / "a/trial.yaml", "x: 1\n")
    write_private(tmp_path / "a/trial.yaml", "x: 2\n")
    assert (tmp_path / "a/trial.yaml").read_text() == "x: 2\n"
    assert (tmp_path / "a/trial.yaml").stat().st_mode & 0o077 == 0
