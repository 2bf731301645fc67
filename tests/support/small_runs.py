"""Small complete runs for tests, with a real tokenizer and real token shards."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from distft.config import parse
from distft.data.corpus import TextCorpus
from distft.prepare import TokenizeConfig, tokenize
from distft.run.config import RunConfig
from distft.run.train import RunResult, run_training
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
from distft.topology import Topology
from distft.train.loop import Trainer

WORDS = (
    "the a cat dog sat ran on under mat tree and then it saw big red moon river stone bird sang".split()  # noqa: SIM905
)


def make_text_data(folder: Path, *, num_documents: int = 60, symbols: tuple[str, ...] = ()) -> Path:
    """Write sentences of a toy language: a tokenizer, train and validation shards, and labelled rows."""
    source = random.Random(7)
    documents = [
        " ".join(source.choice(WORDS) for _ in range(source.randrange(20, 60))) for _ in range(num_documents)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "corpus.txt"
    text.write_text("\n".join(documents) + "\n")
    model = folder / "tokenizer.model"
    train_tokenizer(documents, TokenizerTrainConfig(algorithm="char", user_defined_symbols=symbols), model)
    corpus = TextCorpus(paths=(str(text),), documents="line")
    tokenize(
        TokenizeConfig(
            corpus=corpus, tokenizer=str(model), output=str(folder / "shards"), holdout=0.2, num_workers=1
        )
    )
    for name, num_rows in (("train", 48), ("test", 19)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(num_rows):
                label = source.choice(["cat", "dog", "bird"])
                words = [source.choice(WORDS) for _ in range(source.randrange(2, 9))]
                words.insert(source.randrange(len(words)), label)
                file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return folder


def pretraining(folder: Path, run_dir: Path, /, **changes: Any) -> dict[str, Any]:
    """The configuration of a pretraining run, as plain data; `changes` replace whole sections."""
    return {
        "run_dir": str(run_dir),
        "device": "cpu",
        "timeout_s": 60.0,
        "model": {"max_seq_len": 24, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24},
        "data": {"type": "tokens", "sources": [{"path": str(folder / "shards" / "train")}]},
        "validation": {"type": "tokens", "sources": [{"path": str(folder / "shards" / "validation")}]},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "seq_len": 24},
        "optim": {"peak_lr": 0.01, "schedule": {"type": "cosine", "warmup_steps": 2}},
        "train": {"max_steps": 12, "log_every_steps": 1},
        "checkpoint": {"every_steps": 4},
        **changes,
    }


def fine_tuning(folder: Path, run_dir: Path, init_from: Path, /, **changes: Any) -> dict[str, Any]:
    """The configuration of a classifier's partial fine-tune that starts from a pretrained run."""
    raw = pretraining(folder, run_dir)
    del raw["model"]
    return {
        **raw,
        "init_from": str(init_from),
        "trainable": ["classifier.*", "blocks.1.*", "norm.*"],
        "objective": {"type": "classification", "pooling": "mean"},
        "data": {"type": "labelled", "path": str(folder / "train.jsonl")},
        "validation": {"type": "labelled", "path": str(folder / "test.jsonl")},
        "train": {"num_epochs": 2, "log_every_steps": 1},
        **changes,
    }


def run(topology: Topology, raw: dict[str, Any]) -> RunResult:
    config: RunConfig = parse(RunConfig, raw)
    return run_training(config, topology)


def logged(run_dir: Path, name: str = "loss") -> dict[int, float]:
    """A metric by step, from the run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def run_until_power_cut(raw: dict[str, Any], step: int, topology: Topology | None = None) -> None:
    """Run until `step` steps are complete, then fail without saving. Each of several ranks calls it."""
    run_step = Trainer._run_step

    def run_step_or_fail(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == step:
            raise RuntimeError("power cut")
        return run_step(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_run_step", run_step_or_fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run(topology or Topology(), raw)
