"""Number of parameters and FLOPs, computed from the configuration alone."""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from distft.model.config import ModelConfig, TokenModelConfig
from distft.model.heads import (
    LANGUAGE_MODEL,
    ClassificationHead,
    EmbeddingHead,
    GeneratorHead,
    Head,
    Heads,
    TokenHead,
)
from distft.model.lora_config import is_adapter
from distft.model.products import Product
from distft.model.transformer_config import TransformerConfig

_EMBEDDINGS = ("embed.", "position_embed.", "segment_embed.", "embed_norm.")  # before all blocks


def num_parameters(config: ModelConfig, heads: Heads = LANGUAGE_MODEL) -> int:
    """Elements of all parameters; tied embeddings count once."""
    total = config.num_embedding_parameters + config.num_backbone_parameters()
    for head in heads.values():
        if isinstance(head, EmbeddingHead):
            total += head.learns_temperature
        elif isinstance(head, GeneratorHead):
            total += _num_generator_parameters(_transformer(config), head)
        elif isinstance(head, ClassificationHead | TokenHead):
            width, num_outputs = config.output_size, _num_outputs(head)
            total += width * num_outputs
            if has_hidden_layer(head):
                total += (width + 1) * width + num_outputs
        else:
            if not _of_tokens(config).tie_embeddings:
                total += config.padded_vocab_size * config.output_size
            if _has_transform(config):
                norm_numel = _transformer(config).norm_numel
                num_rows = config.output_size + _transformer(config).lm_head_transform_bias
                total += num_rows * config.output_size + norm_numel + config.padded_vocab_size
    return total


def num_active_parameters(config: ModelConfig, heads: Heads = LANGUAGE_MODEL) -> int:
    """Elements of the parameters that one token passes through: not those of experts that it leaves out."""
    return num_parameters(config, heads) - config.num_idle_parameters


def has_hidden_layer(head: Head) -> bool:
    """Whether the head is a classifier with a layer before its output."""
    return isinstance(head, ClassificationHead) and head.hidden != "none"


def _has_transform(config: ModelConfig) -> bool:
    return isinstance(config, TransformerConfig) and config.lm_head_transform


def _num_generator_parameters(config: TransformerConfig, head: GeneratorHead) -> int:
    own = head.config(config)
    blocks = own.num_layers * own.num_block_parameters()
    return 2 * config.d_model * own.d_model + blocks + own.has_final_norm * own.norm_numel


def _transformer(config: ModelConfig) -> TransformerConfig:
    """`config`, which has a head or setting that only a Transformer can have."""
    if not isinstance(config, TransformerConfig):
        raise TypeError(f"{type(config).__name__} has no blocks")
    return config


def _of_tokens(config: ModelConfig) -> TokenModelConfig:
    """`config`, which has a language model's head."""
    if not isinstance(config, TokenModelConfig):
        raise TypeError(f"{type(config).__name__} has no vocabulary")
    return config


def _num_outputs(head: ClassificationHead | TokenHead) -> int:
    return head.num_labels if isinstance(head, ClassificationHead) else head.num_outputs


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of matrix products; a multiply-add counts 2.

    `per_token` is the cost of a token in the linear layers, `per_pair` that of a query and a key of the same
    document in attention, `per_local_pair` in the layers with a window. `num_attention_pairs` counts both.
    """

    per_token: float
    per_pair: float
    per_local_pair: float = 0.0

    def of(self, num_tokens: int, num_pairs: int, num_local_pairs: int | None = None) -> float:
        """`num_local_pairs` None: no document is longer than the window."""
        if num_local_pairs is None:
            num_local_pairs = num_pairs
        pairs = self.per_pair * num_pairs + self.per_local_pair * num_local_pairs
        return self.per_token * num_tokens + pairs

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.per_token + other.per_token,
            self.per_pair + other.per_pair,
            self.per_local_pair + other.per_local_pair,
        )

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.per_token * factor, self.per_pair * factor, self.per_local_pair * factor)


def num_attention_pairs(num_tokens: int, reach: int | None = None) -> int:
    """Queries and keys of a document that are at most `reach` positions apart; None: all.

    Causal attention counts the pairs that it does not see too, although kernels skip that half: so does the
    usual definition of MFU (PaLM, Chowdhery et al. 2022, appendix B).
    """
    num_apart = 0 if reach is None else max(num_tokens - 1 - reach, 0)
    return num_tokens**2 - num_apart * (num_apart + 1)


def forward_flops(config: ModelConfig, seq_len: int, heads: Heads = LANGUAGE_MODEL) -> Flops:
    """FLOPs of the forward pass over rows of `seq_len` tokens; a classifier's head runs once per row."""
    products = [product for chain in _chains(config, seq_len, heads) for product in chain]
    return Flops(
        2 * sum(p.numel for p in products),
        sum(p.flops_per_pair for p in products),
        sum(p.flops_per_local_pair for p in products),
    )


def training_flops(
    config: ModelConfig,
    seq_len: int,
    heads: Heads = LANGUAGE_MODEL,
    trainable: Collection[str] | None = None,
) -> Flops:
    """FLOPs of forward and backward; `trainable` are the names of the parameters that train, None: all.

    The backward computes the gradient of a product's weight if that trains, and of its input if anything
    before it trains. So a fine-tune of the last blocks costs little more than a forward.
    """
    names = None if trainable is None else sorted(trainable)
    # Those of adapters are small, and not counted.
    weights = None if names is None else [name for name in names if not is_adapter(name)]

    def trains(*prefixes: str) -> bool:
        return names is None or any(_has_prefix(names, prefix) for prefix in prefixes)

    def trains_weight(name: str) -> bool:
        return weights is None or _has_prefix(weights, name)

    per_token, per_pair, per_local_pair = 0.0, 0.0, 0.0
    for chain in _chains(config, seq_len, heads):
        has_trainable_before = trains(*_EMBEDDINGS)
        for product in chain:
            has_trainable_before = has_trainable_before or trains(*product.before)
            needs_input_gradient = has_trainable_before or trains(*product.before_alone)
            if product.depends_on is not None:
                needs_input_gradient = bool(product.depends_on) and trains(*product.depends_on)
            per_token += 2 * product.numel * (needs_input_gradient + trains_weight(product.name))
            if product.flops_per_pair or product.flops_per_local_pair:
                has_trainable_before = has_trainable_before or trains(
                    *_attention_inputs(product.name[: -len("v.")])
                )
                per_pair += 2 * product.flops_per_pair * has_trainable_before
                per_local_pair += 2 * product.flops_per_local_pair * has_trainable_before
    return forward_flops(config, seq_len, heads) + Flops(per_token, per_pair, per_local_pair)


def recomputed_flops(config: TransformerConfig, trainable: Collection[str] | None = None) -> Flops:
    """FLOPs that full activation checkpointing adds: a second forward of each block that has a backward.

    It ends before the block's last product, `mlp.down`, unless a norm or the weights of experts follow that:
    the backward does not need its result.
    """
    blocks = [f"blocks.{index}." for index in range(config.num_layers)]
    names = None if trainable is None else sorted(trainable)
    first = 0
    if names is not None and not any(_has_prefix(names, prefix) for prefix in _EMBEDDINGS):
        first = next((i for i, block in enumerate(blocks) if _has_prefix(names, block)), len(blocks))
    recomputed = range(first, config.num_layers)
    numel = 0.0
    for index in recomputed:
        experts = config.experts_of(index)
        products = list(config.block_products(blocks[index], has_window=False, experts=experts))
        if config.norm_position == "pre" and experts is None:
            products.pop()
        elif names is not None and index == first and config.norm_position == "pre":
            products = _up_to_shared_expert(products, blocks[index], names)
        numel += sum(product.numel for product in products)
    num_local = sum(config.has_window(index) for index in recomputed)
    return Flops(
        2.0 * numel,
        config.flops_per_pair * (len(recomputed) - num_local),
        config.flops_per_pair * num_local,
    )


def _up_to_shared_expert(products: list[Product], block: str, trainable: Sequence[str]) -> list[Product]:
    """Those that are computed again in the first block with a backward, one of experts.

    If its shared expert alone trains, nothing behind that, and not its last product unless a gate follows.
    """
    shared, gate = f"{block}mlp.shared.", f"{block}mlp.shared_gate."
    own = [name for name in trainable if name.startswith(block)]
    if not own or not all(name.startswith((shared, gate)) for name in own):
        return products
    has_gate = any(product.name == gate for product in products)
    needed = [p for p in products if p.name.startswith((f"{block}attn.", shared, gate))]
    return [p for p in needed if has_gate or p.name != f"{shared}down."]


def _has_prefix(names: Sequence[str], prefix: str) -> bool:
    """Whether one of the sorted `names` begins with `prefix`: found in log time, as deep models have many."""
    index = bisect_left(names, prefix)
    return index < len(names) and names[index].startswith(prefix)


def _attention_inputs(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}{name}." for name in ("q", "k", "v", "q_norm", "k_norm"))


def _chains(config: ModelConfig, seq_len: int, heads: Heads) -> list[list[Product]]:
    """The products of the model, and of each generator beside it, in the order of the forward pass."""
    generators = {name: head for name, head in heads.items() if isinstance(head, GeneratorHead)}
    chains = [_generator_products(_transformer(config), name, head) for name, head in generators.items()]
    if len(generators) < len(heads) or not heads:
        *others, last = config.product_chains(seq_len)
        chains += [[*products] for products in others]
        chains.append([*last, *_head_products(config, seq_len, heads)])
    return chains


def _head_products(config: ModelConfig, seq_len: int, heads: Heads) -> Iterator[Product]:
    before_heads = ("blocks.", "norm.", "encoder.", "decoder.")  # of every backbone
    for name, head in heads.items():
        if isinstance(head, ClassificationHead | TokenHead):
            width, num_uses = config.output_size, 1 / seq_len if isinstance(head, ClassificationHead) else 1
            numel = width * _num_outputs(head) * num_uses
            if has_hidden_layer(head):
                hidden = f"{name}.hidden."
                yield Product(hidden, width**2 * num_uses, before_heads)
                yield Product(f"{name}.output.", numel, before_alone=(hidden, f"{name}.norm."))
            else:
                yield Product(f"{name}.", numel, before_heads)
        elif not isinstance(head, EmbeddingHead | GeneratorHead):
            weight = "embed." if _of_tokens(config).tie_embeddings else f"{name}.weight"
            numel = config.output_size * config.padded_vocab_size
            if _has_transform(config):
                yield Product(f"{name}.dense.", config.output_size**2, before_heads)
                yield Product(weight, numel, before_alone=(f"{name}.dense.", f"{name}.norm."))
            else:
                yield Product(weight, numel, before_heads)


def _generator_products(config: TransformerConfig, name: str, head: GeneratorHead) -> list[Product]:
    own = head.config(config)
    products = [Product(f"{name}.input.", config.d_model * own.d_model)]
    for index in range(own.num_layers):
        before = (f"{name}.input.",) if index == 0 else ()
        first, *rest = own.block_products(f"{name}.blocks.{index}.", has_window=own.has_window(index))
        products += [replace(first, before=(*first.before, *before)), *rest]
    blocks = (f"{name}.input.", f"{name}.blocks.", f"{name}.norm.")
    products.append(Product(f"{name}.hidden.", config.d_model * own.d_model, blocks))
    logits = config.d_model * config.padded_vocab_size * head.output_share
    return [*products, Product("embed.", logits, (f"{name}.hidden.",))]
