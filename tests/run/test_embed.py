"""`distft embed`: embeddings of a corpus in its order, by any trained model and any number of ranks."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from support.rank_pool import run_ranks
from support.small_runs import WORDS, pretraining, run

from distft.cli.main import main
from distft.data.corpus import JsonlCorpus, ListedCorpus
from distft.errors import ConfigError, DataError, UnreachableError
from distft.model.heads import EmbeddingHead
from distft.run.embed import EmbedOptions, EmbedResult, embed_corpus
from distft.run.pretrained import load_model, open_model
from distft.topology import Topology

NUM_TEXTS = 41


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of different lengths in files of their own size, some longer than a row of the model."""
    folder = tmp_path_factory.mktemp("corpus")
    source = np.random.default_rng(5)
    texts = [" ".join(source.choice(WORDS, source.integers(1, 9))) for _ in range(NUM_TEXTS)]
    for number, bounds in enumerate([(0, 3), (3, 20), (20, 21), (21, NUM_TEXTS)]):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[slice(*bounds)]]
        (folder / f"{number}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def contrastive(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs: a label's word and a text with it."""
    run_dir = tmp_path_factory.mktemp("contrastive")
    own = {"type": "pairs", "path": str(data / "train.jsonl"), "text": "label", "positive": "text"}
    raw = pretraining(
        data,
        run_dir,
        tokenizer=str(data / "tokenizer.model"),
        data=own,
        validation={**own, "path": str(data / "test.jsonl")},
        objective={"type": "contrastive", "temperature": 0.1, "learns_temperature": True},
        train={"max_steps": 3, "log_every_steps": 1},
    )
    metrics = run(Topology(), raw).metrics
    assert {"validation/loss", "validation/recall_at_1", "validation/mrr", "validation/map"} <= metrics.keys()
    return run_dir


def listed(folder: Path) -> ListedCorpus:
    return ListedCorpus(JsonlCorpus(paths=(str(folder),)))


def texts_of(folder: Path) -> list[str]:
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


def one_by_one(run_dir: Path, texts: list[str], head: EmbeddingHead) -> np.ndarray:
    """The embeddings of texts, each in a row of its own."""
    trained = open_model(str(run_dir))
    module = load_model(trained, torch.device("cpu"), {"embedding": head})
    rows = [torch.tensor([trained.tokenizer.encode(text)[: trained.config.batch.seq_len]]) for text in texts]
    with torch.no_grad():
        return torch.cat([module(row)["embedding"] for row in rows]).numpy()


def test_each_document_has_the_embedding_that_the_run_trained_without_its_temperature(
    contrastive: Path, corpus: Path, tmp_path: Path
) -> None:
    result = embed_corpus(str(contrastive), listed(corpus), str(tmp_path / "out.npy"), Topology())
    found, texts = np.load(tmp_path / "out.npy"), texts_of(corpus)
    num_cut = sum(len(text.strip()) > 24 for text in texts)
    assert result == EmbedResult(num_documents=NUM_TEXTS, num_elements=16, num_cut=num_cut)
    assert 0 < num_cut < NUM_TEXTS
    assert np.linalg.norm(found, axis=1) == pytest.approx(1)
    np.testing.assert_allclose(
        found, one_by_one(contrastive, texts, EmbeddingHead(pooling="last")), atol=1e-6
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_a_model_without_an_embedding_head_gives_the_mean_unless_told_otherwise(
    pretrained: Path, corpus: Path, tmp_path: Path
) -> None:
    texts = texts_of(corpus)
    for pooling in (None, "last"):
        output = str(tmp_path / f"{pooling}.npy")
        options = EmbedOptions(pooling=pooling, normalize=None if pooling is None else True)
        embed_corpus(str(pretrained), listed(corpus), output, Topology(), options)
        head = EmbeddingHead(pooling=pooling or "mean", normalize=pooling is not None)
        np.testing.assert_allclose(np.load(output), one_by_one(pretrained, texts, head), atol=2e-6)


def test_parquet_has_the_same_embeddings_and_where_each_document_begins(
    contrastive: Path, corpus: Path, tmp_path: Path
) -> None:
    for suffix in (".npy", ".parquet"):
        embed_corpus(str(contrastive), listed(corpus), str(tmp_path / f"out{suffix}"), Topology())
    table = pq.read_table(tmp_path / "out.parquet")
    found = np.stack(table["embedding"].to_numpy())
    assert np.array_equal(found, np.load(tmp_path / "out.npy"))
    origins = table["origin"].to_pylist()
    assert origins[0].startswith(str(corpus / "0.jsonl"))
    assert len(set(origins)) == NUM_TEXTS


def _embed(topology: Topology, run_dir: str, folder: Path, output: str) -> EmbedResult:
    return embed_corpus(run_dir, listed(folder), output, topology)


@pytest.mark.ranks
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_ranks_write_what_one_rank_writes(
    contrastive: Path, corpus: Path, tmp_path: Path, suffix: str
) -> None:
    alone = embed_corpus(str(contrastive), listed(corpus), str(tmp_path / f"one{suffix}"), Topology())
    output = tmp_path / f"three{suffix}"
    assert run_ranks(_embed, 3, str(contrastive), corpus, str(output)) == [alone] * 3
    if suffix == ".npy":
        np.testing.assert_allclose(np.load(output), np.load(tmp_path / "one.npy"), atol=1e-6)
    else:
        one, three = (pq.read_table(tmp_path / name) for name in ("one.parquet", "three.parquet"))
        assert one["origin"].equals(three["origin"])
        assert one.schema.equals(three.schema)
    assert not list(tmp_path.glob("*part*"))


def test_a_failure_leaves_no_file(contrastive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a cat"}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"a\.jsonl"):
        embed_corpus(str(contrastive), listed(folder), str(tmp_path / "out.parquet"), Topology())
    (folder / "a.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="the corpus has no documents"):
        embed_corpus(str(contrastive), listed(folder), str(tmp_path / "out.npy"), Topology())
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_rows_without_text_are_told_and_shift_no_row_of_a_file_without_origins(
    contrastive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    path = folder / "a.jsonl"
    path.write_text('{"text": "a cat"}\n{"text": " "}\n{"text": null}\n{"text": "a dog"}\n')
    arguments = ["embed", str(contrastive), str(path), "-o"]
    assert main([*arguments, str(tmp_path / "out.parquet")]) == 0
    assert "2 embeddings of 16 elements; 2 rows without text have none" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "out.npy")]) == 2
    error = capsys.readouterr().err
    assert f"a row before {path}:" in error
    assert "Write a .parquet file" in error
    path.write_text('{"text": "a cat"}\n{"text": ""}\n')
    assert main([*arguments, str(tmp_path / "out.npy")]) == 2
    assert "1 rows of the corpus have no text" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out.parquet"]


@pytest.mark.parametrize("text", ["a cat\n\na dog\n", "a cat\n \t\r\na dog", "a cat\na dog\n\n"])
def test_blank_lines_are_rows_without_text_where_each_line_is_a_document(
    contrastive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    arguments = ["embed", str(contrastive), str(path), "--documents", "line", "-o"]
    assert main([*arguments, str(tmp_path / "out.npy")]) == 2
    assert "so that row i of a .npy file would not be that of the corpus" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "out.parquet")]) == 0
    assert "2 embeddings of 16 elements; 1 rows without text have none" in capsys.readouterr().out
    origins = pq.read_table(tmp_path / "out.parquet").column("origin").to_pylist()
    assert origins == [f"{path}:0", f"{path}:{text.index('a dog')}"]
    path.write_text("a cat\na dog\n")
    assert main([*arguments, str(tmp_path / "out.npy")]) == 0
    assert np.load(tmp_path / "out.npy").shape == (2, 16)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("{}/missing/x.npy", "there is no directory {}/missing. Create it"),
        ("{}/corpus.txt/x.npy", "{}/corpus.txt is a file, not a directory"),
        ("/proc/x.npy", "no file can be made in /proc"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_embedded(
    contrastive: Path, corpus: Path, tmp_path: Path, output: str, problem: str
) -> None:
    (tmp_path / "corpus.txt").write_text("a cat\n")
    path, done = output.format(tmp_path), list[int]()
    with pytest.raises(ConfigError, match=re.escape(f"--output {path}: {problem.format(tmp_path)}")):
        embed_corpus(str(contrastive), listed(corpus), path, Topology(), on_progress=done.append)
    assert not done
    assert [found.name for found in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_url_that_cannot_be_written_is_found_before_anything_is_embedded(
    contrastive: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read only")

    for name in ("pipe_file", "put_file", "makedirs"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    done = list[int]()
    with pytest.raises(UnreachableError, match=r"--output memory://a/x\.npy cannot be written"):
        embed_corpus(
            str(contrastive), listed(corpus), "memory://a/x.npy", Topology(), on_progress=done.append
        )
    assert not done


def test_the_first_token_of_a_causal_model_is_no_embedding(
    pretrained: Path, corpus: Path, tmp_path: Path
) -> None:
    options = EmbedOptions(pooling="first")
    with pytest.raises(ConfigError, match=r"--pooling=first with model\.attention=causal"):
        embed_corpus(str(pretrained), listed(corpus), str(tmp_path / "a.npy"), Topology(), options)


def test_the_command_writes_a_file_and_refuses_what_it_cannot_write(
    contrastive: Path, pretrained: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.npy")
    arguments = ["embed", str(contrastive), str(corpus / "1.jsonl"), "-o", output, "--pooling", "last"]
    assert main(arguments) == 0
    assert f"{output}: 17 embeddings of 16 elements" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert main([*arguments[:4], str(tmp_path / "out.csv")]) == 2
    assert "must end in .npy or .parquet" in capsys.readouterr().err
    assert main([*arguments[:4], str(tmp_path / "b.npy"), "--pooling", "median"]) == 2
    assert "pooling" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no embedding head 'other'"):
        embed_corpus(
            str(pretrained),
            listed(corpus),
            str(tmp_path / "c.npy"),
            Topology(),
            EmbedOptions(head="other"),
        )
