"""torch.compile of a function whose tensors have any number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def fused(function: Callable[..., Any], backend: str | None, rows: Sequence[Tensor], *others: Any) -> Any:
    """Call `function(*rows, *others)`, compiled once for any number of rows.

    Args:
        function: of tensors alone, whose operations are to become few.
        backend: of torch.compile; None: operation by operation.
        rows: tensors of a number of rows that changes. With none or one, for which torch would make graphs of its own, nothing is compiled.
        others: whose shapes stay.
    """
    if backend is None or min(len(tensor) for tensor in rows) < 2:
        return function(*rows, *others)
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function, backend)(*rows, *others)


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True)
