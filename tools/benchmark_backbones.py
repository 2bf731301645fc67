"""Every type of model beside its plainest counterpart: torch's own modules, or transformers' model.

Both compute the same loss of the same batches. Token models predict the next token at every position, the
bidirectional ones too: it costs what any other target costs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from distft.config import parse
from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.model.config import ModelConfig
from distft.model.settings import AnyModelConfig
from distft.objective.interface import Objective
from distft.objective.settings import CausalLM, Classification, SpanCorruption

VOCAB_SIZE, D_MODEL, NUM_HEADS, D_FF = 8192, 256, 8, 1024
LABELS = tuple("0123456789")
Counterpart = tuple[nn.Module, Callable[[Batch], Tensor]]  # the module, and its mean loss of a batch


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model, what it learns, and the same model as others write it."""

    settings: Mapping[str, object]
    counterpart: Callable[[Any, int], Counterpart]  # of the model, for rows of this many tokens
    what: str  # the counterpart's name

    def model(self, seq_len: int) -> ModelConfig:
        settings = dict(self.settings)
        if "image_size" not in settings:
            settings = {
                "vocab_size": VOCAB_SIZE,
                "max_seq_len": seq_len,
                "d_model": D_MODEL,
                "tie_embeddings": False,
                **settings,
            }
        model: ModelConfig = parse(AnyModelConfig, settings)
        return model

    @property
    def reads_images(self) -> bool:
        return "image_size" in self.settings

    def objective(self, model: ModelConfig) -> Objective:
        if self.reads_images:
            return Classification().resolved(model, None)
        return SpanCorruption() if self.settings["type"] == "encoder_decoder" else CausalLM()


def make_backbone_batches(backbone: Backbone, rows: int, seq_len: int, device: torch.device) -> list[Batch]:
    """Four batches of random rows; an encoder-decoder's rows are source and target, half and half."""
    generator = torch.Generator().manual_seed(0)
    return [_random_batch(backbone, rows, seq_len, generator).to(device) for _ in range(4)]


def _random_batch(backbone: Backbone, rows: int, seq_len: int, generator: torch.Generator) -> Batch:
    if backbone.reads_images:
        shape = (rows, *(backbone.model(seq_len).image_shape or ()))
        return Batch(
            input_ids=torch.zeros(rows, 1, dtype=torch.int64),
            images=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            targets={"label": torch.randint(0, len(LABELS), (rows,), generator=generator)},
            num_targets={"label": rows},
        )
    ids = torch.randint(0, VOCAB_SIZE, (rows, seq_len + 1), generator=generator)
    targets, is_prefix = ids[:, 1:].clone(), None
    if backbone.settings["type"] == "encoder_decoder":
        is_prefix = (torch.arange(seq_len) < seq_len // 2).expand(rows, -1)
        targets[:, : seq_len // 2 - 1] = IGNORE_INDEX  # the decoder begins at the source's last token
    return Batch(
        input_ids=ids[:, :-1],
        is_prefix=is_prefix,
        targets={NEXT_TOKEN: targets},
        num_targets={NEXT_TOKEN: int((targets != IGNORE_INDEX).sum())},
    )


def _language_model(module: nn.Module, logits_of: Callable[[Tensor], Tensor]) -> Counterpart:
    def loss(batch: Batch) -> Tensor:
        logits = logits_of(batch.input_ids)
        return cross_entropy(logits.flatten(0, 1), batch.targets[NEXT_TOKEN].flatten())

    return module, loss


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], num_layers: int, d_hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, D_MODEL)
        self.layers = kind(D_MODEL, d_hidden, num_layers, batch_first=True)
        self.head = nn.Linear(d_hidden, VOCAB_SIZE, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embed(ids_BT))[0])
        return logits


def _recurrent(model: Any, _: int) -> Counterpart:
    kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[model.type]
    module = _Recurrent(kind, model.num_layers, model.d_hidden)
    return _language_model(module, module)


class _Convolutional(nn.Module):
    def __init__(self, sizes: tuple[int, ...], num_filters: int, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, D_MODEL)
        widths = [D_MODEL, *[len(sizes) * num_filters] * num_layers]
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(width, num_filters, size) for size in sizes) for width in widths[:-1]
        )
        self.head = nn.Linear(widths[-1], VOCAB_SIZE, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BCT = self.embed(ids_BT).transpose(1, 2)
        layers: Iterable[Iterable[nn.Conv1d]] = self.layers  # type: ignore[assignment]
        for layer in layers:
            outputs = [kernel(pad(x_BCT, (kernel.kernel_size[0] - 1, 0))) for kernel in layer]
            x_BCT = torch.relu(torch.cat(outputs, dim=1))
        logits: Tensor = self.head(x_BCT.transpose(1, 2))
        return logits


def _convolutional(model: Any, _: int) -> Counterpart:
    module = _Convolutional(model.kernel_sizes, model.num_filters, model.num_layers)
    return _language_model(module, module)


class _DeepAveraging(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, D_MODEL)
        self.layers = nn.Sequential(
            *[part for _ in range(num_layers) for part in (nn.Linear(D_MODEL, D_MODEL), nn.ReLU())]
        )
        self.head = nn.Linear(D_MODEL, VOCAB_SIZE, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.embed(ids_BT).double().cumsum(1).float()
        counts_T = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)
        logits: Tensor = self.head(self.layers(x_BTC / counts_T[:, None]))
        return logits


def _deep_averaging(model: Any, _: int) -> Counterpart:
    module = _DeepAveraging(model.num_layers)
    return _language_model(module, module)


def _bert(model: Any, seq_len: int) -> Counterpart:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=D_MODEL,
        num_hidden_layers=model.num_layers,
        num_attention_heads=NUM_HEADS,
        intermediate_size=D_FF,
        max_position_embeddings=seq_len,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=False,
    )
    module = BertForMaskedLM(config)
    return _language_model(module, lambda ids_BT: module(ids_BT).logits)


def _experts(model: Any, seq_len: int) -> Counterpart:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=D_MODEL,
        num_hidden_layers=model.num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        intermediate_size=D_FF,
        max_position_embeddings=seq_len,
        num_local_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    module = MixtralForCausalLM(config)
    return _language_model(module, lambda ids_BT: module(ids_BT).logits)


def _encoder_decoder(model: Any, seq_len: int) -> Counterpart:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=D_MODEL,
        d_kv=D_MODEL // NUM_HEADS,
        d_ff=D_FF,
        num_layers=model.num_encoder_layers,
        num_heads=NUM_HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    module = T5ForConditionalGeneration(config)
    half = seq_len // 2

    def loss(batch: Batch) -> Tensor:
        labels_BD = batch.targets[NEXT_TOKEN][:, half - 1 :].contiguous()
        output: Tensor = module(input_ids=batch.input_ids[:, :half], labels=labels_BD).loss
        return output

    return module, loss


def _vit(model: Any, _: int) -> Counterpart:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=model.num_layers,
        num_attention_heads=NUM_HEADS,
        intermediate_size=D_FF,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_labels=len(LABELS),
    )
    module = ViTForImageClassification(config)
    return _classifier(module, lambda pixels: module(pixels).logits)


def _image_cnn(model: Any, _: int) -> Counterpart:
    parts: list[nn.Module] = []
    for channels, filters in zip(model.input_channels, model.num_filters, strict=True):
        parts += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = nn.Linear(model.num_filters[-1], len(LABELS), bias=False)
    module = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return _classifier(module, module)


def _classifier(module: nn.Module, logits_of: Callable[[Tensor], Tensor]) -> Counterpart:
    def loss(batch: Batch) -> Tensor:
        assert batch.images is not None
        return cross_entropy(logits_of(batch.images.float() / 127.5 - 1), batch.targets["label"])

    return module, loss


_WIDTHS = {"d_model": D_MODEL, "num_heads": NUM_HEADS, "d_ff": D_FF}
_BERT = {
    "type": "transformer",
    **_WIDTHS,
    "num_layers": 4,
    "attention": "bidirectional",
    "norm": "layernorm",
    "norm_position": "post",
    "norm_eps": 1e-12,
    "embedding_norm": True,
    "positions": "learned",
    "num_segments": 2,
    "mlp": "gelu_exact",
    "mlp_bias": True,
    "attention_bias": True,
    "lm_head_transform": True,
}
BACKBONES = {
    **{
        kind: Backbone(
            settings={"type": kind, "num_layers": 2}, counterpart=_recurrent, what=f"torch.nn.{kind.upper()}"
        )
        for kind in ("rnn", "lstm", "gru")
    },
    "cnn": Backbone(
        settings={"type": "cnn", "num_layers": 2, "num_filters": 85},
        counterpart=_convolutional,
        what="torch.nn.Conv1d",
    ),
    "deep_averaging": Backbone(
        settings={"type": "deep_averaging", "num_layers": 2},
        counterpart=_deep_averaging,
        what="cumsum and torch.nn.Linear",
    ),
    "bert": Backbone(settings=_BERT, counterpart=_bert, what="transformers' Bert"),
    "experts": Backbone(
        settings={
            "type": "transformer",
            **_WIDTHS,
            "num_layers": 4,
            "experts": {"num_experts": 8, "experts_per_token": 2, "load_balance_weight": 0.0},
        },
        counterpart=_experts,
        what="transformers' Mixtral",
    ),
    "encoder_decoder": Backbone(
        settings={
            "type": "encoder_decoder",
            "d_model": D_MODEL,
            "num_heads": NUM_HEADS,
            "d_ff": D_FF,
            "num_encoder_layers": 3,
            "tie_embeddings": True,
        },
        counterpart=_encoder_decoder,
        what="transformers' T5",
    ),
    "vit": Backbone(
        settings={"type": "vit", **_WIDTHS, "num_layers": 4, "image_size": 32, "patch_size": 4},
        counterpart=_vit,
        what="transformers' ViT",
    ),
    "image_cnn": Backbone(
        settings={"type": "image_cnn", "num_filters": [32, 64, 128], "image_size": 32},
        counterpart=_image_cnn,
        what="torch.nn.Conv2d",
    ),
}
