"""`distft evaluate`, `generate`, `config check` and `checkpoint convert` on a trained run."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from support.small_runs import events, make_text_data, pretraining, run

from distft.cli.main import main
from distft.topology import Topology


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with an evaluation every two."""
    run_dir = tmp_path_factory.mktemp("trained")
    run(Topology(), pretraining(data, run_dir, train={"max_steps": 4}, evaluation={"every_steps": 2}))
    return run_dir


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_checkpoint_without_a_model_configuration_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    for kind in ("deepspeed", "universal"):
        target = str(tmp_path / kind)
        assert main(["checkpoint", "convert", str(trained), target, "--to", kind]) == 0
        capsys.readouterr()
        assert main([verb, target]) == 2
        message = capsys.readouterr().err
        assert f"{target} is a {kind} checkpoint" in message
        assert "name it in init_from of a configuration" in message
    assert main([verb, str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path}/nowhere does not exist." in capsys.readouterr().err


def test_a_wrong_setting_of_an_evaluation_is_reported_with_its_key(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), "validation.path=x"]) == 2
    where, problem = capsys.readouterr().err.splitlines()
    assert where == f"config error: In the configuration of {trained}/checkpoints/step_00000004:"
    types = "labelled or token_labels or completion or conversations or pairs or preferences or images"
    assert problem.startswith(f"validation.path='x' is a setting of type {types}, and")


def test_the_example_in_the_message_about_missing_validation_data_works_in_a_shell(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), "validation=null"]) == 2
    message = capsys.readouterr().err
    assert "has no validation data: name some, such as " in message
    assert "every_steps" not in message
    example = message.partition("such as ")[2].strip().removesuffix(".")
    held_out = str(data / "shards" / "validation")
    arguments = [argument.replace("held_out", held_out) for argument in shlex.split(example)]
    assert main(["evaluate", str(trained), "validation=null", *arguments]) == 0


def test_the_example_in_the_help_works_for_tokens(
    data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["evaluate", "--help"]) == 0
    example = "validation.sources.0.path=shards"
    assert f"'{example}'" in capsys.readouterr().out
    assert main(["evaluate", str(trained), f"{example[:-6]}{data}/shards/validation"]) == 0


def test_a_missing_init_from_is_the_only_reported_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = pretraining(
        data,
        tmp_path / "run",
        init_from=str(tmp_path / "nowhere"),
        data={"type": "labelled", "path": str(data / "train.jsonl")},
        validation=None,
        objective={"type": "classification"},
    )
    (tmp_path / "fine_tune.yaml").write_text(json.dumps(raw))
    assert main(["config", "check", str(tmp_path / "fine_tune.yaml")]) == 2
    assert capsys.readouterr().err == f"checkpoint error: init_from: {tmp_path}/nowhere does not exist.\n"


@pytest.mark.parametrize(("max_steps", "is_beyond"), [(3, True), (4, False)])
def test_a_run_resumed_beyond_max_steps_says_so_in_its_event(
    data: Path, trained: Path, tmp_path: Path, max_steps: int, is_beyond: bool
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    run(Topology(), pretraining(data, tmp_path / "run", train={"max_steps": max_steps}))
    (event,) = [event for event in events(tmp_path / "run") if event["kind"] == "nothing_to_do"]
    assert ("beyond" in event.get("reason", "")) == is_beyond


def test_deepspeed_files_convert_to_huggingface_with_a_run_configuration(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed files do not describe the model. The result equals a direct export."""
    foreign, direct, target = (str(tmp_path / name) for name in ("deepspeed", "direct", "target"))
    to_transformers = ["--to", "huggingface", "--dtype", "fp32"]
    assert main(["checkpoint", "convert", str(trained), foreign, "--to", "deepspeed"]) == 0
    assert main(["checkpoint", "convert", str(trained), direct, *to_transformers]) == 0
    assert main(["checkpoint", "convert", foreign, target, *to_transformers]) == 2
    assert "--run-config" in capsys.readouterr().err
    known = ["--run-config", str(trained / "config.yaml")]
    assert main(["checkpoint", "convert", foreign, target, *to_transformers, *known]) == 0
    assert Path(target, "model.safetensors").read_bytes() == Path(direct, "model.safetensors").read_bytes()
    described, expected = (json.loads(Path(path, "config.json").read_text()) for path in (target, direct))
    ids = {key for key in expected if key.endswith("_token_id")}  # from the tokenizer, which is missing here
    assert {key for key in expected if described[key] != expected[key]} <= ids
    assert main(["checkpoint", "convert", str(trained), str(tmp_path / "x"), *to_transformers, *known]) == 2
    assert "leave --run-config out" in capsys.readouterr().err


def test_transformers_directories_and_converted_checkpoints_evaluate_and_generate_as_the_run(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, imported = str(tmp_path / "exported"), str(tmp_path / "imported")
    assert main(["checkpoint", "convert", str(trained), exported, "--to", "huggingface"]) == 0
    assert main(["checkpoint", "convert", exported, imported, "--to", "distft"]) == 0
    shards = f"validation.sources.0.path={data}/shards/validation"
    found = []
    for model in (str(trained), exported, imported):
        capsys.readouterr()
        assert main(["evaluate", model, shards, "batch.seq_len=24", "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert main(["generate", model, "-p", "the cat", "--temperature", "0", "--max-new-tokens", "9"]) == 0
        found.append((metrics, capsys.readouterr().out))
    for metrics, text in found[1:]:
        assert metrics == pytest.approx(found[0][0], abs=1e-6)
        assert text == found[0][1]


def test_settings_without_effect_on_an_evaluation_are_refused_together(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = ["optim.peak_lr=3", "train.max_steps=9", "evaluation.every_steps=2", "model.d_model=8"]
    assert main(["evaluate", str(trained), *idle, "num_threads=1", "batch.micro_batch_size=99"]) == 2
    message = capsys.readouterr().err
    assert "optim.peak_lr, train.max_steps, evaluation.every_steps, model.d_model have no effect" in message


def test_evaluate_sets_the_threads_and_shows_how_many_rows_it_takes(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    settings = ["num_threads=1", "evaluation.max_sequences=3", "batch.micro_batch_size=99"]
    assert main(["evaluate", str(trained), *settings]) == 0
    assert given == [1]
    assert "evaluating: 3 rows" in capsys.readouterr().err


def test_rows_of_text_for_a_pretraining_run_are_answered_with_the_way_to_shards(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), "validation.path=rows.jsonl"]) == 2
    tokenizer = trained / "checkpoints" / "step_00000004" / "tokenizer.model"
    assert f"`distft tokenize rows.jsonl -t {tokenizer} -o shards`" in capsys.readouterr().err


def test_prompts_come_from_options_and_files_and_end_before_a_stop_text(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("the cat\na dog\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    options = ["--temperature", "0", "--max-new-tokens", "20", "--json"]
    outputs = []
    for given in (
        ["-p", "the cat", "-p", "a dog"],
        *(["--prompts", str(p)] for p in sorted(tmp_path.iterdir())),
    ):
        assert main(["generate", str(trained), *options, *given]) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert outputs[0] == outputs[1] == outputs[2]
    assert [row["prompt"] for row in outputs[0]] == ["the cat", "a dog"]
    new = outputs[0][0]["text"].removeprefix("the cat")
    stop = new[3:6]
    assert main(["generate", str(trained), *options, "-p", "the cat", "--stop", stop]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["text"] == "the cat" + new[: new.index(stop)]


def test_a_text_that_grows_beyond_the_model_goes_on_and_says_so(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["-p", "the cat"] * 16  # eos ends most of them sooner
    assert main(["generate", str(trained), *prompts, "--max-new-tokens", "60", "--json"]) == 0
    output = capsys.readouterr()
    texts = [json.loads(line)["text"] for line in output.out.splitlines()]
    assert max(map(len, texts)) > 40  # a character is a token, and the model takes 24
    assert "beyond model.max_seq_len=24 tokens" in output.err


def test_an_empty_prompt_writes_something_and_tells_what_it_begins_with(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(trained), "--temperature", "0", "--max-new-tokens", "5"]) == 0
    output = capsys.readouterr()
    assert output.out.strip("\n")
    assert "has not learned how a document begins" in output.err
