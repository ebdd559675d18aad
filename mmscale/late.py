"""Numbers on their way from the device to the host, which does not wait for them until it needs them."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """A copy in the host's memory that may still be under way.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values
            return
        self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def get(self) -> Tensor:
        """The values, on the host; waits for what the device had been told when this was made."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
