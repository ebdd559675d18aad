"""Reading the tensors of a checkpoint by name and range, from whichever files have them. Nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmscale.checkpoint.index import StateIndex, TensorEntry, file_of, read_index
from mmscale.checkpoint.manifest import is_pickle
from mmscale.checkpoint.tensor_file import DTYPES, key_of
from mmscale.errors import CheckpointError


class StateReader:
    """The tensors of one checkpoint. Files are mapped into memory when they are first needed; only the ranges asked for are read."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.index: StateIndex = read_index(checkpoint)
        self._files: dict[int, Any] = {}

    def entry(self, kind: str, name: str) -> TensorEntry:
        """Describe one tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        try:
            return self.index.tensors[kind][name]
        except KeyError as e:
            raise CheckpointError(f"The checkpoint {str(self.checkpoint)!r} holds no {kind} {name}.") from e

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Read a range of a flattened tensor, (numel,); the default is all of it.

        Raises:
            CheckpointError: there is no such tensor, or its file is not what the index says.
        """
        entry = self.entry(kind, name)
        stop = entry.numel if numel is None else start + numel
        out = torch.empty(stop - start, dtype=DTYPES[entry.dtype])
        for rank, at, size in self.index.ranges[name]:
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                out[low - start : high - start] = self._slice(rank, kind, name, low - at, high - at)
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """Read a whole tensor in its shape."""
        return self.read(kind, name).view(self.entry(kind, name).shape)

    def _slice(self, rank: int, kind: str, name: str, low: int, high: int) -> Tensor:
        try:
            if rank not in self._files:
                self._files[rank] = _open(self.checkpoint / file_of(rank))
            values: Tensor = self._files[rank].get_slice(key_of(kind, name))[low:high]
            return values
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file_of(rank)} of the checkpoint {str(self.checkpoint)!r} cannot be read: {e}.") from e


def _open(path: Path) -> Any:
    if is_pickle(path):
        raise CheckpointError(f"{str(path)!r} is a pickle, not a safetensors file. Pickles can run code when they are loaded; it was not.")
    return safe_open(path, framework="pt")
