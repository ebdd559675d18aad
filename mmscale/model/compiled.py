"""torch.compile of what is dense in a layer: norms, projections, feed-forward part; of what the loss over the vocabulary does to each
logit; and, on CUDA, of the copies that put rows of two experts into one sequence. Attention itself and its plans stay outside.

All experts of a model share two graphs, whatever the layer: weights are inputs of a graph, and the number of tokens is a symbol in it,
so that ragged batches compile nothing again. The modules stay what they are, and with them the names in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.model.block import Expert
from mmscale.model.heads import LanguageHead
from mmscale.model.model import MMScaleModel


def compile_experts(model: nn.Module, backend: str = "inductor") -> int:
    """Compile the dense parts of every expert and the language head's loss, when they are first called.

    Returns:
        How many experts there are.
    """
    for module in model.modules():
        if isinstance(module, (LanguageHead, MMScaleModel)):
            module.backend = backend
    experts = [module for module in model.modules() if isinstance(module, Expert)]
    for expert in experts:
        expert.project = _ragged(expert.project, backend)  # type: ignore[method-assign]
        expert.combine = _ragged(expert.combine, backend)  # type: ignore[method-assign]
    return len(experts)


def _ragged(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Compile a function of packed tokens for any number of them; none and one, for which torch would make graphs, run as they are."""
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    def call(*tokens: Tensor) -> Any:
        if len(tokens[0]) < 2:
            return function(*tokens)
        for tensor in tokens:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*tokens)

    return call
