"""Models of images, and of images with texts, against transformers and torch's own layers."""

from typing import Any

import pytest
import torch
from support.tiny_models import build_any
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distft.config import parse
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.counts import forward_flops, num_parameters, training_flops
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, EmbeddingHead, Heads
from distft.model.settings import AnyModelConfig
from distft.model.with_heads import ModelWithHeads

VIT: dict[str, Any] = {
    "type": "vit",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "d_model": 12,
    "num_layers": 2,
    "num_heads": 3,
    "d_ff": 20,
}
CNN: dict[str, Any] = {"type": "image_cnn", "image_size": 9, "num_channels": 3, "num_filters": [5, 7]}
TEXT: dict[str, Any] = {"vocab_size": 11, "max_seq_len": 6, "d_model": 8, "num_layers": 1, "num_heads": 2}
CLIP: dict[str, Any] = {"type": "clip", "image": VIT, "text": TEXT, "d_embedding": 10}
CLASSIFIER: Heads = {"classifier": ClassificationHead(num_labels=3, pooling="first")}
EMBEDDING: Heads = {"embedding": EmbeddingHead(learns_temperature=True)}
MODELS: dict[str, tuple[dict[str, Any], Heads]] = {
    "vit": (VIT, CLASSIFIER),
    "vit-without-class-token": ({**VIT, "class_token": False, "mlp": "swiglu"}, CLASSIFIER),
    "cnn": (CNN, CLASSIFIER),
    "clip": (CLIP, EMBEDDING),
    "clip-of-a-cnn-and-a-gru": (
        {**CLIP, "image": CNN, "text": {"type": "gru", "vocab_size": 11, "max_seq_len": 6, "d_model": 8}},
        EMBEDDING,
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def config_of(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    config: ModelConfig = parse(AnyModelConfig, {**raw, **changes}, where="model")
    return config


def images_of(size: int, num_images: int = 4, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (num_images, channels, size, size), generator=generator, dtype=torch.uint8)


def inputs_of(name: str) -> dict[str, Tensor]:
    raw, _ = MODELS[name]
    images = images_of(raw.get("image_size") or raw["image"]["image_size"])
    if raw["type"] != "clip":
        return {"input_ids": torch.zeros(4, 1, dtype=torch.int64), "images": images}
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "images": images, "lengths": torch.tensor([6, 2, 5, 1])}


def randomize(model: nn.Module) -> None:
    """Biases and norms too, which begin as 0 and 1."""
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.data.add_(noise / 5)


_VIT_NAMES = {
    "attn.q.": "attention.q_proj.",
    "attn.k.": "attention.k_proj.",
    "attn.v.": "attention.v_proj.",
    "attn.o.": "attention.o_proj.",
    "attn_norm.": "layernorm_before.",
    "mlp_norm.": "layernorm_after.",
    "mlp.up.": "mlp.fc1.",
    "mlp.down.": "mlp.fc2.",
}


def transformers_vit(model: ModelWithHeads) -> Any:
    """`ViTForImageClassification` with the weights of `model`."""
    from transformers import ViTConfig, ViTForImageClassification

    oracle = ViTForImageClassification(
        ViTConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=20,
            image_size=8,
            patch_size=2,
            num_labels=3,
            layer_norm_eps=1e-6,
        )
    ).eval()
    own = dict(model.named_parameters())
    weights = {
        "vit.embeddings.cls_token": own["patch_embed.class_token"][None],
        "vit.embeddings.position_embeddings": own["position_embed.weight"][None],
        "vit.embeddings.patch_embeddings.projection.weight": own["patch_embed.projection.weight"].view(
            12, 3, 2, 2
        ),
        "vit.embeddings.patch_embeddings.projection.bias": own["patch_embed.projection.bias"],
        "vit.layernorm.weight": own["norm.weight"],
        "vit.layernorm.bias": own["norm.bias"],
        "classifier.weight": own["classifier.weight"],
        "classifier.bias": torch.zeros(3),
    }
    for name, value in own.items():
        _, _, rest = name.partition("blocks.")
        index, _, inner = rest.partition(".")
        for ours, theirs in _VIT_NAMES.items():
            if inner.startswith(ours):
                weights[f"vit.layers.{index}.{theirs}{inner.removeprefix(ours)}"] = value
    oracle.load_state_dict(weights)
    return oracle


@torch.no_grad()
def test_a_vits_logits_equal_those_of_transformers() -> None:
    model = build_any(config_of(VIT), CLASSIFIER)
    randomize(model)
    images = images_of(8)
    pixels = (images.float() / 255 - 0.5) / 0.5
    expected = transformers_vit(model)(pixels).logits
    found = model.logits(torch.zeros(4, 1, dtype=torch.int64), images=images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


@torch.no_grad()
def test_a_convolutional_network_equals_torchs_layers() -> None:
    model = build_any(
        config_of(CNN, image_mean=0.4, image_std=0.2),
        {"classifier": ClassificationHead(num_labels=3, pooling="mean")},
    )
    randomize(model)
    layers = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(2),
    )
    for index, block in enumerate(model.get_submodule("blocks").children()):
        layers[3 * index].load_state_dict(block.state_dict())
    images = images_of(9)
    hidden = layers((images.float() / 255 - 0.4) / 0.2).mean(dim=2)
    expected = hidden @ model.get_submodule("classifier").weight.T  # type: ignore[operator,union-attr]
    found = model.logits(torch.zeros(4, 1, dtype=torch.int64), images=images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_vectors_of_an_image_and_its_text_are_those_of_the_towers_alone() -> None:
    model = build_any(config_of(CLIP), EMBEDDING)
    randomize(model)
    inputs = inputs_of("clip")
    found = model(**inputs)["embedding"].view(4, 2, 10)
    for row in range(4):
        length = int(inputs["lengths"][row])
        states = {"image": build_any(config_of(VIT), CLASSIFIER), "text": build_any(config_of(TEXT))}
        for number, (tower, alone) in enumerate(states.items()):
            own = model.get_submodule(tower).state_dict()
            alone.load_state_dict(own, strict=False)
            kept: list[Tensor] = []
            head = alone.get_submodule("classifier" if tower == "image" else "norm")
            head.register_forward_hook(lambda _, args, output, kept=kept: kept.extend([args[0], output]))
            if tower == "image":
                alone(torch.zeros(1, 1, dtype=torch.int64), images=inputs["images"][row : row + 1])
                (vector,) = kept[0]  # of the class token
            else:
                alone(inputs["input_ids"][row : row + 1, :length])
                vector = kept[1][0, -1]  # of the last token
            projection = model.get_submodule(f"{tower}_projection").weight
            expected = nn.functional.normalize(projection @ vector, dim=0)  # type: ignore[operator]
            expected = expected * torch.exp(-0.5 * model.get_submodule("embedding").log_temperature)  # type: ignore[operator,union-attr]
            torch.testing.assert_close(found[row, number], expected, rtol=0, atol=1e-5)


@each_model
def test_parameters_and_flops_are_counted_exactly(name: str) -> None:
    raw, heads = MODELS[name]
    config, inputs = config_of(raw), inputs_of(name)
    model = build_any(config, heads)
    assert num_parameters(config, heads) == sum(parameter.numel() for parameter in model.parameters())
    if name == "clip-of-a-cnn-and-a-gru":
        return  # torch counts no FLOPs of its recurrent kernels
    seq_len = inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        outputs = model(**inputs)
        forward = counter.get_total_flops()
        sum(output.sum() for output in outputs.values()).backward()  # type: ignore[union-attr]
    counts = (4 * seq_len, 4 * seq_len**2)
    assert forward == pytest.approx(forward_flops(config, seq_len, heads).of(*counts))
    assert counter.get_total_flops() == pytest.approx(training_flops(config, seq_len, heads).of(*counts))


@pytest.mark.parametrize(
    "trainable",
    ["classifier.", "blocks.1.", "patch_embed.", "blocks.0.mlp.down.", "image.blocks.1.", "text."],
)
def test_flops_of_a_partial_backward_are_counted_exactly(trainable: str) -> None:
    name = "clip" if trainable.startswith(("image.", "text.")) else "vit"
    raw, heads = MODELS[name]
    config, inputs = config_of(raw), inputs_of(name)
    model = build_any(config, heads)
    names = [key for key, _ in model.named_parameters() if key.startswith(trainable)]
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in names)
    seq_len = inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        sum(output.sum() for output in model(**inputs).values()).backward()  # type: ignore[union-attr]
    expected = training_flops(config, seq_len, heads, names).of(4 * seq_len, 4 * seq_len**2)
    assert counter.get_total_flops() == pytest.approx(expected)


@each_model
def test_a_rows_output_and_dropout_do_not_depend_on_the_batch(name: str) -> None:
    raw, heads = MODELS[name]
    towers = {"image": {**CLIP["image"], "dropout": 0.4}, "text": {**TEXT, "dropout": 0.4}}
    if name == "clip-of-a-cnn-and-a-gru":
        towers = {"image": {**CNN, "dropout": 0.4}, "text": {**raw["text"], "dropout": 0.4}}
    model = build_any(config_of(raw, **(towers if raw["type"] == "clip" else {"dropout": 0.4})), heads)
    inputs, keys = inputs_of(name), torch.arange(4) * 7919
    for module in (model.eval(), model.train()):
        whole = module.logits(**inputs, dropout_keys=keys)
        per_row = len(whole) // 4
        for row in range(4):
            own = {key: value[row : row + 1] for key, value in inputs.items()}
            one = module.logits(**own, dropout_keys=keys[row : row + 1])
            torch.testing.assert_close(whole[row * per_row : (row + 1) * per_row], one, rtol=0, atol=5e-6)
    assert not torch.allclose(model.logits(**inputs, dropout_keys=keys), model.eval().logits(**inputs))


@each_model
@torch.no_grad()
def test_a_model_computes_in_bf16_too(name: str) -> None:
    raw, heads = MODELS[name]
    model, inputs = build_any(config_of(raw), heads), inputs_of(name)
    exact = model.logits(**inputs)
    torch.testing.assert_close(model.bfloat16().logits(**inputs).float(), exact, rtol=0, atol=0.1)


def test_activations_of_a_vit_and_of_both_towers_are_recomputed() -> None:
    for name in ("vit", "clip"):
        raw, heads = MODELS[name]
        gradients = []
        for mode in ("none", "selective", "full"):
            model = build_any(config_of(raw), heads).train()
            model.set_activation_checkpointing(mode)  # type: ignore[arg-type]
            model.logits(**inputs_of(name)).square().sum().backward()
            gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
        for found in gradients[1:]:
            torch.testing.assert_close(found, gradients[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"only the blocks of model.type=transformer"):
        build_any(config_of(CNN), CLASSIFIER).set_activation_checkpointing("full")


@pytest.mark.parametrize(
    ("raw", "changes", "problem"),
    [
        (VIT, {"patch_size": 3}, "patch_size=3 does not divide image_size=8: set one that does, such as 2"),
        (VIT, {"d_model": 10}, "d_model=10 is not a multiple of num_heads=3"),
        (VIT, {"num_channels": 2}, "num_channels"),
        (VIT, {"vocab_size": 9}, "vocab_size=9 is a setting of type"),
        (CNN, {"kernel_size": 4}, "kernel_size=4 is even"),
        (CNN, {"num_filters": [4, 4, 4, 4]}, "after 4 layers of pool_size=2 nothing is left"),
        (CNN, {"num_filters": [4, 0]}, "each must be 1 or more"),
        (CLIP, {"text": VIT}, "type 'vit' is unknown"),
        (
            CLIP,
            {"text": {**TEXT, "experts": {"num_experts": 4, "experts_per_token": 2}}},
            "text.experts: the towers of clip have one",
        ),
        (CLIP, {"image": {**VIT, "patch_size": 3}}, "patch_size=3 does not divide"),
    ],
)
def test_wrong_sizes_are_named(raw: dict[str, Any], changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(raw, **changes)
    assert problem in str(error.value)


def test_inputs_that_a_model_does_not_read_are_refused() -> None:
    ids = torch.zeros(2, 1, dtype=torch.int64)
    model = build_any(config_of(VIT), CLASSIFIER)
    with pytest.raises(ConfigError, match=r"reads images of shape \[3, 8, 8\].* the rows have none"):
        model(ids)
    with pytest.raises(ConfigError, match=r"the rows have images of shape \[1, 8, 8\]"):
        model(ids, images=images_of(8, 2, 1))
    with pytest.raises(ConfigError, match="this model reads tokens alone"):
        build_any(config_of(TEXT))(ids, images=images_of(8, 2))
    with pytest.raises(ConfigError, match="no other output"):
        build_any(config_of(CLIP), CLASSIFIER)
    with pytest.raises((ConfigError, AssertionError)):
        build_any(config_of(VIT), LANGUAGE_MODEL)
