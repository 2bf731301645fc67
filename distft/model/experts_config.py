"""Settings of a mixture of experts in the feed-forward part of a Transformer's blocks."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.model.config import MOST
from distft.model.products import Product


class ExpertsConfig(Settings):
    """Feed-forward networks of which each token passes through a few, chosen by a router.

    No token is dropped, however many choose the same expert, so what a token becomes does not depend on the
    other rows of its batch.
    """

    num_experts: int = Field(ge=2, le=4096)
    experts_per_token: int = Field(ge=1, le=4096)
    d_ff: int | None = Field(None, ge=1, le=MOST)  # of each expert; null: the model's d_ff
    shared_d_ff: int = Field(0, ge=0, le=MOST)  # of an expert that every token passes through; 0: none
    shared_gate: bool = False  # weigh the shared expert by a sigmoid for each token, as in Qwen2-MoE
    scores: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits; sigmoid: DeepSeek-V3
    normalize_weights: bool = True  # the weights of a token's experts add up to 1
    every: int = Field(
        1, ge=1, le=4096
    )  # every how many blocks there are experts: 2 means blocks 1, 3, 5, ...
    dense_layers: tuple[int, ...] = ()  # blocks that have no experts all the same
    # Weights in the loss. Balance: 1 where a sequence's tokens spread evenly over the experts. DeepSeek-V3,
    # Mixtral: 1e-4 to 0.02. The router's z-loss keeps its logits small. ST-MoE: 1e-3.
    load_balance_weight: float = Field(0.01, ge=0, allow_inf_nan=False)
    router_z_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    # After each step, a bias of each expert's score moves by this much towards an even load. It decides which
    # experts are chosen, not their weights (Wang et al. 2024, arXiv:2408.15664: 0.001). null: no bias.
    bias_update_rate: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        errors = []
        if self.experts_per_token > self.num_experts:
            errors.append(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}: "
                "lower it."
            )
        if self.shared_gate and not self.shared_d_ff:
            errors.append("shared_gate=true, but there is no shared expert: set shared_d_ff, its width.")
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def routes_without_gradient(self) -> bool:
        """Whether a token's only expert has the weight 1, so that the router learns nothing of the loss."""
        return self.experts_per_token == 1 and self.normalize_weights

    @property
    def has_bias(self) -> bool:
        """Whether each expert has a bias of selection, which no gradient moves."""
        return self.bias_update_rate is not None

    def is_in(self, layer: int) -> bool:
        """Whether block `layer` has experts."""
        return (layer + 1) % self.every == 0 and layer not in self.dense_layers

    def layers(self, num_layers: int) -> list[int]:
        """The blocks that have experts."""
        return [layer for layer in range(num_layers) if self.is_in(layer)]

    def num_parameters(self, d_model: int, d_ff: int, num_up: int, *, active: bool = False) -> int:
        """Of a block's feed-forward; `active`: of the parameters that one token passes through.

        `d_ff` is the model's, `num_up` the number of an expert's matrices beside `down`.
        """
        num_experts = self.experts_per_token if active else self.num_experts
        experts = num_experts * (self.d_ff or d_ff) + self.shared_d_ff
        router = self.num_experts * (d_model + self.has_bias)
        return experts * d_model * (num_up + 1) + router + self.shared_gate * d_model

    def products(
        self, block: str, d_model: int, d_ff: int, *, is_gated: bool, before: tuple[str, ...]
    ) -> Iterator[Product]:
        """Of the block whose parameters' names begin with `block`, per token: those of its own experts.

        `before` begins the names of the block's parameters before its feed-forward.
        """
        mlp, names = f"{block}mlp.", ("gate", "up") if is_gated else ("up",)

        def chain(part: str, numel: int) -> Iterator[Product]:
            for name in names:
                yield Product(f"{part}.{name}.", numel, before)
            own = tuple(f"{part}.{name}." for name in names)
            yield Product(f"{part}.down.", numel, before_alone=own)

        yield Product(f"{mlp}router.", d_model * self.num_experts, before)
        yield from chain(f"{mlp}experts", d_model * (self.d_ff or d_ff) * self.experts_per_token)
        if self.shared_d_ff:
            yield from chain(f"{mlp}shared", d_model * self.shared_d_ff)
            if self.shared_gate:
                yield Product(f"{mlp}shared_gate.", d_model, before)

    def problems(self, num_layers: int, *, mlp_bias: bool) -> Iterator[str]:
        """Why a Transformer of so many blocks cannot have these experts."""
        beyond = [layer for layer in self.dense_layers if not 0 <= layer < num_layers]
        if beyond:
            yield (
                f"experts.dense_layers={list(self.dense_layers)} names blocks that are not there: "
                f"num_layers={num_layers}, so they are 0 to {num_layers - 1}."
            )
        if not self.layers(num_layers):
            yield (
                f"experts.every={self.every} and experts.dense_layers={list(self.dense_layers)} leave "
                f"no block of {num_layers} with experts: change them, or leave experts out."
            )
        if mlp_bias:
            yield "mlp_bias=true, but experts have no biases: set mlp_bias: false, or leave experts out."
