"""`distft tokenizer`, `tokenize` and `task`: prepare text for training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft.cli.arguments import all_expanded, expanded, say

if TYPE_CHECKING:
    from distft.data.corpus import CorpusConfig, ListedCorpus
    from distft.prepare import TokenizeConfig, TokenizeResult
    from distft.tracker.progress import ProgressDisplay

tokenizer_app = typer.Typer(help="Train a tokenizer, or import one.", no_args_is_help=True)

Corpus = Annotated[
    list[str],
    typer.Argument(
        metavar="CORPUS...",
        help="Files, directories or globs of text, JSONL, CSV or Parquet (also .gz, .zst); `stdlib` for "
        "Python's standard library; or a .yaml file with the settings of a corpus, such as a mixture.",
        callback=all_expanded,
    ),
]
TokenizerFile = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        "-t",
        help="A .model or tokenizer.json file, or a directory of transformers.",
        callback=expanded,
    ),
]
ShardsDirectory = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="A directory; shards go to train/ and validation/ in it.", callback=expanded
    ),
]
TextColumn = Annotated[str, typer.Option(help="The text column of JSONL, CSV or Parquet.")]
DocumentUnit = Annotated[
    str,
    typer.Option(
        help="One document of a text file is a file, a line, or text between blank lines (blank_line)."
    ),
]


@tokenizer_app.command("train")
def tokenizer_train(
    corpus: Corpus,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .model file to write.", callback=expanded)
    ],
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
    from distft.tokenizer import TokenizerTrainConfig, require_tokenizer_target, train_tokenizer
    from distft.tracker import progress

    require_tokenizer_target(output)
    raw: dict[str, Any] = {"algorithm": algorithm, "user_defined_symbols": symbol or []}
    if vocab_size is not None:
        raw["vocab_size"] = vocab_size
    config: TokenizerTrainConfig = parse(TokenizerTrainConfig, apply_overrides(raw, setting or []))
    source = corpora.ListedCorpus(corpus_from_arguments(corpus, text_column, documents))
    for line in source.describe():
        print(line)
    with progress(source.source_bytes, "reading", "bytes") as display:

        def texts() -> Any:
            for document in corpora.read_documents(source):
                display.advance(document.num_bytes)
                yield document.text

        tokenizer = train_tokenizer(texts(), config, output)
    say(f"{output}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint}")


@tokenizer_app.command("import")
def tokenizer_import(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A sentencepiece .model or a tokenizer.json file, or a directory of transformers.",
            callback=expanded,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The .model file to write, or a directory for others.", callback=expanded
        ),
    ],
) -> None:
    """Check and copy a tokenizer, with the tokens that the files of transformers beside it add.

    Prints its special ids and fingerprint.
    """
    from distft.tokenizer import import_tokenizer

    tokenizer = import_tokenizer(model, output)
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
    special_ids = ", ".join(f"{name} {'absent' if i is None else i}" for name, i in ids.items())
    say(f"{output}: {tokenizer.vocab_size:,} pieces; {special_ids}; fingerprint {tokenizer.fingerprint}")
    for note in tokenizer.notes:
        print(note)
    if not tokenizer.is_lossless:
        print("Decoding may change text: the model normalizes it, or has no ids for some characters.")


def tokenize(
    corpus: Corpus,
    tokenizer: TokenizerFile,
    output: ShardsDirectory,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Fraction of documents for validation/.")
    ] = 0.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
    text_column: TextColumn = "text",
    documents: DocumentUnit = "file",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace other shards in the output when the new are complete; restart unfinished work.",
        ),
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another setting as key=value, such as shard_tokens=1000000."),
    ] = None,
) -> None:
    """Turn a corpus into token shards on all cores; resumes interrupted work."""
    from distft.config import apply_overrides, parse
    from distft.data.corpus import ListedCorpus
    from distft.prepare import TokenizeConfig

    with _telling_of_tokenizer_too(tokenizer):
        source = corpus_from_arguments(corpus, text_column, documents)
        raw = {
            "corpus": source.model_dump(mode="json"),
            "tokenizer": tokenizer,
            "output": output,
            "holdout": holdout,
            "num_workers": workers,
        }
        config: TokenizeConfig = parse(TokenizeConfig, apply_overrides(raw, setting or []), trust=True)
        listed = ListedCorpus(config.corpus)
    for line in listed.describe():
        print(line)
    result = _tokenize_with_progress(config, listed, overwrite=overwrite)
    for split, shards in (("train", result.train), ("validation", result.validation)):
        if shards is not None:
            say(
                f"{output}/{split}: {shards.num_tokens:,} tokens of {shards.num_documents:,} "
                f"document{'s' * (shards.num_documents != 1)} "
                f"({shards.num_bytes / shards.num_tokens:.2f} bytes per token)"
            )
    if result.skipped:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(result.skipped.items()))
        print(f"Skipped rows without text: {reasons}.")


@contextmanager
def _telling_of_tokenizer_too(path: str) -> Iterator[None]:
    """Add what is wrong with the tokenizer to an error of the block, so that all faults are told at once."""
    from distft.errors import ErrorCollector
    from distft.tokenizer import Tokenizer

    errors = ErrorCollector()
    with errors.collect():
        yield
        return
    with errors.collect():
        Tokenizer.load(path)
    errors.raise_if_any()


def _tokenize_with_progress(
    config: "TokenizeConfig", corpus: "ListedCorpus", *, overwrite: bool
) -> "TokenizeResult":
    from distft.prepare import TokenizeProgress
    from distft.prepare import tokenize as run_tokenize
    from distft.tracker import progress

    display: ProgressDisplay | None = None
    shown_bytes = 0
    with ExitStack() as displayed:

        def start(num_bytes: int) -> None:
            nonlocal display
            display = displayed.enter_context(progress(num_bytes, "tokenizing", "bytes"))

        def show(now: TokenizeProgress) -> None:
            nonlocal shown_bytes
            assert display is not None
            display.advance(now.source_bytes - shown_bytes)
            shown_bytes = now.source_bytes

        result = run_tokenize(config, corpus=corpus, on_start=start, on_progress=show, overwrite=overwrite)
    if display is None:
        print(f"{config.output} was already complete: nothing was done.")
    return result


def task(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A directory for train.jsonl and test.jsonl.", callback=expanded),
    ],
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Pairs of docstring and function instead; held-out modules.")
    ] = False,
) -> None:
    """Write a built-in classification task: predict a function's area of Python's standard library."""
    from distft.prepare.stdlib_pairs import write_stdlib_pairs
    from distft.prepare.stdlib_task import write_stdlib_task

    if pairs:
        found = write_stdlib_pairs(output)
        say(
            f"{output}: {found.num_train:,} training pairs, {found.num_test:,} test pairs of "
            f"{len(found.test_modules)} held-out modules (Python {found.python})"
        )
        return
    written = write_stdlib_task(output)
    say(
        f"{output}: {written.num_train:,} training functions, {written.num_test:,} test functions, "
        f"{len(written.areas)} areas (Python {written.python})"
    )


def corpus_from_arguments(paths: list[str], text_column: str, documents: str) -> "CorpusConfig":
    """The corpus that command-line arguments name; the endings of the files determine its type.

    Raises `ConfigError` if the paths have several types, or a setting is invalid.
    """
    from distft.config import load_yaml, parse
    from distft.data.corpus import CorpusConfig
    from distft.data.corpus_kinds import kind_of_corpus

    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        return parse(CorpusConfig, load_yaml(paths[0]), where=paths[0], trust=True)  # type: ignore[no-any-return]
    if paths == ["stdlib"]:
        return parse(CorpusConfig, {"type": "stdlib"})  # type: ignore[no-any-return]
    corpus_type = kind_of_corpus(paths)
    option = {"documents": documents} if corpus_type == "text" else {"text_column": text_column}
    return parse(CorpusConfig, {"type": corpus_type, "paths": paths, **option})  # type: ignore[no-any-return]
