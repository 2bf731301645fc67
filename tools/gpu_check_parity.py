"""Phases `parity` and `parity-compiled` of `gpu_check.py`: losses on the GPU equal those of a CPU in fp32."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

from gpu_check_product import Session, Training, run_config
from gpu_check_worker import Case, CheckError, Row, SkipCase
from torch.nn.attention import SDPBackend, sdpa_kernel

from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.run.config import RunConfig

# The largest difference of any of 20 losses, which fall from 8.45 to 6.58, from those in fp32 on the CPU. On
# a CPU that multiplies in fp32 we measured 2.8e-4 in fp16 and 1.8e-3 in bf16. fp32 sums in another order;
# tf32 has 10 bits of mantissa like fp16, and e4m3 has 3.
TOLERANCES = {"fp32": 2e-4, "tf32": 3e-3, "fp16": 3e-3, "bf16": 1e-2, "fp8": 0.1}
# Of models with experts: where rounding exchanges two nearly equal scores, a token takes another expert, and
# the balance's biases move by the sign of a count. On an H100 we measured 1.9e-3 in fp32 and 1.4e-2 in bf16.
_EXPERT_TOLERANCES = {"fp32": 1e-2, "bf16": 5e-2}
_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# Settings of other models than the small Transformer; `None` leaves one out.
_NO_HEADS = {"num_heads": None, "num_kv_heads": None, "d_ff": None, "attention_kernel": None}
_IMAGES = {
    "image_size": 8,
    "num_channels": 1,
    **dict.fromkeys(("max_seq_len", "num_kv_heads", "pad_vocab_to", "d_ff", "attention_kernel")),
}
_MODELS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {},
    "experts": {"experts": {"num_experts": 4, "experts_per_token": 2, "bias_update_rate": 1e-3}},
    "windows and softcaps": {
        "sliding_window": 24,
        "global_attention_every": 2,
        "attention_logit_softcap": 20.0,
        "final_logit_softcap": 15.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64},
    },
    "post-norm": {"norm": "layernorm", "norm_position": "post", "positions": "learned", "mlp": "gelu_exact"},
    **{name: {"type": name, **_NO_HEADS} for name in ("deep_averaging", "rnn", "lstm", "gru")},
    "cnn": {"type": "cnn", "kernel_sizes": (2, 3, 4, 5), **_NO_HEADS},
    "encoder-decoder": {
        "type": "encoder_decoder",
        "num_layers": None,
        "num_kv_heads": None,
        "attention_kernel": None,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
    },
    "ViT": {"type": "vit", "patch_size": 2, **_IMAGES},
    "image CNN": {
        "type": "image_cnn",
        "num_filters": (32, 64),
        **_IMAGES,
        **dict.fromkeys(("d_model", "num_layers", "num_heads")),
    },
    "muP": {"parametrization": "mup", "init_std": None, "mup_base_d_model": 64, "mup_base_head_dim": 32},
}
_CLASSES_OF_IMAGES = {
    "tokenizer": None,
    "data": {"type": "images", "source": "digits", "augment": {"shift": 1}},
    "objective": {"type": "classification"},
}
_LORA = {"lora": {"rank": 8}, "trainable": ("@lora",)}
# Sections of the run's settings other than `model`.
_SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "encoder-decoder": {"objective": {"type": "span_corruption"}},
    "ViT": _CLASSES_OF_IMAGES,
    "image CNN": _CLASSES_OF_IMAGES,
    "LoRA": _LORA,
    "LoRA over 8 bits": {**_LORA, "engine": {"frozen_bits": 8}},
    "LoRA over 4 bits": {**_LORA, "engine": {"frozen_bits": 4}},
}
# torch's messages if a backend does not take these inputs, on a GPU and on a CPU
_NO_KERNEL = ("No available kernel", "No viable backend")
_NO_FP16 = "fp16 is not supported on your device"  # DeepSpeed's


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One training to compare with the reference: settings that differ from the defaults."""

    name: str
    precision: str = "fp32"  # key of `TOLERANCES`
    packed: bool = False
    dropout: float = 0.0
    engine: Mapping[str, Any] = field(default_factory=dict)
    attention_kernel: str = "auto"
    sdpa_backend: str | None = None  # the only one that torch may use
    model: str = "transformer"  # key of `_MODELS` or of `_SECTIONS`

    @property
    def engine_settings(self) -> dict[str, Any]:
        param_dtype = {"tf32": "fp32", "fp8": "bf16"}.get(self.precision, self.precision)
        of_model = _SECTIONS.get(self.model, {}).get("engine", {})
        return {"type": "local", "param_dtype": param_dtype, "compile": False, **of_model, **self.engine}

    @property
    def reads_images(self) -> bool:
        return self.model in {"ViT", "image CNN"}

    @property
    def tolerance(self) -> float:
        return (_EXPERT_TOLERANCES if self.model == "experts" else TOLERANCES)[self.precision]

    @property
    def labels(self) -> dict[str, Any]:
        return {"precision": self.precision, "tolerance": self.tolerance}


def parity_cases(session: Session) -> list[Case]:
    """Everything that runs without a compiler of its own, the plainest first."""
    return [_case(session, variant) for variant in _all_of_transformer()]


def model_parity_cases(session: Session) -> list[Case]:
    """Models of each type."""
    return [_case(session, variant) for variant in _models()]


def compiled_parity_cases(session: Session) -> list[Case]:
    """The same with torch.compile, and FP8, which is meant to be compiled. A dry run compiles one of them."""
    first, *others = _compiled()
    cases = [_case(session, first, limit_s=60)]
    for variant in others:
        if session.dry and variant.engine.get("compile"):
            cases.append(Case(variant.name, partial(check_settings, session, variant)))
        else:
            cases.append(_case(session, variant, limit_s=60))
    return cases


def check_settings(session: Session, variant: Variant) -> Row:
    """In a dry run: the variant's settings are valid. Compiling all of them would take minutes on a CPU."""
    _config(session, variant, session.device.kind)
    raise SkipCase("a dry run compiles only one; the settings are valid")


def _case(session: Session, variant: Variant, limit_s: float = 45) -> Case:
    return Case(variant.name, partial(compare, session, variant), limit_s, variant.labels)


def _all_of_transformer() -> list[Variant]:
    return [*_precisions(), *_zero_stages(), *_kernels(), *_memory_savers()]


def _precisions() -> Iterator[Variant]:
    for packed in (False, True):
        for precision in ("fp32", "bf16", "fp16"):
            name = f"local {precision} {'packed' if packed else 'plain'}"
            yield Variant(name=name, precision=precision, packed=packed)
    yield Variant(name="local tf32 plain", precision="tf32", engine={"allow_tf32": True})
    for packed in (False, True):
        name = f"local fp32 dropout {'packed' if packed else 'plain'}"
        yield Variant(name=name, packed=packed, dropout=0.1)
    yield Variant(name="local bf16 dropout", precision="bf16", dropout=0.1)


def _zero_stages() -> Iterator[Variant]:
    for stage in (1, 3, 2, 0):
        for precision, packed in (("fp32", False), ("bf16", True), ("fp16", False)):
            yield Variant(
                name=f"zero {stage} {precision} {'packed' if packed else 'plain'}",
                precision=precision,
                packed=packed,
                engine={"type": "zero", "zero_stage": stage},
            )
    yield Variant(
        name="zero 1 bf16 dropout", precision="bf16", dropout=0.1, engine={"type": "zero", "zero_stage": 1}
    )
    offload = {"offload_optimizer": "cpu"}
    for stage in (1, 2):
        engine = {"type": "zero", "zero_stage": stage, **offload}
        yield Variant(name=f"zero {stage} bf16 offload optimizer", precision="bf16", engine=engine)
    engine = {"type": "zero", "zero_stage": 3, **offload, "offload_param": "cpu"}
    yield Variant(name="zero 3 fp32 offload all", engine=engine)
    yield Variant(name="zero 3 bf16 offload all", precision="bf16", engine=engine)


def _kernels() -> Iterator[Variant]:
    for kernel in get_args(TransformerConfig.model_fields["attention_kernel"].annotation):
        for packed in (False, True):
            name = f"kernel {kernel} bf16 {'packed' if packed else 'plain'}"
            yield Variant(name=name, precision="bf16", packed=packed, attention_kernel=kernel)
    for backend in _SDPA_BACKENDS:
        for packed in (False, True):
            yield Variant(
                name=f"kernel sdpa {backend} bf16 {'packed' if packed else 'plain'}",
                precision="bf16",
                packed=packed,
                attention_kernel="sdpa",
                sdpa_backend=backend,
            )


def _models() -> Iterator[Variant]:
    for model in dict.fromkeys((*_MODELS, *_SECTIONS)):
        if model == "transformer":
            continue
        for precision, packed in (("fp32", False), ("fp32", True), ("bf16", True)):
            name = f"{model} {precision} {'packed' if packed else 'plain'}"
            variant = Variant(name=name, precision=precision, packed=packed, model=model)
            if not (packed and variant.reads_images):
                yield variant
        if variant.reads_images:
            yield Variant(name=f"{model} bf16 plain", precision="bf16", model=model)
        zero = {"type": "zero", "zero_stage": 3}
        yield Variant(name=f"{model} fp32 zero 3", model=model, engine=zero)
    yield Variant(
        name="muP bf16 flex packed", precision="bf16", packed=True, model="muP", attention_kernel="flex"
    )


def _memory_savers() -> Iterator[Variant]:
    for level in ("selective", "full"):
        settings = {"activation_checkpointing": level}
        yield Variant(name=f"local fp32 checkpointing {level}", engine=settings)
        yield Variant(
            name=f"local bf16 packed checkpointing {level}", precision="bf16", packed=True, engine=settings
        )
        zero = {"type": "zero", "zero_stage": 3, **settings}
        yield Variant(name=f"zero 3 bf16 checkpointing {level}", precision="bf16", engine=zero)


def _compiled() -> Iterator[Variant]:
    compiled = {"compile": True}
    zero = {**compiled, "type": "zero"}
    tensorwise, rowwise = ({"fp8": scaling, "fp8_min_features": 16} for scaling in ("tensorwise", "rowwise"))
    yield Variant(name="local fp32 compiled", engine=compiled)
    yield Variant(name="local bf16 compiled packed", precision="bf16", packed=True, engine=compiled)
    yield Variant(name="local fp8 tensorwise compiled", precision="fp8", engine={**compiled, **tensorwise})
    for stage in (1, 3):
        engine = {**zero, "zero_stage": stage}
        yield Variant(name=f"zero {stage} bf16 compiled", precision="bf16", engine=engine)
    yield Variant(name="local fp8 rowwise compiled", precision="fp8", engine={**compiled, **rowwise})
    for level in ("selective", "full"):
        engine = {**compiled, "activation_checkpointing": level}
        yield Variant(name=f"local bf16 compiled checkpointing {level}", precision="bf16", engine=engine)
    yield Variant(name="local fp8 tensorwise eager", precision="fp8", engine=tensorwise)
    yield Variant(name="local fp8 rowwise eager", precision="fp8", engine=rowwise)
    engine = {**zero, **tensorwise, "zero_stage": 1}
    yield Variant(name="zero 1 fp8 tensorwise compiled", precision="fp8", engine=engine)
    for model in ("LoRA", "LoRA over 8 bits", "LoRA over 4 bits"):
        yield Variant(name=f"{model} bf16 compiled", precision="bf16", model=model, engine=compiled)
    yield Variant(name="local fp32 compiled dropout", dropout=0.1, engine=compiled)
    yield Variant(name="zero 2 bf16 compiled", precision="bf16", engine={**zero, "zero_stage": 2})


def compare(session: Session, variant: Variant) -> Row:
    """Train on the device, and compare each loss with the reference's."""
    expected = reference_losses(session, packed=variant.packed, dropout=variant.dropout, model=variant.model)
    try:
        with _kernel_choice(variant.sdpa_backend):
            losses = train(session, variant, device=session.device.kind, num_steps=len(expected))
    except ConfigError as error:
        # The GPU may refuse nothing of this. The CPU of a dry run lacks some kernels and formats.
        if session.dry:
            raise SkipCase(f"refused on a CPU: {error}") from None
        raise
    except (RuntimeError, ValueError) as error:
        if any(message in str(error) for message in _NO_KERNEL):
            raise SkipCase(f"torch has no {variant.sdpa_backend} kernel for these inputs") from None
        if session.dry and _NO_FP16 in str(error):
            raise SkipCase("DeepSpeed has no fp16 on a CPU") from None
        raise
    return require_equal(losses, expected, variant.tolerance)


def require_equal(losses: Sequence[float], expected: Sequence[float], tolerance: float) -> Row:
    """The row of a comparison. Raises `CheckError` if any loss is further from its reference."""
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    # NaN compares false with everything, so we ask for what must be true.
    is_equal = all(difference <= tolerance for difference in differences)
    values = {
        "max_difference": float(f"{max(differences, key=lambda d: (math.isnan(d), d)):.3g}"),
        "first_loss": round(losses[0], 5),
        "last_loss": round(losses[-1], 5),
        "expected_last_loss": round(expected[-1], 5),
    }
    if not is_equal:
        raise CheckError(f"a loss differs by {values['max_difference']}, more than {tolerance}", **values)
    return values


def reference_losses(
    session: Session, *, packed: bool, dropout: float, model: str = "transformer"
) -> list[float]:
    """Losses of the local engine on the CPU in fp32. Kept in a file, which may be of another machine."""
    name = f"{model}_{'packed' if packed else 'plain'}_{dropout:g}"
    plain = Variant(name=f"reference {name}", packed=packed, dropout=dropout, model=model)
    path = session.work_dir / f"reference_{name}.json"
    fingerprint = _fingerprint(_config(session, plain, "cpu"))
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["fingerprint"] == fingerprint:
            losses: list[float] = kept["losses"]
            return losses
    losses = train(session, plain, device="cpu", num_steps=num_steps(session))
    path.write_text(json.dumps({"fingerprint": fingerprint, "losses": losses}))
    return losses


def write_references(session: Session) -> None:
    """The references of all cases, and the data that they read."""
    variants = (*_all_of_transformer(), *_models(), *_compiled())
    for model, packed, dropout in dict.fromkeys((v.model, v.packed, v.dropout) for v in variants):
        losses = reference_losses(session, packed=packed, dropout=dropout, model=model)
        print(f"{model} {'packed' if packed else 'plain'} {dropout:g}: {losses[0]:.4f} to {losses[-1]:.4f}")


def _fingerprint(config: RunConfig) -> str:
    """Of the settings that the losses depend on; not of the paths, which may be those of another machine."""
    settings = config.model_dump(mode="json", exclude={"run_dir", "tokenizer", "checkpoint", "device"})
    settings["data"].pop("sources", None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def num_steps(session: Session) -> int:
    return 3 if session.dry else 20


def small_model(session: Session) -> dict[str, Any]:
    """Sizes that every kernel and FP8 take, and that a CPU trains in seconds."""
    if session.dry:
        return {"max_seq_len": 32, "d_model": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return {
        "max_seq_len": 256,
        "d_model": 512,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "d_ff": 1536,
        "pad_vocab_to": 64,
    }


def small_batch(session: Session) -> tuple[int, int, int]:
    """Global batch, micro-batch, tokens per row: two micro-batches a step."""
    return (4, 2, 32) if session.dry else (8, 4, 256)


def train(session: Session, variant: Variant, *, device: str, num_steps: int) -> list[float]:
    """Losses of the variant on `device`."""
    config = _config(session, variant, device)
    with Training(config, session.collectives(config)) as training:
        return training.losses(num_steps)


def _config(session: Session, variant: Variant, device: str) -> RunConfig:
    model = {
        **small_model(session),
        "attention_kernel": variant.attention_kernel,
        "dropout": variant.dropout,
        **_MODELS.get(variant.model, {}),
    }
    model = {name: value for name, value in model.items() if value is not None}
    sections = {k: v for k, v in _SECTIONS.get(variant.model, {}).items() if k != "engine"}
    global_batch_size, micro_batch_size, seq_len = small_batch(session)
    return run_config(
        session.data,
        session.work_dir / "parity",
        device,
        model=model,
        batch=(global_batch_size, micro_batch_size, 1 if variant.reads_images else seq_len),
        engine=variant.engine_settings,
        packed=variant.packed,
        **sections,
    )


def _kernel_choice(backend: str | None) -> AbstractContextManager[Any]:
    if backend is None:
        return nullcontext()
    choice: AbstractContextManager[Any] = sdpa_kernel([_SDPA_BACKENDS[backend]])
    return choice
