"""The Transformer: embedding, blocks and heads; it knows nothing of ranks, freezing or the optimizer.

Shape letters: B rows, T positions, N = B * T, C = d_model, V = padded_vocab_size, K classes.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distft.errors import ConfigError
from distft.model.attention import KVCache, RotaryCosSin, rotary_cos_sin
from distft.model.attention_kernels import AttentionMask, make_attention_mask
from distft.model.block import Block
from distft.model.config import (
    LANGUAGE_MODEL,
    ClassificationHead,
    EmbeddingHead,
    GeneratorHead,
    Head,
    Heads,
    LanguageModelHead,
    ModelConfig,
    TokenHead,
)
from distft.model.dropout import dropout, random_row_keys
from distft.model.layers import Linear, make_embedding, make_norm

# (hidden [N, C], weight [V, C]) -> what the caller computes from them, such as a summed loss
HiddenLossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class OutputProjection(Linear):
    """Logits over the vocabulary, or the result of a `HiddenLossFn`, which never needs all logits at once."""

    def forward(self, x_BTC: Tensor, loss_from_hidden: HiddenLossFn | None = None) -> Tensor:
        if loss_from_hidden is None:
            return super().forward(x_BTC)
        # The loss is computed here and not in the objective, because ZeRO 3 gathers a weight only during the
        # forward of the module that owns it.
        dtype = self.matmul_dtype(x_BTC)
        return loss_from_hidden(x_BTC.flatten(0, -2).to(dtype), self.weight.to(dtype))


class Embedding(nn.Module):
    """The pooled vector [B, C] of each row, as an `EmbeddingHead` describes it."""

    def __init__(self, head: EmbeddingHead) -> None:
        super().__init__()
        self.head = head
        if head.learns_temperature:
            self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self, x_BC: Tensor) -> Tensor:
        x_BC = x_BC.float()
        if self.head.normalize:
            x_BC = functional.normalize(x_BC, dim=-1)
        x_BC = x_BC * self.head.temperature**-0.5
        return x_BC * torch.exp(-0.5 * self.log_temperature.float()) if self.head.learns_temperature else x_BC


class Generator(nn.Module):
    """Blocks beside the model's from its embeddings to logits, as a `GeneratorHead` describes them."""

    def __init__(self, model: ModelConfig, head: GeneratorHead) -> None:
        super().__init__()
        config = head.config(model)
        self.input = Linear(model.d_model, config.d_model, bias=False)
        # Indices after the model's own, so that dropout draws other numbers.
        indices = range(model.num_layers, model.num_layers + head.num_layers)
        self.blocks = nn.ModuleList(Block(config, index) for index in indices)
        self.norm = make_norm(config)
        self.hidden = Linear(config.d_model, model.d_model, bias=False)
        self.output = OutputProjection(model.d_model, model.padded_vocab_size, bias=False)

    def forward(
        self,
        x_BTC: Tensor,
        rope: RotaryCosSin | None,
        mask: AttentionMask,
        dropout_keys_B: Tensor | None,
        loss_from_hidden: HiddenLossFn | None,
        *,
        recomputes_blocks: bool,
    ) -> Tensor:
        x_BTC = self.input(x_BTC)
        x_BTC = _run_blocks(self.blocks, x_BTC, rope, mask, dropout_keys_B, recompute=recomputes_blocks)
        output: Tensor = self.output(self.hidden(self.norm(x_BTC)), loss_from_hidden)
        return output


class Transformer(nn.Module):
    """Embedding, blocks, norm and one or more heads, by name. It has parameters only, no buffers.

    Build it under `torch.device("meta")` and fill it by name (`distft.model.initialisation`): on a real
    device its layers would draw their own weights, which the run's seed does not determine.
    """

    __call__: Callable[..., dict[str, Tensor]]

    def __init__(self, config: ModelConfig, heads: Heads = LANGUAGE_MODEL) -> None:
        super().__init__()
        self.config = config
        self.heads = dict(heads)
        self._recomputes_blocks = False
        self._rotary_cos_sin: Callable[..., RotaryCosSin] = rotary_cos_sin
        self.embed = make_embedding(config.padded_vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embed = make_embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = make_norm(config)
        for name, head in self.heads.items():
            if hasattr(self, name):
                raise ConfigError(
                    f"A head cannot have the name {name!r}: the model has a part of that name. Set head of "
                    "the objective to another name; in a mixture a part's head has the name of the part."
                )
            self.add_module(name, self._make_head(head))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        *,
        is_prefix: Tensor | None = None,
        heads: Collection[str] | None = None,
        losses_from_hidden: Mapping[str, HiddenLossFn] | None = None,
    ) -> dict[str, Tensor]:
        """The output of each of `heads` (None: all) by name.

        That is logits [B, T, V] of a language model or generator and [B, K] of a classifier, numbers
        [B, T, K] of a token head, vectors [B, C] of an embedding.

        `input_ids`, `position_ids` (None: 0, 1, 2, ...) and `document_ids` (tokens attend only to tokens with
        the same id) are int64 [B, T]; `lengths` is int64 [B], the number of real tokens at each row's start.
        `is_prefix` bool [B, T] marks tokens to which a causal model's earlier tokens attend, too.
        `dropout_keys` int64 [B] determine what training drops in each row; None: drawn at random.
        A language model's or generator's head `name` in `losses_from_hidden` returns
        `losses_from_hidden[name](hidden [N, C], weight [V, C])` in place of its logits.

        Raises `ConfigError` for rows longer than `max_seq_len`.
        """
        if input_ids.shape[1] > self.config.max_seq_len:
            raise ConfigError(
                f"A row of {input_ids.shape[1]} tokens is longer than model.max_seq_len="
                f"{self.config.max_seq_len}: shorten the rows, or raise it before pretraining."
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        # Mask and rotation angles are the same for all blocks, so they are computed once.
        mask = make_attention_mask(self.config, input_ids.shape, document_ids, lengths, is_prefix)
        if not self.training or not self.config.dropout:
            dropout_keys = None
        elif dropout_keys is None:
            dropout_keys = random_row_keys(len(input_ids), input_ids.device)
        x_BTC, rope = self._embed(input_ids, position_ids)
        if dropout_keys is not None:
            x_BTC = dropout(x_BTC, self.config.dropout, dropout_keys, site=0)
        names = list(self.heads if heads is None else heads)
        recompute = self._recomputes_blocks
        outputs = {}
        for name in names:
            if isinstance(self.heads[name], GeneratorHead):
                loss_fn, generator = (losses_from_hidden or {}).get(name), self.get_submodule(name)
                outputs[name] = generator(
                    x_BTC, rope, mask, dropout_keys, loss_fn, recomputes_blocks=recompute
                )
        if len(outputs) == len(names):
            return outputs
        x_BTC = self.norm(_run_blocks(self.blocks, x_BTC, rope, mask, dropout_keys, recompute=recompute))
        for name in names:
            if name not in outputs:
                outputs[name] = self._head_output(name, x_BTC, lengths, (losses_from_hidden or {}).get(name))
        return outputs

    def _head_output(
        self, name: str, x_BTC: Tensor, lengths: Tensor | None, loss_from_hidden: HiddenLossFn | None
    ) -> Tensor:
        """Of a head that reads the last hidden states."""
        head, module = self.heads[name], self.get_submodule(name)
        output: Tensor
        if isinstance(head, ClassificationHead | EmbeddingHead):
            output = module(_pool(x_BTC, lengths, head.pooling))
        elif isinstance(head, TokenHead):
            output = module(x_BTC)
        else:
            output = module(x_BTC, loss_from_hidden)
        return output

    def logits(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """The logits of a model with one head; the arguments are those of `forward`."""
        (logits,) = self(*args, **kwargs).values()
        return logits

    def forward_cached(
        self, input_ids: Tensor, position_ids: Tensor, kv_caches: Sequence[KVCache], mask: Tensor | None
    ) -> Tensor:
        """Logits [B, 1, V] after the last of the tokens `input_ids` [B, T], which continue the cached ones.

        For generation: appends the tokens' keys and values to `kv_caches`, one per block. `mask` is bool
        [B, 1, T, S] over the S positions cached by then; None in a causal model that starts empty.
        """
        x_BTC, rope = self._embed(input_ids, position_ids)
        for block, kv_cache in zip(self.blocks, kv_caches, strict=True):
            x_BTC = block(x_BTC, rope, mask, kv_cache=kv_cache)
        # Only the last position is sampled from, so a whole prompt needs V logits per row and not T * V.
        lm_head: OutputProjection = self.get_submodule("lm_head")  # type: ignore[assignment]
        return lm_head(self.norm(x_BTC[:, -1:]))

    def _make_head(self, head: Head) -> nn.Module:
        if isinstance(head, EmbeddingHead):
            return Embedding(head)
        if isinstance(head, GeneratorHead):
            generator = Generator(self.config, head)
            generator.output.weight = self.embed.weight
            return generator
        if not isinstance(head, LanguageModelHead):
            num_outputs = head.num_labels if isinstance(head, ClassificationHead) else head.num_outputs
            return Linear(self.config.d_model, num_outputs, bias=False)
        projection = OutputProjection(self.config.d_model, self.config.padded_vocab_size, bias=False)
        if self.config.tie_embeddings:
            projection.weight = self.embed.weight
        return projection

    def set_activation_checkpointing(self, mode: Literal["none", "selective", "full"]) -> None:
        """What the backward recomputes: nothing, all but products and attention, or whole blocks."""
        self._recomputes_blocks = mode == "full"
        for block in self._all_blocks():
            block.recomputes_selectively = mode == "selective"

    def compile_blocks(self) -> None:
        """Compile the training pass of each block, final norm and rotary angles, at their first calls.

        Compiling the whole model would unroll the cross entropy's chunks. Block by block, the step is as fast
        and compiling takes 2-12 s instead of 20 (6.9M parameters, 6 layers, one core).
        """
        for block in self._all_blocks():
            block.compile_training()
        # Cheap to compile for any shape at once, so these two are compiled for evaluation too.
        self.norm.forward = torch.compile(self.norm.forward, dynamic=True)
        self._rotary_cos_sin = torch.compile(rotary_cos_sin, dynamic=True)

    def _all_blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, RotaryCosSin | None]:
        x_BTC = self.embed(input_ids)
        rope = None
        if self.config.positions == "learned":
            x_BTC = x_BTC + self.position_embed(position_ids)
        else:
            rope = self._rotary_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta)
        return x_BTC, rope


def _run_blocks(
    blocks: Iterable[nn.Module],
    x_BTC: Tensor,
    rope: RotaryCosSin | None,
    mask: AttentionMask,
    dropout_keys_B: Tensor | None,
    *,
    recompute: bool,
) -> Tensor:
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            # Dropout depends on its keys alone, so the generators' states need no copy.
            x_BTC = checkpoint(
                block, x_BTC, rope, mask, dropout_keys_B, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x_BTC = block(x_BTC, rope, mask, dropout_keys_B)
    return x_BTC


def _pool(x_BTC: Tensor, lengths: Tensor | None, pooling: str) -> Tensor:
    """One vector per row, [B, C], from its real tokens."""
    if pooling == "first":
        return x_BTC[:, 0]
    if lengths is None:
        return x_BTC[:, -1] if pooling == "last" else x_BTC.mean(dim=1)
    # Lengths are clamped because a row may be padding alone: length 0.
    if pooling == "last":
        rows = torch.arange(x_BTC.shape[0], device=x_BTC.device)
        return x_BTC[rows, (lengths - 1).clamp_min(0)]
    is_real_BT = torch.arange(x_BTC.shape[1], device=x_BTC.device) < lengths[:, None]
    total_BC = (x_BTC * is_real_BT[..., None]).sum(dim=1)
    return total_BC / lengths.clamp_min(1)[:, None].to(x_BTC.dtype)
