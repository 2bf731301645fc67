"""Small values between host and device, without a wait of one for the other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """The numbers as a 1-D tensor: int64 if all are integers, else float32.

    `torch.tensor(numbers, device=device)` would wait until a GPU has done all work enqueued before.
    """
    on_host = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


class DeferredRead:
    """Starts to copy `value` to the host now; `get` waits only until the device has come this far.

    A later `.tolist()` would wait for everything that was enqueued since, which leaves the device idle.
    """

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def get(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return [int(number) for number in self._value]
