"""Writes an embedding of each document of a corpus, with any trained model and on all ranks."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from distft import storage
from distft.collectives import Collectives, ProcessGroup, SingleProcess, all_or_none
from distft.data.batch import Batch, RaggedArray
from distft.data.corpus import CHUNK_BYTES, ListedCorpus
from distft.data.corpus_chunks import CorpusChunk, Document
from distft.data.dataset import TextTemplate
from distft.errors import ConfigError, DataError
from distft.model.config import Pooling, check_pooling
from distft.model.heads import EmbeddingHead, Heads
from distft.model.with_heads import ModelWithHeads
from distft.run.data_context import text_template
from distft.run.embedding_files import EmbeddingFile, check_writable, file_type
from distft.run.engines import choose_device
from distft.run.pretrained import TrainedModel, load_model, open_model
from distft.topology import Topology

_HEAD = "embedding"
_CHUNKS_PER_RANK = 8  # at least, so that shares of a small corpus are of about equal size
_WINDOW = 64  # micro-batches whose documents are sorted by length, so that rows need little padding


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedOptions:
    """How to embed. None: as the model's own embedding head; without one the mean, not normalised."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    head: str | None = None  # name of the model's head, if it has several


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedResult:
    """What was written, on every rank."""

    num_documents: int
    num_elements: int  # of an embedding
    num_cut: int  # documents longer than a row
    num_without_text: int = 0  # rows of the corpus that are empty or null, and so have no embedding


def embed_corpus(
    path: str,
    corpus: ListedCorpus,
    output: str,
    topology: Topology,
    options: EmbedOptions = EmbedOptions(),
    *,
    overrides: Sequence[str] = (),
    trust: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> EmbedResult:
    """Write the embeddings of all documents, in their order, to `output`: a .npy or a .parquet file.

    Of a model of images and texts they are those of its texts. A document has one row, of its first
    `batch.seq_len` tokens. The temperature does not scale embeddings. The file appears when it is complete.
    Raises `ConfigError` for an output of another kind or one that cannot be written, and `DataError` for a
    corpus without documents, on all ranks; also for one with rows without text if the output does not say
    which document an embedding is of.
    """
    kind = file_type(output)
    trained = open_model(path, overrides, trust=trust)
    heads: Heads = {_HEAD: embedding_head(trained, options)}
    for note in trained.notes:
        on_note(note)
    config = trained.config
    device = choose_device(config, topology)
    collectives: Collectives = SingleProcess()
    if topology.world_size > 1:
        collectives = ProcessGroup(topology, device, config.timeout_s)
    part = f"{output}.part-{collectives.rank}-of-{collectives.world_size}"
    try:
        with all_or_none(collectives, ConfigError):
            check_writable(output, part)
        module = load_model(trained, device, heads)
        embedder = _Embedder(trained, module, device)
        with all_or_none(collectives, DataError), kind.open_part(part) as file:
            for chunk in _share_of(corpus, collectives):
                embedder.write(chunk, file)
                on_progress(chunk.source_bytes)
        own = EmbedResult(
            num_documents=embedder.num_documents,
            num_elements=module.config.output_size,
            num_cut=embedder.num_cut,
            num_without_text=embedder.without_text.total(),
        )
        by_rank = collectives.all_gather((own, part))
        total = _total([result for result, _ in by_rank])
        with all_or_none(collectives, DataError):
            _check_total(total, has_origins=kind.has_origins)
            if collectives.rank == 0:
                parts = [name for result, name in by_rank if result.num_documents]
                kind.join(parts, output, total.num_documents, total.num_elements)
        return total
    finally:
        with suppress(OSError):
            storage.remove(part)
        if isinstance(collectives, ProcessGroup):
            collectives.close()


def _total(results: Sequence[EmbedResult]) -> EmbedResult:
    """Of all ranks."""
    return EmbedResult(
        num_documents=sum(result.num_documents for result in results),
        num_elements=results[0].num_elements,
        num_cut=sum(result.num_cut for result in results),
        num_without_text=sum(result.num_without_text for result in results),
    )


def _check_total(total: EmbedResult, *, has_origins: bool) -> None:
    if not total.num_documents:
        raise DataError("the corpus has no documents, so there is nothing to embed.")
    if total.num_without_text and not has_origins:
        raise DataError(_shifted_rows(f"{total.num_without_text:,} rows of the corpus have no text"))


def _shifted_rows(problem: str) -> str:
    return (
        f"{problem}, so that row i of a .npy file would not be that of the corpus. Write a .parquet file, "
        "which has the place of each document, or remove these rows."
    )


def embedding_head(trained: TrainedModel, options: EmbedOptions) -> EmbeddingHead:
    """The model's own embedding head with the options' changes, without temperature. Raises `ConfigError`."""
    heads = trained.config.objective.heads(trained.label_names)
    own = {name: head for name, head in heads.items() if isinstance(head, EmbeddingHead)}
    if options.head is not None and options.head not in own:
        raise ConfigError(
            f"{trained.source.path} has no embedding head {options.head!r}: it has {', '.join(own) or 'none'}"
        )
    if options.head is None and len(set(own.values())) > 1:
        raise ConfigError(f"{trained.source.path} has the embedding heads {', '.join(own)}: choose one.")
    head = own[options.head] if options.head is not None else next(iter(own.values()), None)
    if head is None:
        pooling: Pooling = "mean"
        if trained.config.model is not None and trained.config.model.is_encoder_decoder:
            pooling = trained.config.model.default_pooling
        head = EmbeddingHead(pooling=pooling, normalize=False)
    if trained.config.model is not None and options.pooling is not None:
        if trained.config.model.image_shape is not None:
            raise ConfigError(
                f"--pooling={options.pooling}: the towers of {trained.source.path} pool as "
                "model.image_pooling and model.text_pooling say. Leave it out."
            )
        check_pooling(options.pooling, trained.config.model, "--pooling")
    return EmbeddingHead(
        pooling=options.pooling or head.pooling,
        normalize=head.normalize if options.normalize is None else options.normalize,
    )


def _share_of(corpus: ListedCorpus, collectives: Collectives) -> list[CorpusChunk]:
    """This rank's chunks: the ranks' shares one after another are all chunks, of about equal size."""
    per_rank = corpus.source_bytes // (_CHUNKS_PER_RANK * collectives.dp_world_size)
    chunks = list(corpus.chunks(min(max(per_rank, 1), CHUNK_BYTES)))
    total = max(sum(chunk.source_bytes for chunk in chunks), 1)
    begin, share = 0, []
    for chunk in chunks:
        if begin * collectives.dp_world_size // total == collectives.dp_rank:
            share.append(chunk)
        begin += chunk.source_bytes
    return share


class _Embedder:
    """Embeds documents with one model, and counts them."""

    def __init__(self, trained: TrainedModel, module: ModelWithHeads, device: torch.device) -> None:
        self._encode = trained.tokenizer.encode
        self._template = text_template(trained.tokenizer) or TextTemplate()
        self._pad_id = trained.tokenizer.pad_id or 0
        self._seq_len = trained.config.batch.seq_len
        self._batch_size = trained.config.evaluation.micro_batch_size or trained.config.batch.micro_batch_size
        self._module = module
        self._device = device
        self._image_shape = module.config.image_shape  # of a model of images and texts
        self.num_documents = self.num_cut = 0
        self.without_text: Counter[str] = Counter()  # rows, by reason

    def write(self, chunk: CorpusChunk, file: EmbeddingFile) -> None:
        """Append the embeddings of a chunk's documents, in order. Later sections of long ones count not."""
        documents = chunk.documents(self.without_text)
        if not file.has_origins:
            documents = self._all_with_text(documents)
        first_sections = (document for document in documents if not document.continues_previous)
        while window := list(islice(first_sections, self._batch_size * _WINDOW)):
            rows = [self._row(document) for document in window]
            file.write(self._embed(rows).numpy(), [document.origin for document in window])
            self.num_documents += len(window)

    def _all_with_text(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            if self.without_text:
                raise DataError(_shifted_rows(f"a row before {document.origin} has no text"))
            yield document

    def _row(self, document: Document) -> list[int]:
        ids = self._encode(document.text)
        if not ids:
            raise DataError(f"{document.origin}: the text encodes to no tokens: remove it.")
        num_free = self._seq_len - self._template.num_marks
        self.num_cut += len(ids) > num_free or document.continues_in_next
        return self._template.row(ids, self._seq_len)

    @torch.no_grad()
    def _embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The embeddings [N, C] of N rows, float32 in host memory."""
        ragged, order = RaggedArray(rows), sorted(range(len(rows)), key=lambda row: len(rows[row]))
        vectors = torch.empty(len(rows), self._module.config.output_size)
        for indices in torch.split(torch.tensor(order), self._batch_size):
            batch = Batch(
                input_ids=torch.from_numpy(ragged.padded(indices.numpy(), self._pad_id)),
                targets={},
                num_targets={},
                lengths=torch.from_numpy(ragged.lengths(indices.numpy())),
                images=self._no_images(len(indices)),
            ).to(self._device)
            found = self._module(**batch.model_inputs)[_HEAD].float().cpu()
            # Of images and texts two vectors a row: the text's is behind the image's, which reads no text.
            vectors[indices] = found if self._image_shape is None else found[1::2]
        return vectors

    def _no_images(self, num_rows: int) -> Tensor | None:
        """Black ones, for a model that reads an image beside each text."""
        if self._image_shape is None:
            return None
        return torch.zeros(num_rows, *self._image_shape, dtype=torch.uint8)
