"""Mixtures of experts against a loop over tokens written out here."""

from typing import Any

import pytest
import torch
from support.tiny_models import SIZES, build
from torch import Tensor
from torch.nn.functional import gelu, sigmoid, silu, softmax

from distft.config import parse
from distft.errors import ConfigError
from distft.model.block import Block
from distft.model.grouped_product import grouped_product
from distft.model.layout import ROUTING
from distft.model.mixture_of_experts import MixtureOfExperts, routing_sums
from distft.model.settings import AnyModelConfig
from distft.model.transformer_config import TransformerConfig

EXPERTS: dict[str, Any] = {"num_experts": 5, "experts_per_token": 2, "d_ff": 24}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"shared_d_ff": 20, "shared_gate": True, "normalize_weights": False},
    {"shared_d_ff": 20, "scores": "sigmoid", "bias_update_rate": 0.1},
    {"experts_per_token": 1, "normalize_weights": False},
    {"experts_per_token": 5, "mlp": "gelu_exact"},
]
LENGTHS = torch.tensor([10, 4, 0])


def _config(**options: Any) -> TransformerConfig:
    own = {"mlp": options.pop("mlp")} if "mlp" in options else {}
    return TransformerConfig.model_validate({**SIZES, **own, "experts": {**EXPERTS, **options}})


def _layer(**options: Any) -> MixtureOfExperts:
    (_, block) = build(_config(**options)).blocks
    assert isinstance(block, Block)
    assert isinstance(block.mlp, MixtureOfExperts)
    if block.mlp.router.selection_bias is not None:
        block.mlp.router.selection_bias.data.copy_(torch.linspace(-1, 1, 5))
    return block.mlp


def _feed_forward(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    if "gate" in weights:
        return weights["down"] @ (silu(weights["gate"] @ x) * (weights["up"] @ x))
    return weights["down"] @ gelu(weights["up"] @ x)


def _token_by_token(layer: MixtureOfExperts, x_BTC: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, scores [N, E], and which experts each token chose [N, E]."""
    settings = {**EXPERTS, "normalize_weights": True, **options}
    params = {name: param.detach() for name, param in layer.named_parameters()}
    names = ("gate", "up", "down") if "experts.gate.weight" in params else ("up", "down")
    outputs, all_scores, chosen = [], [], []
    for x in x_BTC.reshape(-1, x_BTC.shape[-1]):
        logits = params["router.weight"] @ x
        scores = sigmoid(logits) if settings.get("scores") == "sigmoid" else softmax(logits, 0)
        bias = params.get("router.selection_bias", torch.zeros(5))
        ranked = sorted(range(5), key=lambda e: -float(scores[e] + bias[e]))[: settings["experts_per_token"]]
        total = sum(scores[e] for e in ranked) if settings["normalize_weights"] else 1.0
        y = torch.zeros_like(x)
        for e in ranked:
            own = {name: params[f"experts.{name}.weight"][e] for name in names}
            y = y + scores[e] / total * _feed_forward(x, own)
        if "shared_d_ff" in settings:
            shared = _feed_forward(x, {name: params[f"shared.{name}.weight"] for name in names})
            gate = sigmoid(params["shared_gate.weight"] @ x) if settings.get("shared_gate") else 1.0
            y = y + gate * shared
        outputs.append(y)
        all_scores.append(scores)
        chosen.append(torch.tensor([float(e in ranked) for e in range(5)]))
    return torch.stack(outputs).view_as(x_BTC), torch.stack(all_scores), torch.stack(chosen)


@pytest.mark.parametrize("options", VARIANTS)
def test_it_equals_a_loop_over_tokens_and_experts(options: dict[str, Any]) -> None:
    layer = _layer(**options)
    x_BTC = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0))
    is_real_BT = torch.arange(10) < LENGTHS[:, None]
    found, routing = layer(x_BTC, is_real_BT, tells_routing=True)
    expected, scores_NE, chosen_NE = _token_by_token(layer, x_BTC, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    scores_BTE, chosen_BTE = scores_NE.view(3, 10, 5), chosen_NE.view(3, 10, 5)
    balance, z, counts = 0.0, 0.0, torch.zeros(5)
    num_chosen = options.get("experts_per_token", 2)
    for row, length in enumerate(LENGTHS.tolist()):
        own, picks = scores_BTE[row, :length], chosen_BTE[row, :length]
        if length:
            share = 5 / (num_chosen * length) * picks.sum(0)
            mean_score = (own / own.sum(1, keepdim=True)).mean(0)
            balance += length * float((share * mean_score).sum())
        logits = x_BTC[row, :length] @ layer.router.weight.detach().T
        z += float(logits.logsumexp(1).square().sum())
        counts += picks.sum(0)
    assert routing is not None
    torch.testing.assert_close(routing, torch.cat([torch.tensor([balance, z]), counts]), rtol=1e-5, atol=1e-5)


def test_an_even_load_has_the_loss_1_and_one_expert_for_all_the_most() -> None:
    scores_NE = torch.full((12, 4), 0.25)
    even_NK = torch.arange(12)[:, None] % 4
    sums = routing_sums(torch.Size([2, 6]), scores_NE.log(), scores_NE, even_NK, None)
    # 6 tokens a row do not spread evenly over 4 experts, but with equal scores the loss does not see it.
    assert float(sums[0]) == pytest.approx(12)
    peaked_NE = torch.tensor([[1.0, 0, 0, 0]]).expand(12, 4)
    one = routing_sums(torch.Size([2, 6]), scores_NE.log(), peaked_NE, torch.zeros(12, 1).long(), None)
    assert float(one[0]) == pytest.approx(4 * 12)
    assert one[2:].tolist() == [12, 0, 0, 0]


def test_the_gradients_are_those_of_the_loop() -> None:
    layer = _layer(shared_d_ff=20, shared_gate=True)
    layer.double()
    x_BTC = torch.randn(2, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen_NK = layer.router(x_BTC.flatten(0, 1))[1]

    def output(x_BTC: Tensor) -> Tensor:
        found: Tensor = layer.router(x_BTC.flatten(0, 1))[2].sum() * 0 + layer.experts.up.weight.sum() * 0
        x_NC = x_BTC.flatten(0, 1)
        weights_NE = softmax(x_NC.float() @ layer.router.weight.float().T, 1)
        weights_NK = weights_NE.gather(1, chosen_NK)
        weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
        gate, up, down = (getattr(layer.experts, name).weight for name in ("gate", "up", "down"))
        rows = []
        for x, experts, weights in zip(x_NC, chosen_NK.tolist(), weights_NK, strict=True):
            own = [
                w * (down[e] @ (silu(gate[e] @ x) * (up[e] @ x)))
                for e, w in zip(experts, weights, strict=True)
            ]
            rows.append(sum(own[1:], start=own[0]))
        assert layer.shared is not None
        assert layer.shared_gate is not None
        shared = sigmoid(layer.shared_gate(x_NC)) * layer.shared(x_NC)
        return found + torch.stack(rows) + shared

    gradients = []
    for compute in (lambda x: layer(x)[0].flatten(0, 1), output):
        x = x_BTC.clone().requires_grad_()
        layer.zero_grad()
        compute(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_product_of_groups_and_its_gradients_are_right_for_empty_groups_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_EOI = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    ends_E = torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    expected = torch.cat([x_RI[:5] @ weight_EOI[1].T, x_RI[5:] @ weight_EOI[3].T])
    torch.testing.assert_close(grouped_product(x_RI, weight_EOI, ends_E), expected)
    torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, ends_E), (x_RI, weight_EOI))
    torch.library.opcheck(
        grouped_product, (x_RI.detach(), weight_EOI, ends_E), test_utils=("test_schema", "test_faketensor")
    )


def test_a_token_depends_on_no_other_row() -> None:
    """Dropless: the same tokens alone and in a batch in which all choose the same experts."""
    model = build(_config())
    ids = torch.randint(0, 61, (1, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone = model.logits(ids)
        together = model.logits(torch.cat([ids.expand(30, -1), torch.zeros(3, 10, dtype=torch.int64)]))
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)


def test_only_passes_with_gradient_that_ask_for_it_tell_the_routing() -> None:
    model = build(_config(every=2))
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert model(ids, tells_routing=True)[ROUTING].shape == (1, 2 + 5)
    assert list(model(ids)) == ["lm_head"]
    with torch.no_grad():
        assert list(model(ids, tells_routing=True)) == ["lm_head"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"experts_per_token": 6}, "experts_per_token=6 is more than num_experts=5"),
        ({"shared_gate": True}, "there is no shared expert"),
        ({"dense_layers": [2]}, "names blocks that are not there"),
        ({"every": 3}, "leave no block of 2 with experts"),
        ({"dense_layers": [0, 1]}, "leave no block of 2 with experts"),
        ({"num_experts": 1}, "experts.num_experts=1"),
        ({"capacity_factor": 1.25}, "experts.capacity_factor=1.25 is not a setting"),
    ],
)
def test_experts_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(AnyModelConfig, {**SIZES, "experts": {**EXPERTS, **options}})


def test_experts_have_no_biases() -> None:
    with pytest.raises(ConfigError, match="mlp_bias=true, but experts have no biases"):
        parse(AnyModelConfig, {**SIZES, "mlp_bias": True, "experts": EXPERTS})


def test_initial_weights_of_an_expert_are_those_of_a_dense_layer() -> None:
    experts = {**EXPERTS, "d_ff": 200, "bias_update_rate": 0.1}
    sizes = {**SIZES, "d_model": 256, "init_std": None}
    model = build(TransformerConfig.model_validate({**sizes, "experts": experts}))
    params = dict(model.named_parameters())
    for name, factor in (("gate", 1.0), ("up", 1.0), ("down", 0.5)):
        for own in params[f"blocks.1.mlp.experts.{name}.weight"]:
            assert float(own.detach().std()) == pytest.approx(256**-0.5 * factor, rel=0.03)
    assert float(params["blocks.1.mlp.router.weight"].detach().std()) == pytest.approx(256**-0.5, rel=0.1)
    assert not params["blocks.1.mlp.router.selection_bias"].any()
