"""What `distft checkpoint` says of damage, of what is missing, and of what it is not asked well for."""

import json
from pathlib import Path

import pytest
from engine_scenarios import Training
from small_runs import pretraining
from tool_calls import cli, flip, path_of

from distft.checkpoint.formats.detect import open_source
from distft.cli.main import main


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
