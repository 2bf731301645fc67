"""What a run's data is built from: the sizes of its model, its tokenizer, and whether they fit together."""

from functools import partial
from typing import TYPE_CHECKING

from distft import storage
from distft.checkpoint.sources import CheckpointSource
from distft.data.dataset import DataContext, Labels, TextTemplate
from distft.data.images import ImagesConfig
from distft.data.split import SplitConfig
from distft.errors import ConfigError, ErrorCollector
from distft.model.config import ModelConfig
from distft.run.chat_config import ChatConfig
from distft.run.config import RunConfig
from distft.run.paths import data_of_streams
from distft.tokenizer import Tokenizer
from distft.tokenizer.chat import Chat
from distft.tokenizer.template_files import read_template

if TYPE_CHECKING:
    from distft.data.feed import Feed


def tokenizer_notes(tokenizer: Tokenizer, source: CheckpointSource | None) -> list[str]:
    """A note if `tokenizer` is not the one that the checkpoint's ids are of."""
    record = None if source is None else source.manifest.tokenizer
    if source is None or record is None or record.fingerprint == tokenizer.fingerprint:
        return []
    note = (
        f"the tokenizer is not that of {source.path}: its fingerprint is {tokenizer.fingerprint}, the "
        f"checkpoint's {record.fingerprint}."
    )
    if record.file is not None:
        own = Tokenizer.load(storage.join(source.path, record.file)).piece_texts
        num_equal = sum(one == other for one, other in zip(own, tokenizer.piece_texts, strict=False))
        note += f" {num_equal:,} of its {len(own):,} ids have the same text in both."
    return [note]


def split_notes(config: RunConfig, train: "Feed", source: CheckpointSource) -> list[str]:
    """A note if `train`, what a split leaves of the data, is not what trained the checkpoint."""
    saved, fingerprint = source.manifest.config, source.manifest.data_fingerprint
    reads_alike = (
        saved.get("batch", {}).get("seq_len") == config.batch.seq_len
        and saved.get("tokenizer") == config.tokenizer
    )
    if fingerprint in {None, train.fingerprint} or not reads_alike:
        return []
    return [
        "the split is not that of the run, or its data have changed since: rows that are measured here may "
        f"have trained the model. Measure others: set validation.type={config.data.type} and validation.path."
    ]


def require_inputs_of_model(config: RunConfig, model: ModelConfig) -> None:
    """Raise `ConfigError` if objective or data are of texts and the model of images, or vice versa."""
    errors = ErrorCollector()
    kind = getattr(model, "type", "")
    if config.objective.needs_text and not model.reads_tokens:
        with errors.collect():
            raise ConfigError(
                f"objective.type={getattr(config.objective, 'type', '')} learns from texts, and "
                f"model.type={kind} reads images alone: set "
                "objective.type=classification or contrastive, or another model."
            )
    for setting, data in (("data", config.data), ("validation", config.validation)):
        for key, own in data_of_streams(setting, data).items():
            has_images = isinstance(own, ImagesConfig)
            if own is None or isinstance(own, SplitConfig) or has_images == (model.image_shape is not None):
                continue
            found = "images" if has_images else "texts"
            remedy = "vit, image_cnn or clip" if has_images else "transformer"
            other = "texts alone" if has_images else "images"
            with errors.collect():
                raise ConfigError(
                    f"{key}.type={getattr(own, 'type', '')} has {found}, and model.type={kind} reads "
                    f"{other}: set model.type={remedy}, or other data."
                )
    errors.raise_if_any()


def _no_text(text: str) -> list[int]:
    raise ConfigError(f"{text[:60]!r} is a text, and the model reads images alone: it has no tokenizer.")


def data_context(
    tokenizer: Tokenizer | None, model: ModelConfig, config: RunConfig, label_names: Labels = None
) -> DataContext:
    """The run's sizes and tokenizer, from which data is built; without one the model reads images alone."""
    if tokenizer is None:
        return DataContext(
            seq_len=config.batch.seq_len,
            global_batch_size=config.batch.global_batch_size,
            vocab_size=0,
            encode=_no_text,
            tokenizer_fingerprint="",
            reads_tokens=False,
            image_shape=model.image_shape,
            label_names=label_names,
        )
    return DataContext(
        seq_len=config.batch.seq_len,
        global_batch_size=config.batch.global_batch_size,
        vocab_size=model.padded_vocab_size,
        image_shape=model.image_shape,
        encode=tokenizer.encode,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        unk_id=tokenizer.unk_id,
        chat=partial(chat_of, tokenizer, config.chat),
        piece_id=tokenizer.piece_id,
        template=text_template(tokenizer),
        ends_sources=model.is_encoder_decoder,
        has_segments=model.has_segments,
        token_bytes=tokenizer.token_bytes(),
        starts_word=tokenizer.starts_word(),
        label_names=label_names,
    )


def chat_of(tokenizer: Tokenizer, config: ChatConfig) -> Chat:
    """The tokenizer with its chat template. Raises `ConfigError` if that is none."""
    return Chat(tokenizer, today=config.date, variables=config.variables)


def with_chat_template(tokenizer: Tokenizer, config: RunConfig) -> Tokenizer:
    """The tokenizer with the template that is set, or with a plain one if conversations need one.

    Raises `DataError` if the file cannot be read, and `ConfigError` for a template that is none.
    """
    data = data_of_streams("data", config.data).values()
    reads_chats = any(getattr(own, "reads_chats", False) for own in data)
    if config.chat.template is not None:
        tokenizer = tokenizer.with_chat_template(read_template(config.chat.template))
    if not reads_chats:
        return tokenizer
    try:
        chat = chat_of(tokenizer, config.chat)
    except ConfigError as error:
        where = "" if config.chat.template is None else f"chat.template={config.chat.template}: "
        raise ConfigError(f"{where}{error}") from None
    return tokenizer if tokenizer.chat_templates else tokenizer.with_chat_template(chat.source)


def text_template(tokenizer: Tokenizer) -> TextTemplate | None:
    """What stands around the texts of a row, as transformers puts it there for BERT and RoBERTa."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is None or eos is None:
        return None
    if tokenizer.piece_id("[CLS]") == bos and tokenizer.piece_id("[SEP]") == eos:
        return TextTemplate(before=(bos,), between=(eos,), behind=(eos,))
    if tokenizer.adds_bos and tokenizer.piece_id("<mask>") is not None:
        return TextTemplate(before=(bos,), between=(eos, eos), behind=(eos,))
    return None
