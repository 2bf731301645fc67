"""Runs with tokenizers of the tokenizers library: shards, checkpoints, exports and what starts from them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.library_tokenizers import WRITERS
from support.small_runs import fine_tuning, make_text_data, pretraining, run

from distft.checkpoint.committed import find_checkpoint
from distft.cli.main import main
from distft.data.shards import TokenShards
from distft.run.generate import GenerationOptions, generate_text
from distft.run.pretrained import open_model
from distft.tokenizer import Tokenizer
from distft.topology import Topology

ONE = ("--documents", "line", "--workers", "1")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data of other tests, with shards of its own tokenizer."""
    return make_text_data(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def folder(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer as Llama 3's, in the directory `tokenizer`."""
    folder = tmp_path_factory.mktemp("run") / "data"
    shutil.copytree(texts, folder)
    tokenized(folder, "llama3")
    run(Topology(), pretraining(folder, folder / "pretrained", train={"max_steps": 4, "log_every_steps": 1}))
    return folder


def tokenized(folder: Path, kind: str) -> None:
    """Replace the tokenizer and the shards."""
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer").mkdir()
    WRITERS[kind](folder / "tokenizer")
    corpus = [str(folder / "corpus.txt"), "--documents", "line", "--holdout", "0.2", "--workers", "2"]
    shards = ["-t", str(folder / "tokenizer"), "-o", str(folder / "shards"), "--overwrite"]
    assert main(["tokenize", *corpus, *shards]) == 0


def own_files(folder: Path) -> dict[str, bytes]:
    return Tokenizer.load(folder / "tokenizer").files()


@pytest.mark.parametrize("kind", ["gpt2", "vocab.txt"])
def test_shards_have_its_ids_and_its_files_beside_them(texts: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(texts, folder)
    tokenized(folder, kind)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    beside = {path.name: path.read_bytes() for path in (folder / "shards").iterdir() if path.is_file()}
    assert beside == own_files(folder)  # and no tokenizer.model of the shards that were replaced
    shards = TokenShards.open(str(folder / "shards" / "train"))
    assert shards.tokenizer_fingerprint == tokenizer.fingerprint
    assert (shards.eos_id, shards.bos_id) == (tokenizer.eos_id, tokenizer.bos_id)
    corpus = ["tokenize", str(folder / "corpus.txt"), "-t", str(folder / "shards"), "-o", str(tmp_path / "b")]
    assert main([*corpus, *ONE]) == 0
    again = TokenShards.open(str(tmp_path / "b" / "train"))
    lines = (folder / "corpus.txt").read_text().splitlines()
    expected = [index for line in lines for index in (*tokenizer.encode(line), tokenizer.eos_id)]
    assert again.tokens(0, again.num_tokens).tolist() == expected


def test_a_checkpoint_carries_it_and_a_resume_finds_it(folder: Path) -> None:
    checkpoint = find_checkpoint(str(folder / "pretrained"))
    record = checkpoint.manifest.tokenizer
    assert record is not None
    assert record.file == "tokenizer.json"
    for name, data in own_files(folder).items():
        assert (Path(checkpoint.path) / name).read_bytes() == data
    assert checkpoint.find_damage() == []
    raw = pretraining(folder, folder / "pretrained", train={"max_steps": 5, "log_every_steps": 1})
    assert run(Topology(), raw).step == 5


def test_a_checkpoint_whose_tokenizer_is_another_is_damaged(folder: Path, tmp_path: Path) -> None:
    assert (
        main(["checkpoint", "convert", str(folder / "pretrained"), str(tmp_path / "copy"), "--to", "distft"])
        == 0
    )
    assert find_checkpoint(str(tmp_path / "copy")).find_damage() == []
    assert {path.name for path in (tmp_path / "copy").iterdir()} >= own_files(folder).keys()
    where = tmp_path / "copy" / "tokenizer_config.json"
    where.write_text(json.dumps({"eos_token": "a", "cls_token": "a"}))
    (damage,) = find_checkpoint(str(tmp_path / "copy")).find_damage()
    assert "tokenizer.json is damaged: its fingerprint is" in damage
    where.with_name("tokenizer.json").write_text("{")
    (damage,) = find_checkpoint(str(tmp_path / "copy")).find_damage()
    assert "tokenizer.json is damaged" in damage


def test_an_export_has_its_files_and_continues_texts_as_transformers_does(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "hf"
    assert (
        main(["checkpoint", "convert", str(folder / "pretrained"), str(target), "--to", "huggingface"]) == 0
    )
    for name, data in own_files(folder).items():
        assert (target / name).read_bytes() == data
    model = AutoModelForCausalLM.from_pretrained(str(target))
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    record = find_checkpoint(str(folder / "pretrained")).manifest.tokenizer
    assert record is not None
    prompts = ["the cat sat", "the bird"]
    options = GenerationOptions(max_new_tokens=6, temperature=0)
    found = generate_text(str(folder / "pretrained"), prompts, options, on_note=lambda _: None)
    for prompt, text in zip(prompts, found, strict=True):
        ids = [*(record.document_start or ()), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        whole = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
        assert text == tokenizer.decode(whole, skip_special_tokens=True)
        assert text.startswith(prompt)
    assert open_model(str(target)).tokenizer.fingerprint == record.fingerprint


def test_it_comes_with_a_model_that_a_run_starts_from(folder: Path, tmp_path: Path) -> None:
    raw = fine_tuning(folder, tmp_path / "tuned", folder / "pretrained")
    raw["train"] = {"max_steps": 3, "log_every_steps": 1}
    run(Topology(), raw)
    assert find_checkpoint(str(tmp_path / "tuned")).manifest.tokenizer is not None
    assert main(["evaluate", str(tmp_path / "tuned")]) == 0
    (tmp_path / "texts.txt").write_text("the cat\na dog sat\n")
    embed = ["embed", str(tmp_path / "tuned"), str(tmp_path / "texts.txt"), "-o", str(tmp_path / "a.npy")]
    assert main([*embed, "--documents", "line"]) == 0
