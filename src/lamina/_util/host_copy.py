"""Numbers on their way from an accelerator to the host, which does not wait for them."""

from __future__ import annotations

from typing import Any

import torch

#: devices whose module in torch has events and streams
_WITH_EVENTS = ("cuda", "xpu")


class HostCopy:
    """Copies a vector of numbers to the host in the background; only `read` waits.

    The copy goes into pinned memory, as torch copies into any other memory only after the device
    has finished its work. A device without events is copied when the numbers are read.

    Args:
        numbers: a vector that nobody changes any more.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: Any = None
        self._host = numbers
        if numbers.device.type in _WITH_EVENTS:
            module: Any = torch.get_device_module(numbers.device)
            self._host = torch.empty(
                numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True
            )
            self._host.copy_(numbers, non_blocking=True)
            self._event = module.Event()
            self._event.record(module.current_stream(numbers.device))

    @property
    def done(self) -> bool:
        """Whether reading it waits for nothing."""
        if self._event is not None:
            return bool(self._event.query())
        return self._host.device.type == "cpu"

    def read(self) -> list[float]:
        """Return the numbers; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return [float(number) for number in self._host.tolist()]
