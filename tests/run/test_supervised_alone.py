"""A mixture with unlabelled data also trains on its labelled data alone, first, and says which won."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import events, logged, pretraining, run, run_until_power_cut

from distft.config import parse
from distft.errors import ConfigError, DataError
from distft.run.check import describe_run
from distft.run.config import RunConfig
from distft.topology import Topology

NUM_STEPS = 4
KEY = "validation/topic/accuracy"


def semi_supervised(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    def labelled(name: str, **more: Any) -> dict[str, Any]:
        return {"data": {"type": "labelled", "path": str(data / f"{name}.jsonl"), **more}}

    return pretraining(
        data,
        run_dir,
        tokenizer=str(data / "tokenizer.model"),
        data={
            "type": "streams",
            "streams": {
                "topic": {**labelled("train", max_rows=12), "share": 1},
                "texts": {**labelled("train", label=None), "share": 3},
            },
        },
        validation={"type": "streams", "streams": {"topic": labelled("test")}},
        objective={
            "type": "mixture",
            "parts": {
                "topic": {"objective": {"type": "classification", "pooling": "mean"}},
                "texts": {
                    "objective": {
                        "type": "pseudo_label",
                        "head": "topic",
                        "threshold": 0.4,
                        "per_class": True,
                    }
                },
            },
        },
        **{
            "train": {"max_steps": NUM_STEPS, "log_every_steps": 1},
            "checkpoint": {"every_steps": 2},
            **changes,
        },
    )


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was never cut off."""
    run_dir = tmp_path_factory.mktemp("straight")
    run(Topology(), semi_supervised(data, run_dir))
    return run_dir


def comparison(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in events(run_dir) if event["kind"] == "compared_with_supervised"]


def test_both_metrics_are_logged_with_the_winner(straight: Path) -> None:
    (event,) = comparison(straight)
    ours, alone = logged(straight, KEY)[NUM_STEPS], logged(straight / "supervised_alone", KEY)[NUM_STEPS]
    assert (event["with_unlabelled"], event["supervised_alone"]) == (ours, alone)
    won = "with unlabelled data" if ours > alone else "supervised alone" if ours < alone else "neither"
    assert (event["part"], event["metric"], event["won"]) == ("topic", "accuracy", won)


def test_the_run_alone_takes_the_same_labelled_rows_in_each_step(data: Path, tmp_path: Path) -> None:
    """A part whose weight is 0 learns nothing, so that both runs are the same."""
    raw = semi_supervised(data, tmp_path / "run")
    raw["objective"]["parts"]["texts"]["weight"] = 0.0
    run(Topology(), raw)
    losses = logged(tmp_path / "run", "topic/loss"), logged(tmp_path / "run" / "supervised_alone")
    assert len(losses[0]) == NUM_STEPS
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert comparison(tmp_path / "run")[0]["won"] == "neither"


def test_a_run_that_was_cut_off_goes_on_where_it_was(data: Path, straight: Path, tmp_path: Path) -> None:
    raw = semi_supervised(data, tmp_path)
    run_until_power_cut(raw, 3)  # in the run alone
    assert not (tmp_path / "metrics.jsonl").exists()
    run(Topology(), raw)
    assert "resume" in [event["kind"] for event in events(tmp_path / "supervised_alone")]
    run(Topology(), raw)  # nothing is left to do, and it still tells
    assert logged(tmp_path) == pytest.approx(logged(straight), abs=1e-6)
    assert [{**event, "time": 0, "start_id": 0} for event in comparison(tmp_path)] == [
        {**event, "time": 0, "start_id": 0} for event in comparison(straight) * 2
    ]


def test_running_means_are_those_of_a_run_that_was_not_cut_off(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    raw = semi_supervised(data, tmp_path, compare_with_supervised=False)
    run_until_power_cut(raw, 3)
    run(Topology(), raw)
    manifests = [
        json.loads((run_dir / "checkpoints" / "step_00000004" / "manifest.json").read_text())
        for run_dir in (tmp_path, straight)
    ]
    found, expected = (manifest["progress"]["objective_state"] for manifest in manifests)
    assert found.keys() == {"texts/confident_share"}
    assert found["texts/confident_share"] == pytest.approx(expected["texts/confident_share"], abs=1e-6)
    assert sum(found["texts/confident_share"]) > 0


RESUMED: dict[str, dict[str, Any]] = {
    "mean_teacher": {"type": "mean_teacher", "loss": "kl"},
    "pseudo_label": {"type": "pseudo_label", "threshold": 0.34, "per_class": True, "align": True},
}
ON_TWO_RANKS = {"type": "zero", "zero_stage": 2}


def _cut_off_after_3_steps(topology: Topology, raw: dict[str, Any]) -> None:
    run_until_power_cut(raw, 3, topology)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("objective", "alternate", "world_sizes"),
    [
        ("mean_teacher", False, (1, 2)),
        ("mean_teacher", True, (2, 1)),
        ("pseudo_label", True, (1, 2)),
    ],
)
def test_a_resume_at_another_world_size_goes_on_exactly(
    data: Path, tmp_path: Path, objective: str, alternate: bool, world_sizes: tuple[int, int]
) -> None:
    """With a teacher whose average and its decay, and running means, come from the checkpoint."""

    def config(name: str, num_ranks: int) -> dict[str, Any]:
        raw = semi_supervised(data, tmp_path / name, compare_with_supervised=False, num_threads=1)
        raw["validation"] = None
        raw["data"]["alternate"] = alternate
        raw["model"]["dropout"] = 0.2
        raw["batch"]["global_batch_size"] = 7
        raw["optim"]["ema_decay"] = [[1, 0.2], [6, 0.9]]
        part = {"objective": {**RESUMED[objective], "head": "topic"}, "weight": [[0, 1.0], [5, 3.0]]}
        raw["objective"]["parts"]["texts"] = part
        return {**raw, "train": {"max_steps": 6, "log_every_steps": 1}} | (
            {"engine": ON_TWO_RANKS} if num_ranks == 2 else {}
        )

    run(Topology(), config("straight", 1))
    first, second = world_sizes
    if first == 1:
        _cut_off_after_3_steps(Topology(), config("resumed", 1))
        run_ranks(run, second, config("resumed", 2), timeout_s=200)
    else:
        run_ranks(_cut_off_after_3_steps, first, config("resumed", 2), timeout_s=200)
        run(Topology(), config("resumed", 1))
    assert [event["step"] for event in events(tmp_path / "resumed") if event["kind"] == "resume"] == [2]
    for name in ("loss", "grad_norm", "texts/loss"):
        straight, resumed = logged(tmp_path / "straight", name), logged(tmp_path / "resumed", name)
        # A part that is not in the first step after the resume has no last loss in that step.
        assert len(resumed) == 6 or name == "texts/loss"
        assert resumed == pytest.approx({step: straight[step] for step in resumed}, abs=2e-6), name


def test_the_comparison_may_be_left_out(data: Path, tmp_path: Path) -> None:
    raw = semi_supervised(data, tmp_path / "run", compare_with_supervised=False, train={"max_steps": 2})
    run(Topology(), raw)
    assert not (tmp_path / "run" / "supervised_alone").exists()
    assert comparison(tmp_path / "run") == []


def test_a_check_tells_of_the_run_that_comes_first(data: Path, tmp_path: Path) -> None:
    config: RunConfig = parse(RunConfig, semi_supervised(data, tmp_path / "run"))
    assert any(line.startswith("first       4 steps of 2 rows") for line in describe_run(config, 1).lines)


def test_a_run_alone_that_cannot_be_is_told_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    raw = semi_supervised(data, tmp_path / "run")
    raw["data"]["alternate"] = True  # a quarter of the steps is one, fewer than of the warm-up
    with pytest.raises(ConfigError, match=r"supervised alone.*compare_with_supervised=false.*warmup_steps=2"):
        describe_run(parse(RunConfig, raw), 1)


def test_what_a_comparison_and_a_teacher_need_is_told_at_once(data: Path, tmp_path: Path) -> None:
    raw = semi_supervised(data, tmp_path / "run")
    raw["validation"] = None
    raw["objective"]["parts"]["texts"]["objective"] = {"type": "mean_teacher", "head": "topic"}
    with pytest.raises(ConfigError) as raised:
        parse(RunConfig, raw)
    assert "set validation, or compare_with_supervised=false" in str(raised.value)
    assert "set optim.ema_decay" in str(raised.value)


def test_shares_of_another_number_of_classes_are_refused(data: Path, tmp_path: Path) -> None:
    raw = semi_supervised(data, tmp_path / "run")
    raw["objective"]["parts"]["texts"]["objective"] |= {"align": True, "class_shares": [0.5, 0.5]}
    with pytest.raises(ConfigError, match=r"parts\.texts: class_shares has 2 numbers.* has 3 classes"):
        run(Topology(), raw)


@pytest.mark.parametrize("objective", ["pseudo_label", "entropy"])
def test_labelled_rows_are_refused_as_unlabelled_ones(data: Path, tmp_path: Path, objective: str) -> None:
    raw = semi_supervised(data, tmp_path / "run")
    raw["data"]["streams"]["texts"]["data"]["label"] = "label"
    raw["objective"]["parts"]["texts"]["objective"] = {"type": objective, "head": "topic"}
    with pytest.raises(ConfigError, match=r"parts\.texts: .*takes unlabelled rows.*label=null"):
        run(Topology(), raw)


@pytest.mark.parametrize(("before", "after"), [("cat", "cow"), ("cat", "dog")])
def test_labels_that_changed_since_the_head_was_made_are_told(
    data: Path, tmp_path: Path, before: str, after: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "train.jsonl").read_text())
    raw = pretraining(
        data,
        tmp_path / "run",
        tokenizer=str(data / "tokenizer.model"),
        data={"type": "labelled", "path": str(rows)},
        validation=None,
        objective={"type": "classification", "pooling": "mean"},
        checkpoint={"every_steps": 1},
    )
    run_until_power_cut(raw, 1)
    text = rows.read_text().replace(f'"label": "{before}"', f'"label": "{after}"')
    rows.write_text(text)
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if f'"label": "{after}"' in row)
    told = (
        f"rows.jsonl:{line}: label 'cow' is not one of the 3" if after == "cow" else "'bird', 'dog'. Restore"
    )
    with pytest.raises(DataError if after == "cow" else ConfigError) as raised:
        run(Topology(), raw)
    assert told in str(raised.value)


def test_the_run_alone_has_as_many_labelled_rows_where_a_step_has_no_whole_number_of_them(
    data: Path, tmp_path: Path
) -> None:
    raw = semi_supervised(data, tmp_path / "run", train={"max_steps": 12, "log_every_steps": 1})
    raw["batch"]["global_batch_size"] = 2  # half a labelled row in each step
    config: RunConfig = parse(RunConfig, raw)
    assert any(line.startswith("first       6 steps of 1 rows") for line in describe_run(config, 1).lines)


def test_the_head_of_an_unlabelled_part_must_learn_from_labels(data: Path, tmp_path: Path) -> None:
    raw = semi_supervised(data, tmp_path / "run", compare_with_supervised=False)
    raw["objective"]["parts"]["topic"]["weight"] = [[NUM_STEPS - 1, 0.0], [2 * NUM_STEPS, 1.0]]
    with pytest.raises(ConfigError, match=r"objective\.parts\.texts: head='topic' .* weight is 0 in all 4"):
        describe_run(parse(RunConfig, raw), 1)
    raw["objective"]["parts"]["topic"]["weight"] = [[0, 0.0], [2 * NUM_STEPS, 1.0]]
    describe_run(parse(RunConfig, raw), 1)
