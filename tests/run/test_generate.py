"""Generation from runs whose documents begin with bos, after eos or with neither, against transformers."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from support.small_runs import pretraining, run

from distft.checkpoint.committed import find_checkpoint
from distft.cli.main import main
from distft.config import parse
from distft.data.corpus import TextCorpus
from distft.prepare import TokenizeConfig, tokenize
from distft.run.config import RunConfig
from distft.run.generate import GenerationOptions, generate_text
from distft.run.inputs import read_inputs
from distft.topology import Topology

LINES = [f"the {a} sat on a {b} and saw it" for a in ("cat", "dog", "bird") for b in ("mat", "tree", "stone")]


@pytest.fixture(scope="module")
def space_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-style tokenizer, which puts a space before each text, and a corpus."""
    folder = tmp_path_factory.mktemp("llama")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 8),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "theirs.model").write_bytes(model.getvalue())
    (folder / "corpus.txt").write_text("\n".join(LINES) + "\n")
    return folder


def trained(folder: Path, name: str, documents: str, **options: Any) -> Path:
    corpus = TextCorpus(paths=(str(folder / "corpus.txt"),), documents="line")
    tokenizer, shards = str(folder / "theirs.model"), str(folder / f"shards {name}")
    tokenize(TokenizeConfig(corpus=corpus, tokenizer=tokenizer, output=shards, num_workers=1, **options))
    data = {"type": "tokens", "sources": [{"path": f"{shards}/train"}], "documents": documents}
    raw = pretraining(folder, folder / name, data=data, validation=None, train={"max_steps": 60})
    run(Topology(), raw)
    return folder / name


@pytest.mark.parametrize(
    ("documents", "options", "start"),
    [
        ("separate", {}, ()),
        ("joined", {}, (2,)),
        ("joined", {"append_eos": False}, ()),
        ("separate", {"prepend_bos": True}, (1,)),
    ],
)
def test_prompts_begin_as_documents_did_and_continue_as_in_transformers(
    space_before: Path, tmp_path: Path, documents: str, options: dict[str, Any], start: tuple[int, ...]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir = trained(space_before, f"{documents} {options}", documents, **options)
    record = find_checkpoint(str(run_dir)).manifest.tokenizer
    assert record is not None
    assert record.document_start == start
    assert main(["checkpoint", "convert", str(run_dir), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    prompts = ["the cat sat", "the bird", "th"]
    options_ = GenerationOptions(max_new_tokens=8, temperature=0)
    found = generate_text(str(run_dir), prompts, options_, on_note=lambda _: None)
    for prompt, text in zip(prompts, found, strict=True):
        rows = tokenizer(prompt, return_tensors="pt")  # with bos, if documents began with it
        if start == (2,):  # transformers has no tokenizer that puts eos before a text
            rows = tokenizer("</s>" + prompt, return_tensors="pt")
        new = model.generate(**rows, max_new_tokens=8, do_sample=False)[0]
        assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert any(text[len(prompt) :].startswith(" ") for prompt, text in zip(prompts, found, strict=True))


def test_a_tokenizer_that_is_not_the_checkpoints_is_told(space_before: Path, tmp_path: Path) -> None:
    run_dir = trained(space_before, "base", "separate")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat", "completion": "sat"}\n' * 9)
    (tmp_path / "tokenizer.model").write_bytes((space_before / "theirs.model").read_bytes())
    data = {"type": "completion", "path": str(tmp_path / "rows.jsonl")}
    raw = pretraining(space_before, tmp_path / "run", data=data, validation=None, init_from=str(run_dir))
    raw["tokenizer"] = str(tmp_path / "tokenizer.model")
    same: RunConfig = parse(RunConfig, raw)
    assert read_inputs(same).notes == ()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    (note,) = read_inputs(same).notes
    assert f"the tokenizer is not that of {find_checkpoint(str(run_dir)).path}" in note
    assert "330 of its 330 ids have the same text" in note
    run(Topology(), {**raw, "train": {"max_steps": 2}})
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert any(note in line for line in lines)
