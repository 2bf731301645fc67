"""`distft checkpoint`, as a user calls it; every format is written and read by ourselves here."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_scenarios import Training
from hypothesis import given
from hypothesis import strategies as st
from tool_calls import FROZEN, cli, path_of

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.reshard import contiguous_layout
from distft.checkpoint.target import UNFINISHED
from distft.collectives import SingleProcess
from distft.errors import StorageError
from distft.topology import Topology


@given(
    numels=st.lists(st.integers(0, 40), max_size=12),
    world_size=st.integers(1, 9) | st.sampled_from([64, 1000, 4096]),
)
def test_a_layout_gives_each_element_to_one_rank_and_all_ranks_alike(
    numels: list[int], world_size: int
) -> None:
    named = {f"p{i}": numel for i, numel in enumerate(numels)}
    layout = contiguous_layout(named, world_size)
    seen = [(n, e) for held in layout for n, (start, stop) in held.items() for e in range(start, stop)]
    assert seen == [(name, e) for name, numel in named.items() for e in range(numel)]
    counts = [sum(stop - start for start, stop in held.values()) for held in layout]
    assert len(layout) == world_size
    assert max(counts) - min(counts) <= 1
    assert all(start < stop for held in layout for n, (start, stop) in held.items() if named[n])
    assert {name for held in layout for name in held} == set(named)


@pytest.mark.parametrize("ranks", [1, 3, 40])
def test_a_reshard_has_every_element_and_says_what_it_would_do(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    assert cli("plan", path_of(saved), "--ranks", ranks, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    before = {p: p.read_bytes() for p in path_of(saved).rglob("*")}
    assert cli("reshard", path_of(saved), tmp_path / "out", "--ranks", ranks) == 0
    assert {p: p.read_bytes() for p in path_of(saved).rglob("*")} == before
    written = Checkpoint.open(str(tmp_path / "out"))
    assert len(written.manifest.files) == ranks == len(planned["files"])
    for file, plan in zip(written.manifest.files, planned["files"], strict=True):
        assert {name: list(held) for name, held in file.intervals.items()} == plan["intervals"]
        assert 0 <= file.num_bytes - plan["num_bytes"] < 10_000  # a header
    assert written.faults() == []
    for (name, state), values in saved.whole_state().items():
        assert torch.equal(written.read(name, state, 0, values.numel()), values), (name, state)
    shutil.rmtree(tmp_path / "out" / "nothing", ignore_errors=True)
    assert cli("diff", path_of(saved), tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        *(file.name for file in written.manifest.files),
    }


def test_training_goes_on_from_a_reshard_as_from_the_original(saved: Training, tmp_path: Path) -> None:
    cli("reshard", path_of(saved), tmp_path / "out", "--ranks", 5)
    runs = [
        Training(FROZEN, Topology(), SingleProcess(), Checkpoint.open(str(path))).run(6)
        for path in (path_of(saved), tmp_path / "out")
    ]
    assert runs[0] == runs[1]


def test_inspect_tells_step_layout_and_parameters(
    saved: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("inspect", path_of(saved), "--json", "--statistics") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["step"]) == ("distft", 3)
    assert found["num_parameters"] == sum(map(prod, saved.shapes.values()))
    assert {n: tuple(p["shape"]) for n, p in found["parameters"].items()} == saved.shapes
    embed = found["parameters"]["embed.weight"]
    assert (embed["trainable"], list(embed["states"])) == (False, ["weight"])
    weight = saved.whole_state()["blocks.0.mlp.up.weight", "weight"]
    told = found["parameters"]["blocks.0.mlp.up.weight"]["states"]["weight"]
    assert told["mean"] == pytest.approx(float(weight.double().mean()))
    assert told["std"] == pytest.approx(float(weight.double().std(correction=0)))
    assert (told["smallest"], told["largest"]) == (float(weight.min()), float(weight.max()))
    assert cli("inspect", path_of(saved)) == 0
    table = capsys.readouterr().out
    assert "blocks.0.mlp.up.weight" in table
    assert "../frozen_00000002/rank_00000.safetensors" in table


def test_verify_names_the_damaged_tensor(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("verify", path_of(saved)) == 0
    assert "whole" in capsys.readouterr().out
    shutil.copytree(path_of(saved).parent, tmp_path / "copy")
    file = tmp_path / "copy" / "step_00000003" / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 16  # in the last moment of the last trainable parameter
    file.write_bytes(data)
    assert cli("verify", tmp_path / "copy", "--json") == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert len(faults) == 2
    assert "rank_00000.safetensors is damaged" in faults[0]
    assert faults[1] == "exp_avg_sq of norm.weight is not what was saved."
    assert cli("reshard", tmp_path / "copy", tmp_path / "out") == 2
    assert "exp_avg_sq of norm.weight" in capsys.readouterr().err
    for to in ("huggingface", "deepspeed", "universal"):
        assert cli("convert", tmp_path / "copy", tmp_path / "out", "--to", to) == 2
        assert "exp_avg_sq of norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    file.unlink()
    assert cli("verify", tmp_path / "copy", "--json") == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert fault.endswith("rank_00000.safetensors is missing.")


def test_diff_tells_what_moved_and_by_how_much(saved: Training, capsys: pytest.CaptureFixture[str]) -> None:
    older = path_of(saved).parent / "step_00000002"
    assert cli("diff", older, path_of(saved), "--json", "--state", "weight") == 1
    found = {d["parameter"]: d for d in json.loads(capsys.readouterr().out)}
    for name in saved.shapes:
        numel = prod(saved.shapes[name])
        a, b = (Checkpoint.open(str(p)).read(name, "weight", 0, numel) for p in (older, path_of(saved)))
        assert found[name]["kind"] == ("differs" if name in saved.trainable else "identical"), name
        assert found[name]["max_abs"] == pytest.approx(float((a - b).abs().max()))
        assert found[name]["num_differing"] == int((a != b).sum())
    largest = max(d["relative"] for d in found.values())
    for factor, code in ((1.01, 0), (0.99, 1)):
        tolerance = ["--tolerance", largest * factor, "--state", "weight"]
        assert cli("diff", older, path_of(saved), *tolerance) == code
    capsys.readouterr()
    assert cli("diff", path_of(saved), path_of(saved)) == 0
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
    saved: Training,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    to: str,
    options: tuple[str, ...],
    states: set[str],
) -> None:
    assert cli("convert", path_of(saved), tmp_path / "out", "--to", to, *options) == 0
    assert not (tmp_path / "out" / UNFINISHED).exists()
    assert open_source(str(tmp_path / "out")).format == to
    arguments = [option for state in sorted(states) for option in ("--state", state)]
    assert cli("diff", path_of(saved), tmp_path / "out", *arguments) == 0
    assert "states are identical" in capsys.readouterr().out
    assert cli("verify", tmp_path / "out") == 0
    assert cli("inspect", tmp_path / "out", "--json") == 0
    back = tmp_path / "back"
    assert cli("convert", tmp_path / "out", back, "--to", "distft") == 0
    assert cli("diff", path_of(saved), back, *arguments) == 0


def test_an_average_is_the_weighted_mean(saved: Training, tmp_path: Path) -> None:
    older = path_of(saved).parent / "step_00000002"
    output = tmp_path / "mean"
    assert cli("average", older, path_of(saved), "-o", output, "--weight", 1, "--weight", 3) == 0
    mean = Checkpoint.open(str(output))
    a, b = Checkpoint.open(str(older)), Checkpoint.open(str(path_of(saved)))
    for name, shape in saved.shapes.items():
        numel = prod(shape)
        expected = (a.read(name, "weight", 0, numel) + 3 * b.read(name, "weight", 0, numel)) / 4
        assert torch.allclose(mean.read(name, "weight", 0, numel), expected, atol=1e-7), name
        assert not mean.has(name, "exp_avg")
    assert mean.faults() == []


def test_prune_keeps_what_the_rest_needs(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(path_of(saved).parent, tmp_path / "checkpoints")
    assert cli("prune", tmp_path, "--keep-last", 1, "--dry-run") == 0
    assert ": step 2 would go; step 3 stays." in capsys.readouterr().out
    assert cli("prune", tmp_path, "--keep-last", 1) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "frozen_00000002",
        "step_00000003",
    ]
    assert cli("verify", tmp_path) == 0
    assert cli("prune", tmp_path / "checkpoints" / "step_00000003", "--keep-last", 1) == 2
    assert "is a single commit" in capsys.readouterr().err


def test_a_target_that_is_taken_is_left_alone(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, path_of(saved), path_of(saved) / "below"):
        before = sorted(target.rglob("*"))
        for to in ("distft", "huggingface", "deepspeed", "universal"):
            assert cli("convert", path_of(saved), target, "--to", to) == 2
        assert sorted(target.rglob("*")) == before
    assert "is not empty" in capsys.readouterr().err
    assert cli("convert", path_of(saved), tmp_path / "new", "--to", "gguf") == 2
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
def test_a_setting_that_the_format_has_no_use_for_is_refused(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, option: str
) -> None:
    value = {"--dtype": "bf16", "--architecture": "llama"}.get(option, "2")
    assert cli("convert", path_of(saved), tmp_path / "out", "--to", to, option, value) == 2
    told = capsys.readouterr().err
    assert f"{to} has no {option}: leave that out" in told
    assert "_" not in told
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_not_there_is_told_with_those_that_are(
    saved: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = Path(path_of(saved))
    assert cli("inspect", commit.parent / "step_99999999") == 2
    assert commit.name in capsys.readouterr().err


def test_what_one_checkpoint_lacks_of_every_parameter_is_told_in_one_line(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", path_of(saved), tmp_path / "hf", "--to", "huggingface") == 0
    capsys.readouterr()
    assert cli("diff", path_of(saved), tmp_path / "hf") == 1
    told = capsys.readouterr().out.splitlines()
    parameters = Checkpoint.open(str(path_of(saved))).manifest.parameters
    count = sum(record.trainable for record in parameters.values())
    assert [line for line in told if "is not in B" in line] == [
        f"{state} of all {count} parameters that have it is not in B" for state in ("exp_avg", "exp_avg_sq")
    ]


@pytest.mark.parametrize("to", ["distft", "universal", "deepspeed", "huggingface"])
def test_an_interrupted_conversion_does_not_count_and_can_be_run_again(
    saved: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    from distft.storage import local

    calls = {"left": 2}
    commit = local.LocalWriter.commit

    def interrupted(writer: Any) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise StorageError("the power is gone")
        commit(writer)

    monkeypatch.setattr(local.LocalWriter, "commit", interrupted)
    assert cli("convert", path_of(saved), tmp_path / "out", "--to", to) == 1
    monkeypatch.undo()
    assert (tmp_path / "out" / UNFINISHED).exists()
    assert cli("convert", path_of(saved), tmp_path / "out", "--to", to) == 0
    assert not (tmp_path / "out" / UNFINISHED).exists()
    assert cli("diff", path_of(saved), tmp_path / "out", "--state", "weight") == 0
