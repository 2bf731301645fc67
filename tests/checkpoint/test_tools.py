"""`distft checkpoint`, called as a user would; distft both writes and reads every format."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoint_cli import FROZEN, SavedTraining, cli
from support.damage import flip_bit
from support.engine_scenarios import Training

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.reshard import contiguous_layout
from distft.checkpoint.target import UNFINISHED_MARKER
from distft.collectives import SingleProcess
from distft.errors import StorageError
from distft.topology import Topology


@given(
    numels=st.lists(st.integers(0, 40), max_size=12),
    world_size=st.integers(1, 9) | st.sampled_from([64, 1000, 4096]),
)
def test_a_layout_gives_each_element_to_one_rank_and_divides_them_evenly(
    numels: list[int], world_size: int
) -> None:
    named = {f"p{i}": numel for i, numel in enumerate(numels)}
    layout = contiguous_layout(named, world_size)
    flat = [(name, interval) for intervals in layout for name, interval in intervals.items()]
    seen = [(name, e) for name, (start, stop) in flat for e in range(start, stop)]
    assert seen == [(name, e) for name, numel in named.items() for e in range(numel)]
    counts = [sum(stop - start for start, stop in intervals.values()) for intervals in layout]
    assert len(layout) == world_size
    assert max(counts) - min(counts) <= 1
    assert all(start < stop for intervals in layout for n, (start, stop) in intervals.items() if named[n])
    assert {name for intervals in layout for name in intervals} == set(named)


@pytest.mark.parametrize("ranks", [1, 3, 40])
def test_a_reshard_has_every_element_and_matches_its_plan(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    assert cli("plan", saved.path, "--ranks", ranks, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    before = {p: p.read_bytes() for p in saved.path.rglob("*")}
    assert cli("reshard", saved.path, tmp_path / "out", "--ranks", ranks) == 0
    assert {p: p.read_bytes() for p in saved.path.rglob("*")} == before
    written = Checkpoint.open(str(tmp_path / "out"))
    assert len(written.manifest.files) == ranks == len(planned["files"])
    for file, plan in zip(written.manifest.files, planned["files"], strict=True):
        assert {name: list(interval) for name, interval in file.intervals.items()} == plan["intervals"]
        assert 0 <= file.num_bytes - plan["num_bytes"] < 10_000  # a header
    assert written.find_damage() == []
    for (name, state), values in saved.training.whole_state().items():
        assert torch.equal(written.read(name, state, 0, values.numel()), values), (name, state)
    shutil.rmtree(tmp_path / "out" / "nothing", ignore_errors=True)
    assert cli("diff", saved.path, tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        *(file.name for file in written.manifest.files),
    }


def test_training_continues_from_a_reshard_as_from_the_original(saved: SavedTraining, tmp_path: Path) -> None:
    cli("reshard", saved.path, tmp_path / "out", "--ranks", 5)
    runs = [
        Training(FROZEN, Topology(), SingleProcess(), Checkpoint.open(str(path))).run(6)
        for path in (saved.path, tmp_path / "out")
    ]
    assert runs[0] == runs[1]


def test_inspect_shows_step_files_and_parameters(
    saved: SavedTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("inspect", saved.path, "--json", "--statistics") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["step"]) == ("distft", 3)
    assert found["num_parameters"] == sum(map(prod, saved.training.shapes.values()))
    assert {n: tuple(p["shape"]) for n, p in found["parameters"].items()} == saved.training.shapes
    embed = found["parameters"]["embed.weight"]
    assert (embed["trainable"], list(embed["states"])) == (False, ["weight"])
    weight = saved.training.whole_state()["blocks.0.mlp.up.weight", "weight"]
    described = found["parameters"]["blocks.0.mlp.up.weight"]["states"]["weight"]
    assert described["mean"] == pytest.approx(float(weight.double().mean()))
    assert described["std"] == pytest.approx(float(weight.double().std(correction=0)))
    assert (described["smallest"], described["largest"]) == (float(weight.min()), float(weight.max()))
    assert cli("inspect", saved.path) == 0
    table = capsys.readouterr().out
    assert "blocks.0.mlp.up.weight" in table
    assert "../frozen_00000002/rank_00000.safetensors" in table


def test_verify_names_the_damaged_tensor(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("verify", saved.path) == 0
    assert "undamaged" in capsys.readouterr().out
    shutil.copytree(saved.path.parent, tmp_path / "copy")
    file = tmp_path / "copy" / "step_00000003" / "rank_00000.safetensors"
    flip_bit(file, -2)  # in the last fragment of the file
    assert cli("verify", tmp_path / "copy", "--json") == 1
    damage = json.loads(capsys.readouterr().out)["faults"]
    assert len(damage) == 2
    assert "rank_00000.safetensors is damaged" in damage[0]
    assert damage[1] == "ema of blocks.1.mlp.down.weight differs from what was saved."
    assert cli("reshard", tmp_path / "copy", tmp_path / "out") == 2
    assert "ema of blocks.1.mlp.down.weight" in capsys.readouterr().err
    for to in ("huggingface", "deepspeed", "universal"):
        assert cli("convert", tmp_path / "copy", tmp_path / "out", "--to", to) == 2
        assert "ema of blocks.1.mlp.down.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    file.unlink()
    assert cli("verify", tmp_path / "copy", "--json") == 1
    (damage,) = json.loads(capsys.readouterr().out)["faults"]
    assert damage.endswith("rank_00000.safetensors is missing.")


def test_diff_shows_which_parameters_differ_and_by_how_much(
    saved: SavedTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    older = saved.path.parent / "step_00000002"
    assert cli("diff", older, saved.path, "--json", "--state", "weight") == 1
    found = {d["parameter"]: d for d in json.loads(capsys.readouterr().out)}
    for name in saved.training.shapes:
        numel = prod(saved.training.shapes[name])
        a, b = (Checkpoint.open(str(p)).read(name, "weight", 0, numel) for p in (older, saved.path))
        assert found[name]["kind"] == ("differs" if name in saved.training.trainable else "identical"), name
        assert found[name]["max_abs"] == pytest.approx(float((a - b).abs().max()))
        assert found[name]["num_differing"] == int((a != b).sum())
    largest = max(d["relative"] for d in found.values())
    for factor, code in ((1.01, 0), (0.99, 1)):
        tolerance = ["--tolerance", largest * factor, "--state", "weight"]
        assert cli("diff", older, saved.path, *tolerance) == code
    capsys.readouterr()
    assert cli("diff", saved.path, saved.path) == 0
    assert "states are identical" in capsys.readouterr().out


def _conversions() -> list[tuple[str, tuple[str, ...], set[str]]]:
    everything = {"weight", "exp_avg", "exp_avg_sq"}
    return [
        ("distft", ("--ranks", "2"), everything),
        ("universal", (), everything),
        *(("deepspeed", ("--zero-stage", str(s), "--ranks", "3"), everything) for s in range(4)),
        ("huggingface", (), {"weight"}),
    ]


@pytest.mark.parametrize(("to", "options", "states"), _conversions())
def test_every_format_keeps_every_element(
    saved: SavedTraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    to: str,
    options: tuple[str, ...],
    states: set[str],
) -> None:
    assert cli("convert", saved.path, tmp_path / "out", "--to", to, *options) == 0
    assert not (tmp_path / "out" / UNFINISHED_MARKER).exists()
    assert open_source(str(tmp_path / "out")).format == to
    arguments = [option for state in sorted(states) for option in ("--state", state)]
    assert cli("diff", saved.path, tmp_path / "out", *arguments) == 0
    assert "states are identical" in capsys.readouterr().out
    assert cli("verify", tmp_path / "out") == 0
    assert cli("inspect", tmp_path / "out", "--json") == 0
    back = tmp_path / "back"
    assert cli("convert", tmp_path / "out", back, "--to", "distft") == 0
    assert cli("diff", saved.path, back, *arguments) == 0


def test_an_average_is_the_weighted_mean(saved: SavedTraining, tmp_path: Path) -> None:
    older = saved.path.parent / "step_00000002"
    output = tmp_path / "mean"
    assert cli("average", older, saved.path, "-o", output, "--weight", 1, "--weight", 3) == 0
    mean = Checkpoint.open(str(output))
    a, b = Checkpoint.open(str(older)), Checkpoint.open(str(saved.path))
    for name, shape in saved.training.shapes.items():
        numel = prod(shape)
        expected = (a.read(name, "weight", 0, numel) + 3 * b.read(name, "weight", 0, numel)) / 4
        assert torch.allclose(mean.read(name, "weight", 0, numel), expected, atol=1e-7), name
        assert not mean.has(name, "exp_avg")
    assert mean.find_damage() == []


def test_prune_keeps_frozen_weights_that_a_remaining_commit_needs(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved.path.parent, tmp_path / "checkpoints")
    assert cli("prune", tmp_path, "--keep-last", 1, "--dry-run") == 0
    assert ": would delete step 2; would keep step 3." in capsys.readouterr().out
    assert cli("prune", tmp_path, "--keep-last", 1) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "frozen_00000002",
        "step_00000003",
    ]
    assert cli("verify", tmp_path) == 0
    assert cli("prune", tmp_path / "checkpoints" / "step_00000003", "--keep-last", 1) == 2
    assert "is a single checkpoint" in capsys.readouterr().err


def test_a_target_with_content_is_refused_and_unchanged(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, saved.path, saved.path / "below"):
        before = sorted(target.rglob("*"))
        for to in ("distft", "huggingface", "deepspeed", "universal"):
            assert cli("convert", saved.path, target, "--to", to) == 2
        assert sorted(target.rglob("*")) == before
    assert "is not empty" in capsys.readouterr().err
    assert cli("convert", saved.path, tmp_path / "new", "--to", "gguf") == 2
    assert "to" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("to", "option"),
    [
        ("huggingface", "--zero-stage"),
        ("universal", "--ranks"),
        ("distft", "--dtype"),
        ("deepspeed", "--architecture"),
    ],
)
def test_an_option_that_the_format_does_not_accept_is_refused(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, option: str
) -> None:
    value = {"--dtype": "bf16", "--architecture": "llama"}.get(option, "2")
    assert cli("convert", saved.path, tmp_path / "out", "--to", to, option, value) == 2
    message = capsys.readouterr().err
    assert f"{to} has no {option}: leave that out" in message
    assert "_" not in message
    assert not (tmp_path / "out").exists()


def test_a_missing_step_is_refused_with_the_existing_ones(
    saved: SavedTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = saved.path
    assert cli("inspect", commit.parent / "step_99999999") == 2
    assert commit.name in capsys.readouterr().err


def test_diff_reports_a_state_that_one_checkpoint_lacks_throughout_in_one_line(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", saved.path, tmp_path / "hf", "--to", "huggingface") == 0
    capsys.readouterr()
    assert cli("diff", saved.path, tmp_path / "hf") == 1
    lines = capsys.readouterr().out.splitlines()
    parameters = Checkpoint.open(str(saved.path)).manifest.parameters
    count = sum(record.trainable for record in parameters.values())
    assert [line for line in lines if "is not in B" in line] == [
        f"{state} of all {count} parameters that have it is not in B"
        for state in ("exp_avg", "exp_avg_sq", "ema")
    ]


@pytest.mark.parametrize("to", ["distft", "universal", "deepspeed", "huggingface"])
def test_an_interrupted_conversion_stays_unfinished_and_can_be_rerun(
    saved: SavedTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    from distft.storage import local

    calls = {"left": 2}
    publish = local.LocalWriter.publish

    def interrupted(writer: Any) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise StorageError("the disk is gone")
        publish(writer)

    monkeypatch.setattr(local.LocalWriter, "publish", interrupted)
    assert cli("convert", saved.path, tmp_path / "out", "--to", to) == 1
    monkeypatch.undo()
    assert (tmp_path / "out" / UNFINISHED_MARKER).exists()
    assert cli("convert", saved.path, tmp_path / "out", "--to", to) == 0
    assert not (tmp_path / "out" / UNFINISHED_MARKER).exists()
    assert cli("diff", saved.path, tmp_path / "out", "--state", "weight") == 0
