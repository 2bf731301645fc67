"""Messages of `distft checkpoint` on damage, missing files and wrong options."""

import json
from pathlib import Path

import pytest
from support.checkpoint_cli import SavedTraining, cli
from support.damage import flip_bit, rank_file
from support.small_runs import pretraining

from distft.checkpoint.formats.detect import open_source
from distft.cli.main import main


def test_inspect_refuses_a_path_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("inspect", tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert cli("inspect", tmp_path) == 2
    assert "It contains notes.txt" in capsys.readouterr().err


def test_diff_refuses_states_that_neither_checkpoint_has(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("diff", saved.path, saved.path, "--state", "wieght") == 2
    assert "--state must be one of weight, exp_avg, exp_avg_sq, ema, not wieght." in capsys.readouterr().err
    assert cli("convert", saved.path, tmp_path / "hf", "--to", "huggingface") == 0
    assert cli("diff", tmp_path / "hf", tmp_path / "hf", "--state", "exp_avg") == 2
    assert "Nothing was compared: neither " in capsys.readouterr().err


@pytest.mark.parametrize("flipped_byte", [4, None])  # in a piece's text; None: the file is removed
def test_a_checkpoint_with_a_damaged_tokenizer_is_refused(
    copied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flipped_byte: int | None
) -> None:
    assert cli("verify", copied_run) == 0
    tokenizer = copied_run / "checkpoints" / "step_00000004" / "tokenizer.model"
    if flipped_byte is None:
        tokenizer.unlink()
        damage = f"{tokenizer} is missing; another checkpoint of the run has it"
    else:
        flip_bit(tokenizer, flipped_byte)
        damage = f"{tokenizer} is damaged: its fingerprint is "
    capsys.readouterr()
    assert cli("verify", copied_run) == 1
    assert damage in capsys.readouterr().out
    for to in ("distft", "huggingface"):
        assert cli("convert", copied_run, tmp_path / "out", "--to", to) == 2
        assert damage in capsys.readouterr().err
    assert main(["generate", str(copied_run)]) == 2
    message = capsys.readouterr().err
    assert damage in message
    assert "tokenizer train" not in message
    raw = pretraining(tmp_path, tmp_path / "new", init_from=str(copied_run))
    (tmp_path / "new.yaml").write_text(json.dumps(raw))
    assert main(["config", "check", str(tmp_path / "new.yaml")]) == 2
    assert f"init_from: {damage}" in capsys.readouterr().err
    assert cli("verify", tokenizer.parent.parent / "step_00000002") == 0


@pytest.mark.parametrize("between", ["universal", "deepspeed"])
def test_converting_a_foreign_format_to_deepspeed_needs_no_dtype(
    saved: SavedTraining, tmp_path: Path, between: str
) -> None:
    assert cli("convert", saved.path, tmp_path / "between", "--to", between) == 0
    assert cli("convert", tmp_path / "between", tmp_path / "out", "--to", "deepspeed", "--ranks", 2) == 0
    assert cli("diff", saved.path, tmp_path / "out") == 0
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
def test_verify_exits_with_1_for_damage_in_any_format(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, damaged: str
) -> None:
    assert cli("convert", saved.path, tmp_path / "out", "--to", to) == 0
    assert cli("verify", tmp_path / "out") == 0
    file = tmp_path / "out" / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capsys.readouterr()
    assert cli("verify", tmp_path / "out", "--json") == 1
    damage = json.loads(capsys.readouterr().out)["faults"]
    assert damage
    assert str(tmp_path / "out") in damage[0]
    if file.name in {"manifest.json", "config.json"}:  # the format is detected by it
        return
    file.unlink()
    assert cli("verify", tmp_path / "out") == 1
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_verify_exits_with_2_for_an_unsupported_format(
    saved: SavedTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", saved.path, tmp_path / "ds", "--to", "deepspeed") == 0
    (tmp_path / "ds" / "global_step3" / "layer_00-model_states.pt").touch()
    assert cli("convert", saved.path, tmp_path / "newer", "--to", "distft") == 0
    (tmp_path / "newer" / "manifest.json").write_text(json.dumps({"format_version": 3}))
    capsys.readouterr()
    for path, message in {
        "nowhere": "does not exist",
        "ds": "which distft does not read",
        "newer": "upgrade distft",
        "newer/manifest.json": "is a file: name the directory",
    }.items():
        assert cli("verify", tmp_path / path) == 2, path
        assert message in capsys.readouterr().err


def test_inspect_marks_missing_files(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = copied_run / "checkpoints" / "step_00000004"
    assert cli("inspect", copied_run) == 0
    assert "MISSING" not in capsys.readouterr().out
    file = rank_file(commit)
    file.unlink()
    assert cli("inspect", copied_run) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "MISSING" in line]
    assert file.name in line
    (commit / "tokenizer.model").unlink()
    assert cli("inspect", copied_run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"][0]["is_missing"]
    assert found["tokenizer"]["is_missing"]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_step_without_a_manifest_is_reported_as_uncommitted(
    copied_run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    step = copied_run / "checkpoints" / "step_00000004"
    (step / "manifest.json").unlink()
    for path in (copied_run, step.parent):
        assert cli(command, path) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith(f"note: {step} is uncommitted: it has no manifest.json.\n")
        assert "step_00000002" in printed.out
    assert cli(command, step) == 2
    message = capsys.readouterr().err
    assert f"{step} is uncommitted: its manifest.json is missing" in message
    assert "step_00000002" in message
    (step.parent / "step_00000002" / "manifest.json").unlink()
    assert cli(command, copied_run) == 2
    assert f"{step} is uncommitted: it has no manifest.json." in capsys.readouterr().err


def test_average_prints_its_sources_and_keeps_the_only_configuration(
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
    for wrong, problem in (
        ((copied_run, f"{copied_run}/"), "is named 2 times: name it once, and weigh it by --weight"),
        ((*sources, "--weight", "inf", "--weight", 1), "must add up to a number above 0"),
        ((*sources, "--weight", "nan", "--weight", 1), "must add up to a number above 0"),
    ):
        assert cli("average", *wrong, "-o", tmp_path / "none") == 2
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("--to", "hf", "distft, deepspeed, universal, huggingface, peft"),
        ("--dtype", "int8", "fp32, bf16, fp16"),
        (
            "--architecture",
            "gpt3",
            "llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, gpt2, bert, roberta, distilbert, "
            "modernbert, t5",
        ),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(
    saved: SavedTraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    choices: str,
) -> None:
    more = () if option == "--to" else ("--to", "huggingface")
    assert cli("convert", saved.path, tmp_path / "out", *more, option, value) == 2
    assert f"{option} must be one of {choices}, not {value}." in capsys.readouterr().err


def test_a_target_within_the_source_run_is_refused(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commits = copied_run / "checkpoints"
    older, newest = commits / "step_00000002", commits / "step_00000004"
    before = sorted(copied_run.rglob("*"))
    for source, target, refused_for in (
        (copied_run, copied_run / "sub", copied_run),
        (commits, commits / "sub", commits),
        (newest, commits / "step_00000009", commits),
    ):
        for arguments in (("reshard", source, target), ("average", older, source, "-o", target)):
            assert cli(*arguments) == 2
            message = f"{target} lies in the source {refused_for}, which must not change"
            assert message in capsys.readouterr().err
    assert sorted(copied_run.rglob("*")) == before


def test_prune_uses_singular_and_plural(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for keep in (2, 1):
        assert cli("prune", copied_run, "--keep-last", keep) == 0
        printed.append(capsys.readouterr().out.partition(": ")[2])
    assert printed == ["deleted no step; kept steps 2, 4.\n", "deleted step 2; kept step 4.\n"]
