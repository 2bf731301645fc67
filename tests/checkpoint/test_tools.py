"""`distft checkpoint`, as a user calls it; every format is written and read by ourselves here."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_scenarios import Scenario, Training, run_alone
from hypothesis import given
from hypothesis import strategies as st
from small_runs import make_text_data, pretraining, run

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.reshard import contiguous_layout
from distft.checkpoint.store import CheckpointStore
from distft.checkpoint.target import UNFINISHED
from distft.cli.main import main
from distft.collectives import SingleProcess
from distft.errors import StorageError
from distft.topology import Topology

FROZEN = Scenario(trainable=("blocks.*", "norm.weight"))


def cli(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Three steps with a frozen part, saved at steps 2 and 3."""
    store = CheckpointStore(str(tmp_path_factory.mktemp("saved") / "checkpoints"), SingleProcess())
    training = run_alone(FROZEN, 2)
    store.save(training.draft())
    training.run(3)
    training.path = store.save(training.draft())  # type: ignore[attr-defined]
    return training


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer, saved at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    raw = pretraining(make_text_data(folder), folder / "run", train={"max_steps": 4})
    run(Topology(), {**raw, "checkpoint": {"every_steps": 2}})
    return folder / "run"


@pytest.fixture
def copied_run(whole_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


def path_of(training: Training) -> Path:
    return Path(training.path)  # type: ignore[attr-defined]


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


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("inspect", tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert cli("inspect", tmp_path) == 2
    assert "It holds notes.txt" in capsys.readouterr().err


def test_states_that_are_not_there_are_not_compared_in_silence(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("diff", path_of(saved), path_of(saved), "--state", "wieght") == 2
    assert "--state wieght is none of weight, exp_avg, exp_avg_sq." in capsys.readouterr().err
    assert cli("convert", path_of(saved), tmp_path / "hf", "--to", "huggingface") == 0
    assert cli("diff", tmp_path / "hf", tmp_path / "hf", "--state", "exp_avg") == 2
    assert "Nothing was compared: neither " in capsys.readouterr().err


@pytest.mark.parametrize("place", [4, None])  # of a flipped byte: in a piece's text; the file is gone
def test_a_damaged_tokenizer_is_a_damaged_checkpoint(
    copied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int | None
) -> None:
    assert cli("verify", copied_run) == 0
    tokenizer = copied_run / "checkpoints" / "step_00000004" / "tokenizer.model"
    if place is None:
        tokenizer.unlink()
        fault = f"{tokenizer} is missing; another commit of the run has it"
    else:
        flip(tokenizer, place)
        fault = f"{tokenizer} is damaged: its fingerprint is "
    capsys.readouterr()
    assert cli("verify", copied_run) == 1
    assert fault in capsys.readouterr().out
    for to in ("distft", "huggingface"):
        assert cli("convert", copied_run, tmp_path / "out", "--to", to) == 2
        assert fault in capsys.readouterr().err
    assert main(["generate", str(copied_run)]) == 2
    told = capsys.readouterr().err
    assert fault in told
    assert "tokenizer train" not in told
    raw = pretraining(tmp_path, tmp_path / "new", init_from=str(copied_run))
    (tmp_path / "new.yaml").write_text(json.dumps(raw))
    assert main(["config", "check", str(tmp_path / "new.yaml")]) == 2
    assert f"init_from: {fault}" in capsys.readouterr().err
    assert cli("verify", tokenizer.parent.parent / "step_00000002") == 0


@pytest.mark.parametrize("between", ["universal", "deepspeed"])
def test_a_foreign_format_needs_no_dtype_to_become_deepspeeds(
    saved: Training, tmp_path: Path, between: str
) -> None:
    assert cli("convert", path_of(saved), tmp_path / "between", "--to", between) == 0
    assert cli("convert", tmp_path / "between", tmp_path / "out", "--to", "deepspeed", "--ranks", 2) == 0
    assert cli("diff", path_of(saved), tmp_path / "out") == 0
    assert open_source(str(tmp_path / "out")).manifest.written_by["param_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("to", "damaged"),
    [
        ("distft", "manifest.json"),
        ("distft", "rank_00000.safetensors"),
        ("universal", "global_step3_universal/zero/norm.weight/fp32.pt"),
        ("universal", "global_step3_universal/zero/optimizer_state.pt"),
        ("deepspeed", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("deepspeed", "global_step3/mp_rank_00_model_states.pt"),
        ("huggingface", "model.safetensors"),
        ("huggingface", "config.json"),
    ],
)
def test_verify_exits_with_1_for_what_is_damaged_in_any_format(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, damaged: str
) -> None:
    assert cli("convert", path_of(saved), tmp_path / "out", "--to", to) == 0
    assert cli("verify", tmp_path / "out") == 0
    file = tmp_path / "out" / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capsys.readouterr()
    assert cli("verify", tmp_path / "out", "--json") == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert faults
    assert str(tmp_path / "out") in faults[0]
    if file.name in {"manifest.json", "config.json"}:  # by which the format is known
        return
    file.unlink()
    assert cli("verify", tmp_path / "out") == 1
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_verify_exits_with_2_for_what_is_not_read_here(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", path_of(saved), tmp_path / "ds", "--to", "deepspeed") == 0
    (tmp_path / "ds" / "global_step3" / "layer_00-model_states.pt").touch()
    assert cli("convert", path_of(saved), tmp_path / "ours", "--to", "distft") == 0
    newer = {"format_version": 2}
    (tmp_path / "ours" / "manifest.json").write_text(json.dumps(newer))
    capsys.readouterr()
    for path, told in {
        "nowhere": "does not exist",
        "ds": "which are not read here",
        "ours": "upgrade distft",
        "ours/manifest.json": "is a file: name the directory",
    }.items():
        assert cli("verify", tmp_path / path) == 2, path
        assert told in capsys.readouterr().err


def test_inspect_marks_the_files_that_are_missing(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = copied_run / "checkpoints" / "step_00000004"
    assert cli("inspect", copied_run) == 0
    assert "MISSING" not in capsys.readouterr().out
    (commit / "rank_00000.safetensors").unlink()
    assert cli("inspect", copied_run) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "MISSING" in line]
    assert "rank_00000.safetensors" in line
    (commit / "tokenizer.model").unlink()
    assert cli("inspect", copied_run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"][0]["is_missing"]
    assert found["tokenizer"]["is_missing"]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_step_without_a_manifest_is_told_to_be_a_draft(
    copied_run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    draft = copied_run / "checkpoints" / "step_00000004"
    (draft / "manifest.json").unlink()
    for path in (copied_run, draft.parent):
        assert cli(command, path) == 0
        said = capsys.readouterr()
        assert said.err.startswith(f"note: {draft} is uncommitted: it has no manifest.json.\n")
        assert "step_00000002" in said.out
    assert cli(command, draft) == 2
    told = capsys.readouterr().err
    assert f"{draft} is a draft: its manifest.json is missing" in told
    assert "step_00000002" in told
    (draft.parent / "step_00000002" / "manifest.json").unlink()
    assert cli(command, copied_run) == 2
    assert f"{draft} is uncommitted: it has no manifest.json." in capsys.readouterr().err


def test_an_average_says_what_it_is_of_and_keeps_the_configuration_that_there_is(
    copied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", copied_run, tmp_path / "hf", "--to", "huggingface") == 0
    capsys.readouterr()
    sources = (copied_run, tmp_path / "hf")
    assert cli("average", *sources, "-o", tmp_path / "mean", "--weight", 1, "--weight", 3) == 0
    commit = copied_run / "checkpoints" / "step_00000004"
    assert capsys.readouterr().out == (
        f"{tmp_path}/mean: average of {commit}, {tmp_path}/hf (weights 0.25, 0.75); "
        f"step and configuration of {commit}, as distft\n"
    )
    assert main(["generate", str(tmp_path / "mean"), "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--to", "hf", "--to hf is none of distft, deepspeed, universal, huggingface."),
        ("--dtype", "int8", "--dtype int8 is none of fp32, bf16, fp16."),
        ("--architecture", "gpt3", "--architecture gpt3 is none of llama, mistral, qwen2, qwen3, gpt2."),
    ],
)
def test_a_choice_that_is_none_is_told_by_its_option(
    saved: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
) -> None:
    more = () if option == "--to" else ("--to", "huggingface")
    assert cli("convert", path_of(saved), tmp_path / "out", *more, option, value) == 2
    assert told in capsys.readouterr().err


def test_a_target_within_the_run_that_is_read_is_refused(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commits = copied_run / "checkpoints"
    newest = commits / "step_00000004"
    before = sorted(copied_run.rglob("*"))
    for source, target, refused_for in (
        (copied_run, copied_run / "sub", copied_run),
        (commits, commits / "sub", commits),
        (newest, commits / "step_00000009", commits),
    ):
        for arguments in (("reshard", source, target), ("average", newest, source, "-o", target)):
            assert cli(*arguments) == 2
            assert f"{target} lies in the source {refused_for}, which stays" in capsys.readouterr().err
    assert sorted(copied_run.rglob("*")) == before


def test_prune_counts_in_words_that_fit(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for keep in (2, 1):
        assert cli("prune", copied_run, "--keep-last", keep) == 0
        said.append(capsys.readouterr().out.partition(": ")[2])
    assert said == ["no step is gone; steps 2, 4 stay.\n", "step 2 is gone; step 4 stays.\n"]
