"""Small runs that have ended, and a search."""

import json
from pathlib import Path

import pytest
from support.small_runs import fine_tuning, make_text_data, pretraining, run

from distft.topology import Topology


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `first` and `deeper/second`, whose rates differ."""
    folder = tmp_path_factory.mktemp("report")
    data = make_text_data(folder / "data")
    for name, rate in (("first", 0.01), ("deeper/second", 0.02)):
        optim = {"peak_lr": rate, "schedule": {"type": "cosine", "warmup_steps": 2}}
        run(
            Topology(),
            pretraining(
                data, folder / "runs" / name, optim=optim, evaluation={"every_steps": 6}, num_threads=1
            ),
        )
    return folder / "runs"


@pytest.fixture(scope="package")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `lm`, which has generated texts, and `classifier`, which has made mistakes."""
    folder = tmp_path_factory.mktemp("findings")
    data = make_text_data(folder / "data")
    evaluation = {"every_steps": 6, "samples": {"prompts": ["the cat"], "max_new_tokens": 8}}
    run(Topology(), pretraining(data, folder / "lm", evaluation=evaluation, num_threads=1))
    classifier = fine_tuning(
        data, folder / "classifier", folder / "lm", evaluation={"every_steps": 4}, num_threads=1
    )
    run(Topology(), classifier)
    return folder


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A search of 16 trials, of which two have failed, whose metric depends on the rate alone."""
    trials = []
    for number in range(16):
        rate, width, has_failed = 10 ** (-4 + number / 5), number * 7 % 3, number % 8 == 7
        value = None if has_failed else 0.9 - (number - 8) ** 2 / 200
        trial = {
            "number": number,
            "state": "failed" if has_failed else "completed",
            "reason": "the loss is not finite" if has_failed else "",
            "values": {"optim.peak_lr": rate, "model.num_layers": width, "optim.type": "adamw"},
            "metric": value,
            "spread": None if has_failed else 0.01,
            "metrics": {} if has_failed else {"validation/loss": 1.0},
            "step": 100,
            "seconds": 12.5,
            "run_dirs": [f"trials/{number}"],
            "history": [] if has_failed else [[50, 0.5], [75, None], [100, value]],
            "unknown": 1,
        }
        trials.append(trial)
    space = {"optim.peak_lr": {}, "model.num_layers": {}, "optim.type": {}}
    folder = tmp_path / "search"
    folder.mkdir()
    content = {"metric": "validation/accuracy", "direction": "max", "space": space, "trials": trials}
    (folder / "search.json").write_text(json.dumps(content))
    return folder
