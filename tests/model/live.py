"""Counts the bytes of tensors that are alive, exactly and on any device: what ran under `Live` and is still held by somebody."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Storages made by operations under this mode; those of tensors made before it do not count."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.before = {t.untyped_storage()._cdata for t in before}
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def bytes(self) -> int:
        """Bytes alive now."""
        self.found = {key: (ref, size) for key, (ref, size) in self.found.items() if not ref.expired()}
        return sum(size for _, size in self.found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and remember its results' storages."""
        out = func(*args, **(kwargs or {}))
        new = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                known = self.found.get(storage._cdata)
                if storage._cdata not in self.before and (known is None or known[0].expired()):
                    self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    new = True
        if new:  # a view adds nothing
            self.peak = max(self.peak, self.bytes())
        return out
