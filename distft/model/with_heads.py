"""What all models share: embedding, a backbone of the model's own, and heads by name.

It knows nothing of ranks, freezing or the optimizer.
Shape letters: B rows, T positions, N = B * T, C = d_model, H = output_size, V = padded_vocab_size, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from distft.errors import ConfigError
from distft.model.config import ModelConfig, TokenModelConfig
from distft.model.dropout import dropout, embedding_noise, random_row_keys
from distft.model.heads import (
    CLASSIFIER_NORM_EPS,
    LANGUAGE_MODEL,
    ClassificationHead,
    EmbeddingHead,
    GeneratorHead,
    Head,
    Heads,
    LanguageModelHead,
    TokenHead,
)
from distft.model.layers import Linear, make_embedding
from distft.model.layout import ROUTING, HiddenLosses, HiddenLossFn, RowKeys, RowLayout, set_row_keys


class OutputProjection(Linear):
    """Logits over the vocabulary, or the result of a `HiddenLossFn`, which never needs all logits at once."""

    softcap: float | None = None  # logits x become softcap * tanh(x / softcap)
    multiplier: float | None = None  # of the products, before a bias and the cap

    def forward(self, x_BTH: Tensor, loss_from_hidden: HiddenLossFn | None = None) -> Tensor:
        if self.multiplier is not None:
            x_BTH = x_BTH * self.multiplier
        if loss_from_hidden is None:
            logits = super().forward(x_BTH)
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        # The loss is computed here and not in the objective, because ZeRO 3 gathers a weight only during the
        # forward of the module that owns it.
        dtype = self.matmul_dtype(x_BTH)
        x_NH, weight_VH = x_BTH.flatten(0, -2).to(dtype), self.weight.to(dtype)
        if self.bias is not None:
            x_NH, weight_VH = _with_bias_columns(x_NH, weight_VH, self.bias.to(dtype))
        options = {} if self.softcap is None else {"softcap": self.softcap}
        return loss_from_hidden(x_NH, weight_VH, **options)


_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu_norm": functional.gelu}  # of one with a layer
_ADAPTER_DROPOUT_SITE = 1 << 20  # of the first adapter, behind those of the models
_BIAS_COLUMNS = 8  # GPUs multiply fast if widths are multiples of it


def _with_bias_columns(x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and weight whose product includes the bias: it is the weight of an element that is 1."""
    one_and_zeros = x_NH.new_zeros(_BIAS_COLUMNS)
    one_and_zeros[0] = 1
    columns_V = functional.pad(bias_V[:, None], (0, _BIAS_COLUMNS - 1))
    x_NH = torch.cat([x_NH, one_and_zeros.expand(len(x_NH), -1)], dim=1)
    return x_NH, torch.cat([weight_VH, columns_V], dim=1)


class HiddenClassifier(nn.Module):
    """The classifier of BERT's relatives: a dense layer with an activation, then the output, with biases.

    ModernBERT's has a norm in between, and in place of the layer's bias that norm's weight.
    """

    def __init__(self, size: int, head: ClassificationHead) -> None:
        super().__init__()
        has_norm = head.hidden == "gelu_norm"
        self.hidden = Linear(size, size, bias=not has_norm)
        self.norm = nn.LayerNorm(size, eps=CLASSIFIER_NORM_EPS, bias=False) if has_norm else nn.Identity()
        self.output = Linear(size, head.num_labels, bias=True)
        self.activation = _ACTIVATIONS[head.hidden]

    def forward(self, x_BH: Tensor) -> Tensor:
        return self.output(self.norm(self.activation(self.hidden(x_BH))))


class Embedding(nn.Module):
    """The pooled vector [B, H] of each row, as an `EmbeddingHead` describes it."""

    def __init__(self, head: EmbeddingHead) -> None:
        super().__init__()
        self.head = head
        if head.learns_temperature:
            self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self, x_BH: Tensor) -> Tensor:
        x_BH = x_BH.float()
        if self.head.normalize:
            x_BH = functional.normalize(x_BH, dim=-1)
        x_BH = x_BH * self.head.temperature**-0.5
        return x_BH * torch.exp(-0.5 * self.log_temperature.float()) if self.head.learns_temperature else x_BH


class ModelWithHeads(nn.Module, ABC):
    """Embedding, backbone and one or more heads, by name. It has parameters only, no buffers.

    Build it under `torch.device("meta")` and fill it by name (`distft.model.initialisation`): on a real
    device its layers would draw their own weights, which the run's seed does not determine.

    A subclass makes its layers in `make_backbone`, runs them in `encode`, and in `encode_cached` to generate.
    """

    __call__: Callable[..., dict[str, Tensor]]
    adapter_keys: Sequence[RowKeys] = ()  # of adapters with dropout (`distft.model.lora`)
    runs_layers_on_rows = True  # whether linear layers get positions row by row, which that dropout needs

    def __init__(self, config: ModelConfig, heads: Heads = LANGUAGE_MODEL) -> None:
        super().__init__()
        self.config = config
        self.heads = dict(heads)
        self.make_inputs()
        self.make_backbone()
        for name, head in self.heads.items():
            if hasattr(self, name):
                raise ConfigError(
                    f"A head cannot have the name {name!r}: the model has a part of that name. Set head of "
                    "the objective to another name; in a mixture a part's head has the name of the part."
                )
            self.add_module(name, self.make_head(head))

    def make_inputs(self) -> None:
        """Add the layers that read the inputs."""
        config = self._token_config
        self.embed = make_embedding(config.padded_vocab_size, config.d_model)

    @property
    def _token_config(self) -> TokenModelConfig:
        """`config`, of a model that reads tokens."""
        assert isinstance(self.config, TokenModelConfig)
        return self.config

    @abstractmethod
    def make_backbone(self) -> None:
        """Add the layers between inputs and heads."""

    @abstractmethod
    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:
        """Hidden states [B, T, H] of embedded rows. `dropout_keys_B` is given in training with dropout only.

        What it returns for padding is not read.
        """

    def encode_with_routing(
        self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`encode`, and the `routing_sums` of each layer with experts [L, 2 + E]; None: without gradient."""
        return self.encode(x_BTC, layout, dropout_keys_B), None

    def new_caches(self, num_positions: int) -> Sequence[Any]:
        """What `encode_cached` remembers of up to `num_positions` positions, empty."""
        raise NotImplementedError

    def encode_cached(
        self, x_BTC: Tensor, position_ids: Tensor, caches: Sequence[Any], num_padding_B: Tensor | None
    ) -> Tensor:
        """Hidden states [B, T, H] of tokens that continue those in `caches`, to which it adds them.

        Row b has `num_padding_B[b]` tokens of padding before its first real one; None: no row has any.
        """
        raise NotImplementedError

    def set_activation_checkpointing(self, mode: Literal["none", "selective", "full"]) -> None:
        """What the backward recomputes: nothing, all but products and attention, or whole blocks."""
        if mode != "none":
            raise ConfigError(
                f"engine.activation_checkpointing={mode}: only the blocks of model.type=transformer can be "
                "recomputed. Set engine.activation_checkpointing=none."
            )

    def compile_blocks(self) -> None:
        """Compile what trains, where torch.compile makes it faster; by default nothing."""

    @property
    def fp8_layers(self) -> nn.Module | None:
        """The layers whose products can be in FP8; None: the model has none."""
        return None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        *,
        is_prefix: Tensor | None = None,
        segment_ids: Tensor | None = None,
        images: Tensor | None = None,
        heads: Collection[str] | None = None,
        losses_from_hidden: HiddenLosses | None = None,
        tells_routing: bool = False,
    ) -> dict[str, Tensor]:
        """The output of each of `heads` (None: all) by name.

        That is logits [B, T, V] of a language model or generator and [B, K] of a classifier, numbers
        [B, T, K] of a token head, vectors [B, H] of an embedding.

        `input_ids`, `position_ids` (None: 0, 1, 2, ...) and `document_ids` (tokens see only tokens with
        the same id) are int64 [B, T]; `lengths` is int64 [B], the number of real tokens at each row's start.
        `is_prefix` bool [B, T] marks tokens that a causal model's earlier tokens see, too.
        `segment_ids` int64 [B, T] (None: 0 everywhere) say which text of a pair a token is of.
        `images` uint8 [B, channels, height, width] are read by models of images, which ignore the tokens, and
        by models of images with texts.
        `dropout_keys` int64 [B] determine what training drops and adds in each row; None: drawn at random.
        A language model's or generator's head `name` in `losses_from_hidden` returns
        `losses_from_hidden[name](hidden [N, H], weight [V, H])` in place of its logits.
        With `tells_routing`, a pass with gradient through experts has one more output, `ROUTING`: what
        `encode_with_routing` returns.

        Raises `ConfigError` for rows longer than `max_seq_len`, and for segment ids that the model has no row
        for.
        """
        layout = self.layout_of(input_ids, position_ids, document_ids, lengths, is_prefix)
        if self.adapter_keys and self.training:
            if dropout_keys is None:
                dropout_keys = random_row_keys(len(input_ids), input_ids.device)
            set_row_keys(self.adapter_keys, dropout_keys, _ADAPTER_DROPOUT_SITE)
        if not self.training or not (self.config.has_dropout or self.config.has_noise):
            dropout_keys = None
        elif dropout_keys is None:
            dropout_keys = random_row_keys(len(input_ids), input_ids.device)
        x_BTC = self.embed_inputs(input_ids, layout, segment_ids, images, dropout_keys)
        if not self.config.has_dropout:
            dropout_keys = None  # with them attention would be written out, to drop nothing
        losses = losses_from_hidden or {}
        names = list(self.heads if heads is None else heads)
        outputs = self.outputs_beside_backbone(names, x_BTC, layout, dropout_keys, losses)
        if set(names) - set(outputs):
            x_BTH, routing = self.encode_with_routing(x_BTC, layout, dropout_keys)
            if tells_routing and routing is not None:
                outputs[ROUTING] = routing
            for name in names:
                if name not in outputs:
                    outputs[name] = self._head_output(name, x_BTH, layout.lengths, losses.get(name))
        return outputs

    def layout_of(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        is_prefix: Tensor | None = None,
    ) -> RowLayout:
        """The layout of the backbone's input. Raises `ConfigError` for rows that are too long."""
        if input_ids.shape[1] > self.config.longest_row:
            raise ConfigError(
                f"A row of {input_ids.shape[1]} tokens is longer than model.max_seq_len="
                f"{self.config.longest_row}: shorten the rows, or raise it before pretraining."
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return RowLayout(
            shape=input_ids.shape,
            position_ids=position_ids,
            document_ids=document_ids,
            lengths=lengths,
            is_prefix=is_prefix,
        )

    def embed_inputs(
        self,
        input_ids: Tensor,
        layout: RowLayout,
        segment_ids: Tensor | None = None,
        images: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """The backbone's input, [B, T, C] with the T of `layout`. Raises `ConfigError` for other inputs."""
        if images is not None:
            raise ConfigError("The rows have images, and this model reads tokens alone: leave images out.")
        noise_BTC, config = None, self._token_config
        if dropout_keys_B is not None and config.has_noise:
            shape = (*input_ids.shape, config.d_model)
            noise_BTC = embedding_noise(shape, config.neftune_alpha, dropout_keys_B, layout.lengths)
        x_BTC = self.embed_tokens(input_ids, layout.position_ids, segment_ids, noise_BTC)
        if dropout_keys_B is None or not config.has_dropout:
            return x_BTC
        return dropout(x_BTC, config.dropout, dropout_keys_B, site=0)

    def embed_tokens(
        self,
        input_ids: Tensor,
        position_ids: Tensor,  # noqa: ARG002
        segment_ids: Tensor | None = None,
        noise_BTC: Tensor | None = None,
    ) -> Tensor:
        """The backbone's input [B, T, C]; `noise_BTC` is added to the vectors of the tokens."""
        if segment_ids is not None:
            raise ConfigError(
                "The rows have segment ids, and this model has no segments: leave them out, or take "
                "model.type=transformer with model.num_segments=2."
            )
        return self.token_vectors(input_ids, noise_BTC)

    def token_vectors(self, input_ids: Tensor, noise_BTC: Tensor | None) -> Tensor:
        """What the table of tokens has for them [B, T, C], and the noise."""
        x_BTC: Tensor = self.embed(input_ids)
        return x_BTC if noise_BTC is None else x_BTC + noise_BTC.to(x_BTC.dtype)

    def outputs_beside_backbone(
        self,
        names: Sequence[str],  # noqa: ARG002
        x_BTC: Tensor,  # noqa: ARG002
        layout: RowLayout,  # noqa: ARG002
        dropout_keys_B: Tensor | None,  # noqa: ARG002
        losses: HiddenLosses,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """The outputs of those of the heads `names` that do not read the backbone's hidden states."""
        return {}

    def logits(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """The logits of a model with one head; the arguments are those of `forward`."""
        (logits,) = self(*args, **kwargs).values()
        return logits

    def forward_cached(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        caches: Sequence[Any],
        num_padding_B: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, 1, V] after the last of the tokens `input_ids` [B, T], which continue the cached ones.

        For generation; `num_padding_B` as for `encode_cached`.
        """
        x_BTC = self.embed_tokens(input_ids, position_ids)
        x_BTH = self.encode_cached(x_BTC, position_ids, caches, num_padding_B)
        # Only the last position is sampled from, so a whole prompt needs V logits per row and not T * V.
        lm_head: OutputProjection = self.get_submodule("lm_head")  # type: ignore[assignment]
        return lm_head(x_BTH[:, -1:])

    def make_head(self, head: Head) -> nn.Module:
        """The module of `head`. Raises `ConfigError` for one that this model cannot have."""
        size = self.config.output_size
        if isinstance(head, EmbeddingHead):
            return Embedding(head)
        if isinstance(head, ClassificationHead):
            if head.hidden != "none":
                return HiddenClassifier(size, head)
            return Linear(size, head.num_labels, bias=False)
        if isinstance(head, TokenHead):
            return Linear(size, head.num_outputs, bias=False)
        if isinstance(head, GeneratorHead):
            # In the words of the objective's own check, beside which it is then not told again.
            raise ConfigError(
                "objective.type=replaced_token needs model.type=transformer: its generator has a "
                "Transformer's blocks. Set one of them anew."
            )
        return self.tied(OutputProjection(size, self.config.padded_vocab_size, bias=False))

    def tied(self, projection: OutputProjection) -> OutputProjection:
        """`projection` with the embedding as its weight, if the configuration ties them."""
        if self._token_config.tie_embeddings:
            projection.weight = self.embed.weight
        return projection

    def _head_output(
        self, name: str, x_BTH: Tensor, lengths: Tensor | None, loss_from_hidden: HiddenLossFn | None
    ) -> Tensor:
        """Of a head that reads the last hidden states."""
        head, module = self.heads[name], self.get_submodule(name)
        output: Tensor
        if isinstance(head, ClassificationHead | EmbeddingHead):
            output = module(pool(x_BTH, lengths, head.pooling))
        elif isinstance(head, LanguageModelHead):
            output = module(x_BTH, loss_from_hidden)
        else:
            output = module(x_BTH)
        return output


def pool(x_BTH: Tensor, lengths: Tensor | None, pooling: str) -> Tensor:
    """One vector per row, [B, H], from its real tokens; of a row of padding alone any finite one."""
    if pooling == "first":
        return x_BTH[:, 0]
    if lengths is None:
        lengths = torch.full((len(x_BTH),), x_BTH.shape[1], device=x_BTH.device)
    # Lengths are clamped because a row may be padding alone: length 0.
    lengths = lengths.clamp_min(1)
    if pooling == "last":
        return x_BTH[torch.arange(len(x_BTH), device=x_BTH.device), lengths - 1]
    is_real_BT1 = (torch.arange(x_BTH.shape[1], device=x_BTH.device) < lengths[:, None])[..., None]
    if pooling == "max":
        return x_BTH.masked_fill(~is_real_BT1, -torch.inf).amax(dim=1)
    # Padding is selected away and not multiplied by 0: it may be infinite.
    return torch.where(is_real_BT1, x_BTH, 0).sum(dim=1) / lengths[:, None].to(x_BTH.dtype)
