"""What the backward costs, part by part, in forwards of that part: two where all is trained, less where weights are frozen.

A product x W has two in the backward: one for the gradient of W, which a frozen W does without, and one for that of x, which is left out
below everything that is trained. Adapters are of so low a rank that their own products are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mmscale.model.block import FusionBlock

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

ADAPTER = ".lora_"
MATRIX = 2
"""Dimensions of what a token is multiplied with."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of a stack of equal layers."""

    linear: float = 2.0
    """Of what tokens are multiplied with."""
    attention: float = 2.0
    """Of products of queries, keys and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backward:
    """The backward of a model, in forwards of each part. As it is: of a model that is trained whole."""

    embeddings: float = 2.0
    """Of patches."""
    perception: Sequence[Share] = ()
    """Of the perception experts' lower layers, in their order; those that are not there are trained whole."""
    text: Share = Share()
    fused_perception: Share = Share()
    fused_text: Share = Share()
    rest: float = 2.0
    """Of heads and projections."""

    @classmethod
    def of(cls, model: MMScaleModel) -> Backward:
        """That of a model with frozen parameters or adapters."""
        pictured, worded = [model.image_embedding, *model.patch_embeddings.values()], [model.text_embedding]
        lower = [model.image_layers, *model.expert_layers.values(), model.text_layers]
        perceived, read = _is_trained(pictured), _is_trained(worded)
        passes = _is_trained([*pictured, *worded, *lower])
        fused_perception, fused_text = _fused(model.fusion_layers, passes)
        known = {id(p) for part in (*pictured, *worded, *lower, model.fusion_layers) for p in part.parameters()}
        heads = [p for p in model.parameters() if id(p) not in known and _dimensions(p) == MATRIX]
        trained = sum(_size(p) for p in heads if p.requires_grad) / max(1, sum(map(_size, heads)))
        return cls(
            embeddings=2.0 * perceived,
            perception=[_stack(layers, perceived) for layers in lower[:-1]],
            text=_stack(model.text_layers, read),
            fused_perception=fused_perception,
            fused_text=fused_text,
            rest=trained + (passes or _is_trained([model.fusion_layers])),
        )


def _is_trained(modules: Iterable[nn.Module]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def _stack(layers: nn.Module, below: bool) -> Share:
    """The mean of a stack's layers, over what is below it."""
    found = []
    for layer in layers.children():
        share, below = _layer(layer, below)
        found.append(share)
    return _mean(found)


def _fused(layers: nn.Module, below: bool) -> tuple[Share, Share]:
    """The perception and the text experts of the fusion layers: what is trained in one layer's expert is below all of the next layer's."""
    perception, text = [], []
    for layer in layers.children():
        assert isinstance(layer, FusionBlock)
        *perceiving, reading = (_layer(expert, below) for expert in layer.in_order)
        perception += [share for share, _ in perceiving]
        text.append(reading[0])
        below = any(passes for _, passes in (*perceiving, reading))
    return _mean(perception), _mean(text)


def _layer(layer: nn.Module, below: bool) -> tuple[Share, bool]:
    """A layer's share, and whether a gradient goes on to what is above it. Its parameters come in the order in which they are used."""
    size = cost = 0
    attention: bool | None = None
    for name, parameter in layer.named_parameters():
        if ADAPTER not in name and _dimensions(parameter) == MATRIX:
            if "out" in name.split("."):
                attention = below
            size += _size(parameter)
            cost += _size(parameter) * (parameter.requires_grad + below)
        below = below or parameter.requires_grad
    return Share(cost / max(1, size), 2.0 * (below if attention is None else attention)), below


def _mean(shares: Sequence[Share]) -> Share:
    count = max(1, len(shares))
    return Share(sum(s.linear for s in shares) / count, sum(s.attention for s in shares) / count) if shares else Share()


def _size(parameter: nn.Parameter) -> int:
    """Under ZeRO 3 a parameter is empty between its uses."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
