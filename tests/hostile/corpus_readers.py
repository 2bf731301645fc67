"""Readers of corpora and labelled data for `Guard.run`."""

from collections import Counter
from typing import Any

import fsspec.implementations.local
import pyarrow.parquet

from distft.cli.text_verbs import corpus_from_arguments
from distft.data.corpus import ListedCorpus
from distft.data.records import read_records

MODULES = (fsspec.implementations.local, pyarrow.parquet)  # imported once, in the server


def read_corpus(path: str, documents: str = "file") -> dict[str, Any]:
    """List and read everything, and keep nothing."""
    corpus = ListedCorpus(corpus_from_arguments([path], "text", documents))
    lines = corpus.describe()
    skipped: Counter[str] = Counter()
    num_documents = num_bytes = 0
    for chunk in corpus.chunks():
        for part in chunk.parts():
            for document in part.documents(skipped):
                num_documents += not document.continues_previous
                num_bytes += document.num_bytes
    return {"documents": num_documents, "bytes": num_bytes, "skipped": dict(skipped), "lines": lines}


def read_labelled(path: str) -> int:
    """The number of labelled rows."""
    return len(read_records(path, texts=["text"], labels=["label"]))
