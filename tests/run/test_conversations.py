"""Fine-tuning on conversations, and answers of the result, against transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import CHATML, CHATML_MARKED, THINKING
from support.rank_pool import run_ranks
from support.small_runs import WORDS, logged, make_text_data, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import find_checkpoint
from distft.cli.main import main
from distft.config import parse
from distft.errors import ConfigError, DataError
from distft.run.chat_prompts import ChatPrompt
from distft.run.config import RunConfig
from distft.run.generate import GenerationOptions, generate_answers
from distft.run.inputs import read_inputs
from distft.run.pretrained import open_model
from distft.topology import Topology

MODEL = {"max_seq_len": 128, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24}
NUM_ROWS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run, its export, and conversations."""
    folder = tmp_path_factory.mktemp("chats") / "data"
    make_text_data(folder, symbols=("<|im_start|>", "<|im_end|>"))
    raw = pretraining(folder, folder / "pretrained", model=MODEL, train={"max_steps": 2})
    run(Topology(), {**raw, "optim": {"peak_lr": 0.05, "schedule": {"type": "constant"}}})
    convert = ["checkpoint", "convert", str(folder / "pretrained"), str(folder / "hf"), "--to", "huggingface"]
    assert main(convert) == 0
    source = random.Random(3)

    def words() -> str:
        return " ".join(source.choice(WORDS) for _ in range(source.randrange(1, 4)))

    with (folder / "chats.jsonl").open("w") as file:
        for number in range(NUM_ROWS):
            messages = [{"role": "system", "content": words()}] if number % 3 == 0 else []
            for _ in range(source.randrange(1, 3)):
                messages += [{"role": role, "content": words()} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "chatml.jinja").write_text(CHATML)
    return folder


def tuning(folder: Path, run_dir: Path, data: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Of the pretrained run, on all conversations in one step unless `changes` say otherwise."""
    raw = {
        **pretraining(folder, run_dir, validation=None),
        "init_from": str(folder / "pretrained"),
        "chat": {"template": str(folder / "chatml.jinja")},
        "data": {"type": "conversations", "path": str(folder / "chats.jsonl"), **(data or {})},
        "batch": {"global_batch_size": NUM_ROWS, "micro_batch_size": 4, "seq_len": 128},
        "train": {"max_steps": 1, "log_every_steps": 1},
        "optim": {"peak_lr": 0.01, "schedule": {"type": "constant"}},
        **changes,
    }
    del raw["model"]
    return raw


def theirs(folder: Path, turns: str) -> float:
    """Mean loss of the tokens that the assistant writes, by transformers and marks in the template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "hf"))
    model = AutoModelForCausalLM.from_pretrained(str(folder / "hf"))
    loss, num_tokens = 0.0, 0
    for line in (folder / "chats.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        rows = tokenizer.apply_chat_template(
            messages, chat_template=CHATML_MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = rows["assistant_masks"]
        if turns == "last":
            prompt = tokenizer.apply_chat_template(
                messages[:-1], chat_template=CHATML, add_generation_prompt=True
            )
            mask = [0] * len(prompt["input_ids"]) + mask[len(prompt["input_ids"]) :]
        ids = torch.tensor([rows["input_ids"]])
        labels = torch.where(torch.tensor([mask]) == 1, ids, -100)
        with torch.no_grad():
            found = model(ids, labels=labels).loss
        loss += float(found) * sum(mask)
        num_tokens += sum(mask)
    return loss / num_tokens


@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_loss_is_that_of_transformers_packed_or_not(folder: Path, tmp_path: Path, turns: str) -> None:
    expected = theirs(folder, turns)
    run(Topology(), tuning(folder, tmp_path / "rows", {"turns": turns}))
    assert logged(tmp_path / "rows")[1] == pytest.approx(expected, abs=1e-5)
    packed = tuning(folder, tmp_path / "packed", {"turns": turns, "packing": True})
    num_rows = read_inputs(parse(RunConfig, packed)).train.num_sequences
    assert 1 < num_rows < NUM_ROWS
    packed["batch"] = {"global_batch_size": num_rows, "micro_batch_size": 2, "seq_len": 128}
    run(Topology(), packed)
    assert logged(tmp_path / "packed")[1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.ranks
def test_a_run_resumes_on_other_ranks(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "train": {"max_steps": 6, "log_every_steps": 1},
        "batch": {"global_batch_size": 3, "micro_batch_size": 2, "seq_len": 128},
        "checkpoint": {"every_steps": 3},
    }
    whole, cut = (tuning(folder, tmp_path / name, {"packing": True}, **options) for name in ("whole", "cut"))
    run(Topology(), whole)
    run_until_power_cut(cut, 3)
    run_ranks(run, 2, {**cut, "engine": {"type": "zero", "zero_stage": 2}}, timeout_s=120)
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=2e-6)


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    run(Topology(), tuning(folder, run_dir))
    return run_dir


def test_the_template_goes_with_the_checkpoint_and_its_export(
    folder: Path, tuned: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    assert not open_model(str(folder / "pretrained")).tokenizer.chat_templates
    assert open_model(str(tuned)).tokenizer.chat_templates == {"default": CHATML}
    assert main(["checkpoint", "convert", str(tuned), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert AutoTokenizer.from_pretrained(str(tmp_path / "hf")).chat_template == CHATML
    assert open_model(str(tmp_path / "hf")).tokenizer.chat_templates == {"default": CHATML}
    assert main(["checkpoint", "convert", str(tmp_path / "hf"), str(tmp_path / "own"), "--to", "distft"]) == 0
    assert open_model(str(tmp_path / "own")).tokenizer.chat_templates == {"default": CHATML}
    found = find_checkpoint(str(tuned))
    assert found.find_damage() == []


def test_answers_are_those_of_transformers(tuned: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["checkpoint", "convert", str(tuned), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chats = [[{"role": "user", "content": text}] for text in ("the cat", "sang", "it saw a moon")]
    options = GenerationOptions(max_new_tokens=12, temperature=0)
    found = generate_answers(
        str(tuned), [ChatPrompt(messages=m) for m in chats], options, on_note=lambda _: None
    )
    for messages, text in zip(chats, found, strict=True):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        whole = model.generate(
            **ids, max_new_tokens=12, do_sample=False, eos_token_id=[tokenizer.eos_token_id, end]
        )
        new = whole[0, ids["input_ids"].shape[1] :].tolist()
        new = new[: next((i for i, token in enumerate(new) if token in {tokenizer.eos_token_id, end}), 12)]
        assert text == tokenizer.decode(new)


def test_generate_answers_messages_and_streams(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(tuned), "--max-new-tokens", "9", "--seed", "4"]
    asked = ["-m", "system:the moon", "-m", "user:the cat: sat"]

    def printed(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main([*command, *arguments]) == code
        shown = capsys.readouterr()
        return shown.out if code == 0 else shown.err

    text = printed(*asked)
    assert text.strip()
    assert printed(*asked, "--stream") == text
    messages = [
        {"role": "system", "content": "the moon"},
        {"role": "user", "content": "the cat: sat"},
    ]
    assert json.loads(printed(*asked, "--json")) == {"messages": messages, "text": text[:-1]}
    for name, rows in (("a.json", [messages]), ("b.json", [{"messages": messages, "tools": []}])):
        (tmp_path / name).write_text(json.dumps(rows[0]))
        assert printed("--messages", str(tmp_path / name)) == text
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages})
    )
    two = printed("--messages", str(tmp_path / "c.jsonl"))
    assert two.count("\n---\n") == 1
    assert printed("--messages", str(tmp_path / "c.jsonl"), "--stream") == two
    stop = text[2:4]
    assert printed(*asked, "--stop", stop) == text[: text.index(stop)] + "\n"
    assert printed(*asked, "--stop", stop, "--stream") == text[: text.index(stop)] + "\n"
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    assert printed(*asked, "--chat-template", str(tmp_path / "other.jinja")) != text

    assert "-m 'usr:x' must be a role and a text" in printed("-m", "usr:x", code=2)
    assert "give one of the two" in printed("-m", "user:x", "-p", "y", code=2)
    assert "leave one out" in printed("-m", "user:x", "--stream", "--json", code=2)
    assert "the last message is the assistant's" in printed("-m", "assistant:x", code=2)
    (tmp_path / "bad.json").write_text('[{"role": "bot", "content": 1}, 7]')
    wrong = printed("--messages", str(tmp_path / "bad.json"), code=2)
    assert 'bad.json: message 1 has role "bot"' in wrong
    assert "bad.json: message 2 is 7" in wrong
    (tmp_path / "refusing.jinja").write_text("{{ raise_exception('never') }}")
    refused = printed(*asked, "--chat-template", str(tmp_path / "refusing.jinja"), code=2)
    assert "-m: the chat template refuses it: never" in refused


def test_a_template_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    def wrong(template: str, **chat: Any) -> str:
        (tmp_path / "a.jinja").write_text(template)
        raw = tuning(folder, tmp_path / "run", chat={"template": str(tmp_path / "a.jinja"), **chat})
        with pytest.raises((ConfigError, DataError)) as caught:
            read_inputs(parse(RunConfig, raw))
        return str(caught.value)

    assert f"chat.template={tmp_path}/a.jinja: the chat template is not Jinja" in wrong("{% for %}")
    problem = wrong("{{ raise_exception('no') }}")
    assert problem.startswith(
        f"data.path: {folder}/chats.jsonl:1: the chat template refuses it: no. (Lines 2, 3"
    )
    assert "turns: last" in wrong(THINKING)
    assert "no token is the assistant's" in wrong("x{% generation %}{% endgeneration %}")
    raw = tuning(folder, tmp_path / "run", chat={"template": str(tmp_path / "nowhere.jinja")})
    with pytest.raises(DataError, match=r"nowhere\.jinja cannot be read"):
        read_inputs(parse(RunConfig, raw))
    with pytest.raises(ConfigError, match="messages is what every template gets"):
        parse(RunConfig, tuning(folder, tmp_path / "run", chat={"variables": {"messages": []}}))


def test_the_date_is_a_setting(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(CHATML.replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1))
    chat = {"template": str(tmp_path / "a.jinja"), "date": "2026-02-03"}
    inputs = read_inputs(parse(RunConfig, tuning(folder, tmp_path / "run", {"shuffle": False}, chat=chat)))
    assert inputs.tokenizer is not None
    expected = inputs.tokenizer.encode_with_offsets("03 Feb 2026<|im_start|>system\n")[0].tolist()
    assert inputs.train.batch(0, 1).input_ids[0].tolist()[: len(expected)] == expected
