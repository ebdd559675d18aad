"""Batches on their way to the device, on a stream of their own: they travel while the device computes the step before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmscale.data.batch import Batch


@dataclass(slots=True)
class Arriving:
    """Batches that may still be on their way."""

    batches: list[Batch]
    done: torch.cuda.Event | None
    """Comes when all of them have been copied; None where nothing had to be."""

    def arrived(self) -> list[Batch]:
        """Make the stream that computes wait for the copies, not the host, and give the batches."""
        if self.done is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            for batch in self.batches:
                batch.each(lambda tensor: tensor.record_stream(stream))  # their memory is the copying stream's: kept until used
        return self.batches


class Transfer:
    """Copies batches to one device. On a CPU they are the very same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.ahead = self.stream is not None
        """Whether the next step's batches set out before this step is computed."""

    def start(self, host: list[Batch]) -> Arriving:
        """Begin to copy; the host's batches must be page-locked and stay as they are until the copies are used."""
        if self.stream is None:
            return Arriving(host if self.device.type == "cpu" else [batch.to(self.device) for batch in host], None)
        with torch.cuda.stream(self.stream):
            batches = [batch.to(self.device) for batch in host]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self.stream)
        return Arriving(batches, done)
