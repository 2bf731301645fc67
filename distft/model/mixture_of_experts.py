"""A mixture of experts in place of a block's feed-forward (Shazeer et al. 2017, arXiv:1701.06538).

Shape letters: B rows, T positions, N = B * T, C = d_model, F = d_ff of an expert, E experts, K experts a
token, R = N * K: a token once for each of its experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distft.model.experts_config import ExpertsConfig
from distft.model.grouped_product import grouped_product
from distft.model.layers import MLP, GatedMLP, Linear, MatmulDtype, activation_of
from distft.model.transformer_config import TransformerConfig

# Of what a router tells of its choices: the two losses, then the tokens of each expert.
LOAD_BALANCE, ROUTER_Z, NUM_LOSSES = 0, 1, 2


class Router(nn.Module):
    """Chooses each token's experts, in fp32."""

    __call__: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def __init__(self, config: TransformerConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts.num_experts, config.d_model))
        self.selection_bias: nn.Parameter | None = None
        if experts.has_bias:
            # No gradient reaches it: after each step it moves by a rule (`distft.train.experts`).
            self.selection_bias = nn.Parameter(torch.empty(experts.num_experts), requires_grad=False)
        self.experts = experts

    def forward(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, E], and of the chosen experts the numbers [N, K] and the weights [N, K]."""
        experts = self.experts
        logits_NE = functional.linear(x_NC.float(), self.weight.float())
        scores_NE = self.scores(logits_NE)
        choices_NE = scores_NE.detach()
        if self.selection_bias is not None:
            choices_NE = choices_NE + self.selection_bias.detach().float()
        chosen_NK = choices_NE.topk(experts.experts_per_token, dim=-1).indices
        weights_NK = scores_NE.gather(1, chosen_NK)
        if experts.normalize_weights:
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        return logits_NE, chosen_NK, weights_NK

    def scores(self, logits_NE: Tensor) -> Tensor:
        return logits_NE.softmax(dim=-1) if self.experts.scores == "softmax" else logits_NE.sigmoid()


class ExpertLinear(nn.Module):
    """A linear layer of each expert; the weights [E, outputs, inputs] are one parameter."""

    __call__: Callable[..., Tensor]

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.matmul_dtype = MatmulDtype()

    def forward(self, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        dtype = self.matmul_dtype(x_RI)
        y_RO: Tensor = grouped_product(x_RI.to(dtype), self.weight.to(dtype), ends_E)
        return y_RO.to(x_RI.dtype)


class Experts(nn.Module):
    """The feed-forward networks, each on its own run of rows."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: TransformerConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        num_experts, d_ff = experts.num_experts, experts.d_ff or config.d_ff
        if config.is_gated:
            self.gate = ExpertLinear(num_experts, config.d_model, d_ff)
        self.up = ExpertLinear(num_experts, config.d_model, d_ff)
        self.down = ExpertLinear(num_experts, d_ff, config.d_model)
        self.is_gated = config.is_gated
        self.activation = activation_of(config)

    def forward(self, x_RC: Tensor, ends_E: Tensor) -> Tensor:
        """`ends_E` int32: where each expert's rows end."""
        if not self.is_gated:
            return self.down(self.activation(self.up(x_RC, ends_E)), ends_E)
        return self.down(self.activation(self.gate(x_RC, ends_E)) * self.up(x_RC, ends_E), ends_E)


class _ToExperts(torch.autograd.Function):
    """Tokens [N, C] to rows [R, C] in the experts' order; the backward adds in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, order_R: Tensor, inverse_R: Tensor, num_chosen: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.num_chosen = num_chosen
        return x_NC.index_select(0, order_R // num_chosen)

    @staticmethod
    def backward(ctx: Any, gradient_RC: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        gradient_RC = gradient_RC.index_select(0, inverse_R)
        return gradient_RC.view(-1, ctx.num_chosen, gradient_RC.shape[1]).sum(dim=1), None, None, None


class _FromExperts(torch.autograd.Function):
    """Rows [R, C] in the experts' order to the tokens' order; the backward is a choice of rows, too."""

    @staticmethod
    def forward(ctx: Any, y_RC: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return y_RC.index_select(0, inverse_R)

    @staticmethod
    def backward(ctx: Any, gradient_RC: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return gradient_RC.index_select(0, order_R), None, None


class MixtureOfExperts(nn.Module):
    """Router, experts, and perhaps an expert that all tokens share."""

    __call__: Callable[..., tuple[Tensor, Tensor | None]]

    def __init__(self, config: TransformerConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.settings = experts
        self.router = Router(config, experts)
        self.experts = Experts(config, experts)
        self.shared: nn.Module | None = None
        self.shared_gate: Linear | None = None
        if experts.shared_d_ff:
            own = config.model_copy(update={"d_ff": experts.shared_d_ff})
            self.shared = GatedMLP(own) if config.is_gated else MLP(own)
            if experts.shared_gate:
                self.shared_gate = Linear(config.d_model, 1, bias=False)

    def forward(
        self, x_BTC: Tensor, is_real_BT: Tensor | None = None, *, tells_routing: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and if `tells_routing` fp32 [2 + E]: see `routing_sums`.

        Padding, where `is_real_BT` is False, counts in none of the sums.
        """
        x_NC = x_BTC.flatten(0, 1)
        y_NC = self._shared_output(x_NC)
        logits_NE, chosen_NK, weights_NK = self.router(x_NC)
        num_chosen = chosen_NK.shape[1]
        order_R = torch.argsort(chosen_NK.flatten(), stable=True)
        inverse_R = torch.argsort(order_R)
        ends_E = _counts(chosen_NK.flatten(), self.settings.num_experts).cumsum(0).to(torch.int32)
        x_RC = _ToExperts.apply(x_NC, order_R, inverse_R, num_chosen)  # type: ignore[no-untyped-call]
        y_RC = _FromExperts.apply(self.experts(x_RC, ends_E), order_R, inverse_R)  # type: ignore[no-untyped-call]
        y_NKC = y_RC.view(-1, num_chosen, x_NC.shape[1])
        routed_NC = (y_NKC * weights_NK.to(y_NKC.dtype)[..., None]).sum(dim=1)
        y_NC = routed_NC if y_NC is None else y_NC + routed_NC
        routing = None
        if tells_routing:
            scores_NE = self.router.scores(logits_NE)
            routing = routing_sums(x_BTC.shape[:2], logits_NE, scores_NE, chosen_NK, is_real_BT)
        return y_NC.view(x_BTC.shape), routing

    def _shared_output(self, x_NC: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        y_NC: Tensor = self.shared(x_NC)
        return y_NC if self.shared_gate is None else self.shared_gate(x_NC).sigmoid() * y_NC


def routing_sums(
    shape: torch.Size, logits_NE: Tensor, scores_NE: Tensor, chosen_NK: Tensor, is_real_BT: Tensor | None
) -> Tensor:
    """fp32 [2 + E]: sums over tokens of both losses, which have gradients, and each expert's tokens.

    The loss of balance is that of DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20): in each row it is
    sum_e f_e * P_e, with f_e the number of tokens that chose e, relative to an even share, and P_e their mean
    share of the scores. It counts once for each of the row's tokens, so it adds up over rows, and no
    cut into micro-batches or ranks changes it. The z-loss of a token is logsumexp(logits) ** 2 (Zoph et al.
    2022, arXiv:2202.08906).
    """
    num_rows, num_positions = shape
    num_experts, num_chosen = scores_NE.shape[1], chosen_NK.shape[1]
    if is_real_BT is None:
        is_real_BT = torch.ones(shape, dtype=torch.bool, device=scores_NE.device)
    is_real_BT1 = is_real_BT[..., None].float()
    shares_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
    shares_BE = (shares_NE.view(num_rows, num_positions, -1) * is_real_BT1).sum(dim=1)
    chosen_BS = chosen_NK.view(num_rows, -1)
    is_counted_BS = is_real_BT.repeat_interleave(num_chosen, dim=1).float()
    counts_BE = torch.zeros_like(shares_BE, requires_grad=False).scatter_add(1, chosen_BS, is_counted_BS)
    num_real_B1 = is_real_BT1.sum(dim=1).clamp_min(1)
    load_balance = (counts_BE * shares_BE / num_real_B1).sum() * (num_experts / num_chosen)
    router_z = (logits_NE.logsumexp(dim=-1).square() * is_real_BT1.flatten()).sum()
    return torch.cat([torch.stack([load_balance, router_z]), counts_BE.sum(dim=0)])


def _counts(chosen_R: Tensor, num_experts: int) -> Tensor:
    """int64 [E]. Not bincount, for whose size a GPU would be waited for."""
    return chosen_R.new_zeros(num_experts).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))
