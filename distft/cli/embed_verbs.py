"""`distft embed`."""

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.arguments import expanded, print_note, say
from distft.cli.model_verbs import CheckpointPath, RunSettings, Trust
from distft.cli.text_verbs import Corpus, DocumentUnit, TextColumn, corpus_from_arguments
from distft.topology import Topology

if TYPE_CHECKING:
    from distft.run.embed import EmbedResult


def embed(
    checkpoint: CheckpointPath,
    corpus: Corpus,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The .npy or .parquet file to write.", callback=expanded)
    ],
    pooling: Annotated[
        str | None,
        typer.Option(help="mean, first or last of a document's tokens; default: the model's own, else mean."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="To length 1; default: as the model, else not."),
    ] = None,
    head: Annotated[str | None, typer.Option(help="The model's embedding head, if it has several.")] = None,
    text_column: TextColumn = "text",
    documents: DocumentUnit = "file",
    setting: RunSettings = None,
    trust: Trust = False,
) -> None:
    """Write an embedding of each document of a corpus, by a run, a checkpoint or a model of transformers.

    Runs in this process, or as one rank of torchrun: each rank embeds its share, in the corpus's order.
    """
    from distft.config import parse
    from distft.data.corpus import ListedCorpus
    from distft.model.config import Pooling
    from distft.run.environment import prepare_for_torch

    topology = Topology.from_env(os.environ)
    own_pooling = None if pooling is None else parse(Pooling, pooling, where="--pooling")
    listed = ListedCorpus(corpus_from_arguments(corpus, text_column, documents))
    if topology.is_main:
        for line in listed.describe():
            print(line)
    prepare_for_torch()
    from distft.run.embed import EmbedOptions, embed_corpus
    from distft.tracker import progress

    share = listed.source_bytes / topology.world_size
    with progress(share, "embedding", "bytes") if topology.is_main else nullcontext() as display:
        result = embed_corpus(
            checkpoint,
            listed,
            output,
            topology,
            EmbedOptions(pooling=own_pooling, normalize=normalize, head=head),
            overrides=setting or (),
            trust=trust,
            on_note=print_note if topology.is_main else (lambda _: None),
            on_progress=(lambda _: None) if display is None else display.advance,
        )
    if topology.is_main:
        say(f"{output}: {_describe(result)}")


def _describe(result: "EmbedResult") -> str:
    cut = f", {result.num_cut:,} of them cut to the model's row" if result.num_cut else ""
    empty = f"; {result.num_without_text:,} rows without text have none" if result.num_without_text else ""
    return f"{result.num_documents:,} embeddings of {result.num_elements:,} elements{cut}{empty}"
