"""The fixed parts of DeepSpeed's files, checked when they are read: counts, names, shapes, tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
)

from distft.checkpoint.formats.torch_file.values import OpaqueObject, StoredTensor
from distft.checkpoint.manifest import PlainName
from distft.errors import CheckpointError

_SCALAR = (bool, int, float, str)
_MAX_DIMENSIONS = 64  # torch's limit
_MOST_PROBLEMS = 5  # in a message

Count = Annotated[int, Field(ge=0, lt=1 << 53, strict=True)]
_Ranks = Annotated[int, Field(ge=1, lt=1 << 31, strict=True)]  # nothing of this size is allocated
_Shape = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 53)], ...], Field(max_length=_MAX_DIMENSIONS)]
Shapes = dict[PlainName, _Shape]
_Tensor = InstanceOf[StoredTensor]


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class ModelFile(_Content):
    """A *_model_states.pt. Further keys are the script's client_state."""

    module: dict[PlainName, Any]
    global_steps: Count
    global_samples: Count | None = None
    skipped_steps: Count
    dp_world_size: _Ranks
    buffer_names: tuple[PlainName, ...] | None = None
    optimizer: dict[str, Any] | None  # stage 0 only
    param_shapes: tuple[Shapes, ...] | None = None
    frozen_param_shapes: Shapes | None = None
    shared_params: dict[PlainName, PlainName] | None = None
    frozen_param_fragments: dict[PlainName, _Tensor] | None = None
    lr_scheduler: Any = None
    data_sampler: Any = None
    random_ltd: Any = None
    mp_world_size: Any = None
    checkpoint_parallel_dimensions: Any = None
    universal_checkpoint_info: Any = None
    ds_config: dict[str, Any] | None = None
    ds_version: Any = None


class ParamGroup(_Content):
    """An entry of torch's `param_groups`. Further keys are settings such as `lr`."""

    params: tuple[Count, ...]
    param_names: Any = None
    step: Any = None  # of optimizers that count their updates by group

    @property
    def settings(self) -> dict[str, Any]:
        return {key: _plain(value) for key, value in (self.model_extra or {}).items()}


class TorchOptimizer(_Content):
    """The state dict of a torch optimizer."""

    state: dict[Count, dict[str, Any]]
    param_groups: tuple[ParamGroup, ...]


class Stage12State(_Content):
    """A rank's optimizer state at stages 1 and 2: its partition of each group's flat buffer."""

    base_optimizer_state: TorchOptimizer
    single_partition_of_fp32_groups: tuple[_Tensor, ...]
    zero_stage: Annotated[int, BeforeValidator(int)] = 1  # BF16_Optimizer, always of stage 1, leaves it out
    param_alignment_paddings: tuple[tuple[Count, ...], ...] = ()
    partition_count: tuple[_Ranks, ...] | _Ranks | None = None
    param_slice_mappings: tuple[dict[PlainName, Any], ...] | None = None
    loss_scaler: Any = None


class Stage3State(_Content):
    """A rank's optimizer state at stage 3: its partition of each parameter, by sub-group."""

    optimizer_state_dict: TorchOptimizer
    fp32_flat_groups: tuple[_Tensor, ...]
    zero_stage: Annotated[int, BeforeValidator(int)]
    partition_count: _Ranks | None = None
    loss_scaler: Any = None


class Stage0State(_Content):
    """The optimizer's own state dict, in 16 bits with the fp32 weights."""

    optimizer_state_dict: TorchOptimizer
    fp32_groups: tuple[tuple[_Tensor, ...], ...] | None = None
    fp32_groups_flat: tuple[_Tensor, ...] | None = None


class LossScaler(_Content):
    """The numbers of DeepSpeed's loss scaler."""

    cur_scale: Annotated[float, Field(gt=0)] | None = None
    cur_iter: Count = 0
    last_overflow_iter: Annotated[int, Field(ge=-1, lt=1 << 53)] = -1
    scale_window: Annotated[int, Field(ge=1)] = 1000
    cur_hysteresis: int = 1


@dataclass(frozen=True, slots=True)
class ExtraState:
    """Contents of a DeepSpeed checkpoint other than parameters; a conversion to DeepSpeed includes them."""

    lr_scheduler: Any = None  # its state dict
    client_state: Mapping[str, Any] | None = None
    loss_scaler: OpaqueObject | None = None  # fp16 only

    @classmethod
    def of(cls, model: ModelFile, loss_scaler: Any = None) -> "ExtraState":
        scaler = loss_scaler if isinstance(loss_scaler, OpaqueObject) else None
        return cls(model.lr_scheduler, model.model_extra, scaler)


_ContentT = TypeVar("_ContentT", bound=_Content)


def parse_content(kind: type[_ContentT], raw: Any, path: str) -> _ContentT:
    """Raises `CheckpointError` with the entries of the file `path` that DeepSpeed cannot have written."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    problems = [f"{'.'.join(map(str, e['loc']))[:200] or 'the whole'}: {e['msg']}" for e in found]
    more = f"; and {len(problems) - _MOST_PROBLEMS:,} more" if len(problems) > _MOST_PROBLEMS else ""
    raise _unknown_layout(path, "DeepSpeed 0.19", f"{'; '.join(problems[:_MOST_PROBLEMS])}{more}")


@contextmanager
def unknown_layout_as_checkpoint_error(path: str, writer: str = "DeepSpeed 0.19") -> Iterator[None]:
    """Raise a `CheckpointError` about `path` for what contents raise that `writer` cannot have written."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise _unknown_layout(path, writer, f"{type(error).__name__}: {error}") from error


def _unknown_layout(path: str, writer: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not have the layout of {writer} ({reason}): "
        "it is damaged, or a version of DeepSpeed wrote it that distft does not know."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.item() if value.numel == 1 else None  # a learning rate that is a tensor on the device
    if isinstance(value, list | tuple):
        return [entry if isinstance(entry, _SCALAR) else _plain_scalar(entry) for entry in value]
    return value if isinstance(value, _SCALAR) else None


def _plain_scalar(value: Any) -> Any:
    return value.item() if isinstance(value, StoredTensor) and value.numel == 1 else None


def update_count(state: Mapping[str, Any], group: ParamGroup | None = None) -> int | None:
    """The optimizer's `step`, from a parameter's state or its group; None for an optimizer without one."""
    step = state.get("step", None if group is None or not state else group.step)
    if isinstance(step, StoredTensor):
        step = step.item() if step.numel == 1 else None
    if step is None or (isinstance(step, int | float) and 0 <= step < 1 << 53 and step == int(step)):
        return None if step is None else int(step)
    raise CheckpointError(f"an optimizer's step of {step!r} is not a count: the file is damaged.")


def moments(state: Mapping[str, Any], numel: int) -> dict[str, StoredTensor]:
    """The tensors of an optimizer's state with one dimension or more and at least `numel` elements."""
    return {
        name: values
        for name, values in state.items()
        if isinstance(values, StoredTensor) and values.shape and values.numel >= numel and name != "step"
    }
