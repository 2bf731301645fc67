"""Mutated files for every reader: what `test_fuzz.py` (a short run) and `tools/fuzz.py` (a long one) share.

A subject is a directory of valid files, and a command or function that reads it. One file of a copy of the
directory is edited, and the reader runs under the guard: it must return or raise one of distft's own errors.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from support.library_tokenizers import WRITERS
from support.small_runs import make_text_data, pretraining, run

from distft.cli.main import app
from distft.topology import Topology
from hostile.guard import Guard

RUN = "hostile.readers:run_cli"
READ_CHECKPOINT = "hostile.readers:read_checkpoint"
READ_TOKENIZER = "hostile.readers:read_tokenizer"
READ_CORPUS = "hostile.corpus_readers:read_corpus"
READ_LABELLED = "hostile.corpus_readers:read_labelled"
# What a parser is most likely to mistake: signs, nesting, escapes, numbers that are too large, markup.
TOKENS = (
    b"-1",
    b"0",
    b"9" * 400,
    b"1e999",
    b"NaN",
    b"null",
    b"[" * 2000,
    b"{" * 2000,
    b'"',
    b"\\ud83d",
    b"../../../../tmp/x",
    b"/dev/zero",
    b"file:///etc/passwd",
    b"os:system",
    b"!!python/object/apply:os.system [id]",
    b"\x00",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xef\xbb\xbf",
    b"\r\n",
)


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of a file's bytes at `place`, a share of its length."""

    kind: str
    place: float
    value: int

    def apply(self, data: bytes) -> bytes:
        start = int(self.place * len(data))
        before, after = data[:start], data[start:]
        length = 1 + self.value % 64
        token = TOKENS[self.value % len(TOKENS)]
        changed = {
            "flip": bytes([after[0] ^ (1 << self.value % 8)]) + after[1:],
            "set": bytes([self.value % 256]) + after[1:],
            "delete": after[length:],
            "repeat": after[:length] + after,
            "cut": b"",
            "insert": token + after,
            "overwrite": (token + after[len(token) :])[: len(after)],  # the length, and with it offsets, stay
        }
        return before + changed[self.kind]


EDITS = st.lists(
    st.builds(
        Edit,
        kind=st.sampled_from(["flip", "set", "delete", "repeat", "cut", "insert", "overwrite"]),
        place=st.floats(0, 1, exclude_max=True),
        value=st.integers(0, 1 << 16),
    ),
    min_size=1,
    max_size=4,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Valid files, and what reads them: `function` of guard.py with `arguments`.

    "{}" in an argument stands for the directory with the mutated copy.
    """

    name: str
    source: Path
    function: str
    arguments: tuple[str, ...]
    only: tuple[str, ...] = ("*",)  # globs of the files to edit
    beside: Path | None = None  # read, and not edited

    def files(self) -> list[str]:
        """The files that are edited, relative to the directory."""
        found = {
            path.relative_to(self.source).as_posix()
            for pattern in self.only
            for path in self.source.rglob(pattern)
            if path.is_file() and path.stat().st_size
        }
        return sorted(found)

    def check(self, guard: Guard, scratch: Path, file: str, edits: Sequence[Edit]) -> None:
        """Raise `AssertionError` with the guard's finding if the reader does anything else than it may."""
        if scratch.exists():
            shutil.rmtree(scratch)
        target = scratch / "files"
        shutil.copytree(self.source, target)
        path = target / file
        data = path.read_bytes()
        for edit in edits:
            data = edit.apply(data) if data else data
        path.write_bytes(data)
        arguments = [argument.replace("{}", str(target)) for argument in self.arguments]
        beside = [self.beside] if self.beside is not None else []
        outcome = guard.run(self.function, *arguments, directories=[target, *beside], writable=[scratch])
        outcome.check()


def make_subjects(directory: Path) -> list[Subject]:
    """Write valid files of every format below `directory`."""
    data = make_text_data(directory / "data", num_documents=40)
    (data / "run.yaml").write_text(yaml.safe_dump(pretraining(data, directory / "new")))
    checkpoint = _checkpoint(directory, data)
    return [
        Subject(name="checkpoint", source=checkpoint, function=READ_CHECKPOINT, arguments=("{}",)),
        Subject(
            name="checkpoint to huggingface",
            source=checkpoint,
            function=RUN,
            arguments=("checkpoint", "convert", "{}", "{}/../out", "--to", "huggingface"),
            only=("manifest.json", "*.model"),
        ),
        *_converted(directory, checkpoint),
        Subject(
            name="token shards",
            source=data / "shards",
            function=RUN,
            arguments=("config", "check", str(data / "run.yaml"), "data.sources=[{path: '{}/train'}]"),
            only=("*.json", "*.bin"),
            beside=data,
        ),
        *_texts(directory, data),
        *_settings(directory, data),
    ]


def _checkpoint(directory: Path, data: Path) -> Path:
    raw = pretraining(data, directory / "run", train={"max_steps": 2, "log_every_steps": 1})
    del raw["validation"]
    run(Topology(), {**raw, "engine": {"type": "local"}})
    (found,) = sorted((directory / "run" / "checkpoints").glob("step_*"))
    return found


def _converted(directory: Path, checkpoint: Path) -> list[Subject]:
    subjects = []
    for name, arguments in (
        ("huggingface", ("--to", "huggingface")),
        ("deepspeed", ("--to", "deepspeed", "--zero-stage", "2", "--ranks", "2")),
        ("universal", ("--to", "universal")),
    ):
        target = directory / name
        app(args=["checkpoint", "convert", str(checkpoint), str(target), *arguments], standalone_mode=False)
        subjects.append(Subject(name=name, source=target, function=READ_CHECKPOINT, arguments=("{}",)))
    return subjects


def _texts(directory: Path, data: Path) -> list[Subject]:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = (data / "train.jsonl").read_bytes()
    texts = [f"one, two\tand {number}" for number in range(20)]
    table = pyarrow.table({"text": texts, "label": ["a", "b"] * 10})
    subjects = []

    def add(name: str, write: Callable[[Path], Any], reader: str = READ_CORPUS) -> None:
        source = directory / "texts" / name.replace(" ", "_")
        source.mkdir(parents=True)
        write(source)
        (file,) = source.iterdir()
        subjects.append(Subject(name=name, source=source, function=reader, arguments=(f"{{}}/{file.name}",)))

    add("text", lambda to: (to / "a.txt").write_text("\n\n".join(texts)))
    add("jsonl", lambda to: (to / "a.jsonl").write_bytes(rows))
    add("labelled jsonl", lambda to: (to / "a.jsonl").write_bytes(rows), READ_LABELLED)
    add("zstd", lambda to: (to / "a.jsonl.zst").write_bytes(zstandard.compress(rows)))
    add("parquet", lambda to: pyarrow.parquet.write_table(table, to / "a.parquet"))
    add("labelled parquet", lambda to: pyarrow.parquet.write_table(table, to / "a.parquet"), READ_LABELLED)
    add("csv", lambda to: (to / "a.csv").write_text("text,label\n" + "".join(f'"{t}",a\n' for t in texts)))
    return subjects


def _settings(directory: Path, data: Path) -> list[Subject]:
    source = directory / "settings"
    source.mkdir()
    shutil.copyfile(data / "run.yaml", source / "run.yaml")
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir()
    shutil.copyfile(data / "tokenizer.model", tokenizer / "a.model")
    return [
        Subject(
            name="run.yaml",
            source=source,
            function=RUN,
            arguments=("config", "check", "{}/run.yaml"),
            beside=data,
        ),
        Subject(
            name="tokenizer",
            source=tokenizer,
            function=RUN,
            arguments=("tokenizer", "import", "{}/a.model", "-o", "{}/../out.model"),
        ),
        *_library_tokenizers(directory),
    ]


def _library_tokenizers(directory: Path) -> list[Subject]:
    subjects = []
    for kind in ("qwen", "gpt2", "vocab.txt"):
        source = directory / f"{kind} tokenizer"
        source.mkdir()
        WRITERS[kind](source)
        only = ("tokenizer*.json", "vocab.*", "merges.txt")
        subjects.append(
            Subject(name=source.name, source=source, function=READ_TOKENIZER, arguments=("{}",), only=only)
        )
    return subjects
