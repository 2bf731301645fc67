"""Runs on images: classes, two views, images with texts; on every engine, resumed, fine-tuned in part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.rank_pool import run_ranks
from support.small_runs import logged, run, run_until_power_cut
from torch import Tensor

from distft.cli.main import main
from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.image_sources import DIGIT_NAMES
from distft.errors import ConfigError, DataError
from distft.objective.interface import ObjectiveContext
from distft.run.check import describe_run
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.run.model import build_module
from distft.run.pretrained import load_model, open_model
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
from distft.topology import Topology

IMAGES = {"image_size": 8, "num_channels": 1, "dropout": 0.1}
VIT = {**IMAGES, "type": "vit", "patch_size": 4, "d_model": 12, "num_layers": 2, "num_heads": 2}
CNN = {**IMAGES, "type": "image_cnn", "num_filters": [5, 6]}
TEXT = {"max_seq_len": 6, "d_model": 12, "num_layers": 1, "num_heads": 2, "dropout": 0.1}
CLIP = {"type": "clip", "image": VIT, "text": TEXT, "d_embedding": 9}
CLIP_LOSS = {"type": "contrastive", "symmetric": True, "temperature": 0.07, "learns_temperature": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([" ".join(DIGIT_NAMES)] * 3, TokenizerTrainConfig(algorithm="char"), path)
    return str(path)


def config_of(kind: str, run_dir: Path, tokenizer: str, /, **changes: Any) -> dict[str, Any]:
    """A short run; `changes` replace whole sections."""
    data: dict[str, Any] = {"type": "images", "source": "digits", "augment": {"shift": 1}, "max_rows": 64}
    validation: dict[str, Any] = {"type": "images", "source": "digits_held_out", "max_rows": 20}
    raw = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "timeout_s": 60.0,
        "model": {"vit": VIT, "cnn": CNN, "views": CNN, "clip": CLIP}[kind],
        "data": data,
        "validation": validation,
        "objective": {"type": "classification"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "seq_len": 1},
        "optim": {"peak_lr": 0.01, "schedule": {"type": "cosine", "warmup_steps": 2}},
        "train": {"max_steps": 6, "log_every_steps": 1},
        "checkpoint": {"every_steps": 2},
    }
    if kind == "views":
        raw["data"] = {**data, "views": 2}
        raw["validation"] = {**validation, "views": 2, "augment": {"shift": 1}}
        raw["objective"] = {"type": "contrastive"}
    if kind == "clip":
        raw |= {"tokenizer": tokenizer, "data": {**data, "text": "label"}, "objective": CLIP_LOSS}
        raw |= {"validation": {**validation, "text": "label"}}
        raw["batch"] = {**raw["batch"], "seq_len": 6}
    return {**raw, **changes}


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["vit", "views", "clip"])
def test_a_run_resumes_on_other_ranks_is_evaluated_and_fine_tuned_in_part(
    tmp_path: Path, tokenizer: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Topology(), config_of(kind, tmp_path / "whole", tokenizer))
    cut = config_of(kind, tmp_path / "cut", tokenizer)
    run_until_power_cut(cut, 3)
    run_ranks(run, 2, {**cut, "engine": {"type": "zero", "zero_stage": 3}}, timeout_s=120)
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=2e-6)
    trainable = ["text.*", "text_projection.*"] if kind == "clip" else ["blocks.1.*"]
    tuned = config_of(
        kind, tmp_path / "tuned", tokenizer, init_from=str(tmp_path / "cut"), trainable=trainable
    )
    del tuned["model"]
    run(Topology(), tuned)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "tuned")]) == 0
    metric = {"vit": "accuracy", "views": "recall_at_1", "clip": "reverse_success_at_1"}[kind]
    assert metric in capsys.readouterr().out
    universal = str(tmp_path / "universal")
    assert main(["checkpoint", "convert", str(tmp_path / "cut"), universal, "--to", "universal"]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "tuned")]) == 0
    capsys.readouterr()
    hf = str(tmp_path / "hf")
    assert main(["checkpoint", "convert", str(tmp_path / "cut"), hf, "--to", "huggingface"]) == 2
    assert f"model.type={cut['model']['type']}" in capsys.readouterr().err
    if kind == "clip":
        _assert_texts_are_embedded(tmp_path / "cut", tmp_path)
    if kind == "vit":
        assert main(["embed", str(tmp_path / "cut"), "nothing.txt", "-o", str(tmp_path / "x.npy")]) == 2
        assert main(["generate", str(tmp_path / "cut"), "-p", "a"]) == 2
        assert "reads images" in capsys.readouterr().err


@torch.no_grad()
def _assert_texts_are_embedded(run_dir: Path, folder: Path) -> None:
    """`distft embed` gives what the tower of texts makes of each, whatever image is beside it."""
    (folder / "names.txt").write_text("\n".join(DIGIT_NAMES))
    arguments = ["embed", str(run_dir), str(folder / "names.txt"), "--documents", "line"]
    assert main([*arguments, "-o", str(folder / "names.npy")]) == 0
    trained = open_model(str(run_dir))
    module = load_model(trained, torch.device("cpu"))
    for name, found in zip(DIGIT_NAMES, np.load(folder / "names.npy"), strict=True):
        ids = torch.tensor([trained.tokenizer.encode(name)])
        images = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
        vectors = module(input_ids=ids, images=images)["embedding"]
        scale = vectors[1].norm()  # of the temperature, which the file is without
        np.testing.assert_allclose(found, (vectors[1] / scale).numpy(), atol=1e-6)
    assert main([*arguments, "-o", str(folder / "x.npy"), "--pooling", "mean"]) == 2


def folder_of_digits(folder: Path) -> Path:
    digits = load_digits()
    for number, (image, digit) in enumerate(zip(digits.images[:40], digits.target, strict=False)):
        path = folder / DIGIT_NAMES[digit] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).save(path)
    return folder


def test_a_folder_of_images_is_learnt_without_a_tokenizer(tmp_path: Path) -> None:
    folder = folder_of_digits(tmp_path / "digits")
    data = {"type": "images", "path": str(folder)}
    model = {**CNN, "num_filters": [16, 32], "dropout": 0.0}
    train = {"max_steps": 60, "log_every_steps": 20}
    raw = config_of(
        "cnn", tmp_path / "run", "", model=model, data=data, validation=data, train=train, checkpoint={}
    )
    metrics = run(Topology(), raw).metrics
    assert metrics["validation/accuracy"] > 0.7
    described = describe_run(parse(RunConfig, raw), 1).lines
    assert not [line for line in described if line.startswith("tokenizer")]


def test_balanced_weights_count_the_images_of_each_class(tmp_path: Path) -> None:
    raw = config_of(
        "cnn", tmp_path / "run", "", objective={"type": "classification", "class_weights": "balanced"}
    )
    inputs = read_inputs(parse(RunConfig, raw))
    counts = [load_digits().target[: 64 * 5 // 4].tolist()[i] for i in range(80) if i % 5 != 4]
    names = inputs.label_names
    assert isinstance(names, tuple)
    own = [counts.count(DIGIT_NAMES.index(name)) for name in names]
    assert inputs.config.objective.class_weights == pytest.approx([64 / (10 * count) for count in own])


def test_a_mixture_learns_classes_and_views_at_once(tmp_path: Path) -> None:
    raw = config_of("vit", tmp_path / "run", "", validation=None, checkpoint={})
    classes, views = raw["data"], {**raw["data"], "views": 2}
    raw["data"] = {"type": "streams", "streams": {"classes": {"data": classes}, "views": {"data": views}}}
    parts = {
        "classes": {"objective": {"type": "classification"}},
        "views": {"objective": {"type": "contrastive"}},
    }
    metrics = run(Topology(), {**raw, "objective": {"type": "mixture", "parts": parts}}).metrics
    assert {"classes/loss", "views/loss"} <= metrics.keys()


@torch.no_grad()
def _module_of(raw: dict[str, Any]) -> tuple[Any, Any, Batch]:
    """Inputs, model and the first eight rows of a run."""
    inputs = read_inputs(parse(RunConfig, raw))
    module = build_module(inputs.model, inputs.heads).to_empty(device="cpu")
    for index, parameter in enumerate(module.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 3)
    batch = inputs.train.batch(0, 8)
    assert isinstance(batch, Batch)
    return inputs, module.eval(), batch


def test_the_loss_of_images_and_texts_is_that_of_transformers_clip(tmp_path: Path, tokenizer: str) -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    inputs, module, batch = _module_of(config_of("clip", tmp_path / "run", tokenizer))
    # CLIP takes every other text for a negative, also equal ones: here all differ.
    texts = torch.arange(8)[:, None] + torch.arange(2)
    batch = Batch(**{name: getattr(batch, name) for name in ("images", "is_captioned", "num_targets")},
                  input_ids=texts, targets={"text_hash": torch.arange(16)})  # fmt: skip
    objective = inputs.config.objective
    context = ObjectiveContext(inputs.model.vocabulary_size, SingleProcess())
    halves = [_rows(batch, slice(0, 4)), _rows(batch, slice(4, 8))]
    losses = [
        objective.loss_sums(module, half, context)["contrastive"]
        for half in objective.prepare_step(module, halves, context)
    ]
    sum(losses).backward()  # type: ignore[union-attr]
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    vectors = module(input_ids=batch.input_ids, images=batch.images)["embedding"].view(8, 2, -1)
    cosines = torch.nn.functional.normalize(vectors, dim=-1)
    log_scale = -torch.log(torch.tensor(0.07)) - module.get_parameter("embedding.log_temperature")
    expected: Tensor = image_text_contrastive_loss(cosines[:, 1] @ cosines[:, 0].T * log_scale.exp())
    assert float(sum(losses).detach()) / 8 == pytest.approx(float(expected.detach()), abs=1e-6)  # type: ignore[union-attr]
    (expected * 8).backward()
    for name, parameter in module.named_parameters():
        if name != "embedding.log_temperature":  # it is also in `vectors`, which are normalized again
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert float(found["embedding.log_temperature"]) == pytest.approx(
        float(module.get_parameter("embedding.log_temperature").grad), rel=1e-4
    )


def _rows(batch: Batch, rows: slice) -> Batch:
    assert batch.images is not None
    hashes = batch.targets["text_hash"].view(8, 2)[rows].flatten()
    return Batch(
        input_ids=batch.input_ids[rows],
        images=batch.images[rows],
        is_captioned=True,
        targets={"text_hash": hashes},
        num_targets={"contrastive": 4},
    )


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        (
            "vit",
            {"objective": {"type": "causal_lm"}},
            "learns from texts, and model.type=vit reads images alone",
        ),
        ("vit", {"objective": {"type": "masked_lm"}}, "objective.type=masked_lm learns from texts"),
        (
            "vit",
            {"objective": {"type": "contrastive"}},
            "Images have two with data.views=2, and with data.text",
        ),
        ("vit", {"objective": {"type": "contrastive", "views": "crops"}}, "crops cuts texts, and these rows"),
        (
            "vit",
            {"model": TEXT, "tokenizer": "own"},
            "data.type=images has images, and model.type=transformer reads",
        ),
        (
            "vit",
            {"data": {"type": "labelled", "path": "a.jsonl"}},
            "data.type=labelled has texts, and model.type=vit",
        ),
        (
            "vit",
            {"validation": {"type": "labelled", "path": "a.jsonl"}},
            "validation.type=labelled has texts",
        ),
        ("vit", {"tokenizer": "x"}, "tokenizer=x, and the model reads images alone: leave it out"),
        ("vit", {"batch": {"global_batch_size": 8, "micro_batch_size": 2, "seq_len": 4}}, "set it to 1"),
        ("vit", {"data": {"type": "images", "source": "digits", "text": "label"}}, "leave text out"),
        ("vit", {"model": {**VIT, "image_size": 16}}, "set model.num_channels=1 and model.image_size=8"),
        (
            "vit",
            {"data": {"type": "images", "source": "digits", "label": None}, "validation": None},
            "needs labels: set data.type=labelled, or label of images",
        ),
        ("clip", {"data": {"type": "images", "source": "digits"}}, "set text of the data, such as label"),
        ("clip", {"objective": {"type": "classification"}}, "set objective.type=contrastive"),
        ("clip", {"tokenizer": None}, "tokenizer is not set"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path, tokenizer: str, kind: str, changes: dict[str, Any], problem: str
) -> None:
    own = {"tokenizer": tokenizer} if changes.get("tokenizer") == "own" else {}
    with pytest.raises((ConfigError, DataError)) as error:
        run(Topology(), config_of(kind, tmp_path / "run", tokenizer, **{**changes, **own}))
    assert problem in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["tokens", "labelled", "completion", "images", "contrastive"])
def test_a_misfit_is_told_once_and_without_what_follows_from_it(
    data: Path, tmp_path: Path, kind: str
) -> None:
    rows = str(data / "train.jsonl")
    texts: dict[str, dict[str, Any]] = {
        "tokens": {"type": "tokens", "sources": [{"path": str(data / "shards" / "train")}]},
        "labelled": {"type": "labelled", "path": rows},
        "completion": {"type": "completion", "path": rows, "prompt": "text", "completion": "label"},
    }
    raw = config_of("vit", tmp_path / "run", "")
    expected = f"data.type={kind} has texts, and model.type=vit reads images: set model.type=transformer"
    if kind in texts:
        raw |= {"data": texts[kind], "validation": None}
    elif kind == "images":
        raw |= {"model": TEXT, "tokenizer": str(data / "tokenizer.model"), "validation": None}
        raw["batch"] = {**raw["batch"], "seq_len": 6}
        expected = "data.type=images has images, and model.type=transformer reads texts alone"
    else:
        raw["objective"] = {"type": "contrastive"}
        expected = "objective.views=columns needs two texts in each row"
    with pytest.raises(ConfigError) as error:
        read_inputs(parse(RunConfig, raw))
    (line,) = str(error.value).splitlines()
    assert line.startswith(expected)
