"""`distft tokenizer`, `tokenize` and `task`: prepare text for training."""

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from distft.data.corpus import CorpusConfig

tokenizer_app = typer.Typer(help="Train a tokenizer, or import one.", no_args_is_help=True)

Corpus = Annotated[
    list[str],
    typer.Argument(
        metavar="CORPUS...",
        help="Files, directories or globs of text, JSONL or Parquet (also .gz, .zst); `stdlib` for Python's "
        "standard library; or a .yaml file with the settings of a corpus, such as a mixture.",
    ),
]
TextColumn = Annotated[str, typer.Option(help="The text column of JSONL or Parquet.")]
DocumentUnit = Annotated[
    str,
    typer.Option(
        help="One document of a text file is a file, a line, or text between blank lines (blank_line)."
    ),
]


@tokenizer_app.command("train")
def tokenizer_train(
    corpus: Corpus,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .model file to write.")],
    algorithm: Annotated[str, typer.Option(help="bpe, unigram or char.")] = "bpe",
    vocab_size: Annotated[
        int | None, typer.Option(help="Number of ids; default 8192, except for char.")
    ] = None,
    symbol: Annotated[
        list[str] | None, typer.Option(help="A text that always becomes one id; repeatable.")
    ] = None,
    text_column: TextColumn = "text",
    documents: DocumentUnit = "file",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting as key=value, such as pad_id=3.")
    ] = None,
) -> None:
    """Train a sentencepiece vocabulary on a sample of a corpus."""
    from distft.config import apply_overrides, parse
    from distft.data import corpus as corpora
    from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
    from distft.tracker import progress

    raw: dict[str, Any] = {"algorithm": algorithm, "user_defined_symbols": symbol or []}
    if vocab_size is not None:
        raw["vocab_size"] = vocab_size
    config: TokenizerTrainConfig = parse(TokenizerTrainConfig, apply_overrides(raw, setting or []))
    source = corpus_from_arguments(corpus, text_column, documents)
    num_bytes = corpora.source_bytes(source)
    with progress(num_bytes, "reading", "bytes") as display:

        def texts() -> Any:
            for document in corpora.read_documents(source):
                display.advance(document.num_bytes)
                yield document.text

        tokenizer = train_tokenizer(texts(), config, output)
    print(f"{output}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint}")


@tokenizer_app.command("import")
def tokenizer_import(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A sentencepiece .model file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .model file to write.")],
) -> None:
    """Check and copy an existing sentencepiece model, and print its special ids and fingerprint."""
    from distft.tokenizer import import_tokenizer

    tokenizer = import_tokenizer(model, output)
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
    special_ids = ", ".join(f"{name} {'absent' if i is None else i}" for name, i in ids.items())
    print(f"{output}: {tokenizer.vocab_size:,} pieces; {special_ids}; fingerprint {tokenizer.fingerprint}")
    if not tokenizer.is_lossless:
        print("Decoding may change text: the model normalizes it, or has no ids for some characters.")


def tokenize(
    corpus: Corpus,
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="A .model file.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="A directory; shards go to train/ and validation/ in it.")
    ],
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Fraction of documents for validation/.")
    ] = 0.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
    text_column: TextColumn = "text",
    documents: DocumentUnit = "file",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove earlier shards in the output first.")
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another setting as key=value, such as shard_tokens=1000000."),
    ] = None,
) -> None:
    """Turn a corpus into token shards on all cores; resumes interrupted work."""
    from distft.config import apply_overrides, parse
    from distft.prepare import TokenizeConfig, TokenizeProgress
    from distft.prepare import tokenize as run_tokenize
    from distft.tracker import progress

    source = corpus_from_arguments(corpus, text_column, documents)
    raw = {
        "corpus": source.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "output": output,
        "holdout": holdout,
        "num_workers": workers,
    }
    config: TokenizeConfig = parse(TokenizeConfig, apply_overrides(raw, setting or []))
    with progress(None, "tokenizing", "bytes") as display:
        shown_bytes = 0

        def show(now: TokenizeProgress) -> None:
            nonlocal shown_bytes
            display.set_total(now.total_source_bytes)
            display.advance(now.source_bytes - shown_bytes)
            shown_bytes = now.source_bytes

        result = run_tokenize(config, on_progress=show, overwrite=overwrite)
    for split, shards in (("train", result.train), ("validation", result.validation)):
        if shards is not None:
            print(
                f"{output}/{split}: {shards.num_tokens:,} tokens of {shards.num_documents:,} "
                f"document{'s' * (shards.num_documents != 1)} "
                f"({shards.num_bytes / shards.num_tokens:.2f} bytes per token)"
            )


def task(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A directory for train.jsonl and test.jsonl.")
    ],
) -> None:
    """Write a built-in classification task: predict a function's area of Python's standard library."""
    from distft.prepare.stdlib_task import write_stdlib_task

    written = write_stdlib_task(output)
    print(
        f"{output}: {written.num_train:,} training functions, {written.num_test:,} test functions, "
        f"{len(written.areas)} areas (Python {written.python})"
    )


def corpus_from_arguments(paths: list[str], text_column: str, documents: str) -> "CorpusConfig":
    """The corpus that command-line arguments name; file suffixes determine its type.

    Raises `ConfigError` if the paths have several types, or a setting is invalid.
    """
    from distft.config import load_yaml, parse
    from distft.data.corpus import CorpusConfig
    from distft.errors import ConfigError

    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        return parse(CorpusConfig, load_yaml(paths[0]), where=paths[0])  # type: ignore[no-any-return]
    if paths == ["stdlib"]:
        return parse(CorpusConfig, {"type": "stdlib"})  # type: ignore[no-any-return]
    types = set().union(*map(_corpus_types, paths))
    if len(types) > 1:
        raise ConfigError(
            f"CORPUS mixes {' and '.join(sorted(types))} files: name files of one type, or a .yaml file "
            "that describes a mixture (type: mixture, sources: [{corpus: {...}, weight: 1}])."
        )
    corpus_type = types.pop()
    option = {"documents": documents} if corpus_type == "text" else {"text_column": text_column}
    return parse(CorpusConfig, {"type": corpus_type, "paths": paths, **option})  # type: ignore[no-any-return]


def _corpus_types(path: str) -> set[str]:
    """Corpus types of a file, of the files directly in a directory, or of the matches of a glob."""
    if Path(path).is_dir():
        found = {_corpus_type(entry.name) for entry in Path(path).iterdir() if entry.is_file()}
    else:
        found = {_corpus_type(name) for name in glob.glob(path)}  # noqa: PTH207 - also absolute patterns
    return found or {_corpus_type(path)}


def _corpus_type(name: str) -> str:
    bare = name.removesuffix(".gz").removesuffix(".zst")
    if bare.endswith((".jsonl", ".ndjson", ".json")):
        return "jsonl"
    return "parquet" if bare.endswith(".parquet") else "text"
