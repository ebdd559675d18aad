"""Transformer layers. An expert is one modality's weights of a layer; attention mixes whatever a plan joins.

Shape letters: T tokens, D hidden size, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmscale.model.attention import Plan, attend_parts
from mmscale.model.configuration import ExpertShape, MMScaleConfig
from mmscale.model.convolution import Convolution, Neighbours, PatchConvolution
from mmscale.model.packed import Projected
from mmscale.model.text_convolution import TextConvolution

KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)
"""Operations whose results selective checkpointing keeps: those that take nearly all the time."""


ConvolutionType = type[PatchConvolution | TextConvolution] | None
"""The convolution that an expert has before its layer; None for none."""


class ResidualLinear(nn.Linear):
    """A linear layer that writes into the residual stream: initialised smaller, by the depth of the stack."""


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of CLIP. Source: Hendrycks and Gimpel 2016, section 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to each element."""
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """The activation of this name in the configuration."""
    return QuickGELU() if name == "quick_gelu" else nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")


class Expert(nn.Module):
    """Norms, projections and feed-forward layer of one modality.

    Norms stand before the sublayers, or after the residual sums (Vaswani et al. 2017, as in BERT).
    """

    def __init__(self, config: MMScaleConfig, shape: ExpertShape, *, convolution: ConvolutionType = None) -> None:
        super().__init__()
        d = shape.width
        self.convolution: Convolution | None = None if convolution is None else convolution(d)
        self.heads = shape.heads
        self.post_norm = shape.post_norm
        self.attention_norm = nn.LayerNorm(d, eps=shape.eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.q_norm: nn.Module = nn.RMSNorm(d // shape.heads, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(d // shape.heads, eps=1e-6) if config.qk_norm else nn.Identity()
        self.out = ResidualLinear(d, d)
        self.mlp_norm = nn.LayerNorm(d, eps=shape.eps)
        self.up = nn.Linear(d, shape.mlp)
        self.act = activation(shape.activation)
        self.down = ResidualLinear(shape.mlp, d)
        self.dropout = nn.Dropout(config.dropout)

    def convolve(self, x_TD: Tensor, neighbours: Neighbours | None) -> Tensor:
        """Add what is around each token, where the expert has a convolution."""
        if self.convolution is None:
            return x_TD
        assert neighbours is not None
        convolved: Tensor = self.convolution(x_TD, neighbours)
        return convolved

    def project(self, x_TD: Tensor) -> Projected:
        """Queries, keys and values, each (T, H, K)."""
        qkv: Tensor = self.qkv(x_TD if self.post_norm else self.attention_norm(x_TD))
        q, k, v = qkv.view(len(x_TD), 3, self.heads, x_TD.shape[1] // self.heads).unbind(1)
        return self.q_norm(q), self.k_norm(k), v

    def combine(self, x_TD: Tensor, attended_THK: Tensor) -> Tensor:
        """The rest of the layer after attention."""
        x_TD = x_TD + self.dropout(self.out(attended_THK.flatten(1)))
        if self.post_norm:
            x_TD = self.attention_norm(x_TD)
            return self.mlp_norm(x_TD + self.dropout(self.down(self.act(self.up(x_TD)))))  # type: ignore[no-any-return]
        x_TD = x_TD + self.dropout(self.down(self.act(self.up(self.mlp_norm(x_TD)))))
        return x_TD


class UnimodalBlock(nn.Module):
    """A lower layer: one expert, attention within its sequences."""

    def __init__(self, config: MMScaleConfig, shape: ExpertShape, *, convolution: ConvolutionType = None) -> None:
        super().__init__()
        self.expert = Expert(config, shape, convolution=convolution)

    def forward(self, x_TD: Tensor, plan: Plan, neighbours: Neighbours | None = None) -> Tensor:
        """One layer; (T, D)."""
        x_TD = self.expert.convolve(x_TD, neighbours)
        return self.expert.combine(x_TD, plan.attend(*self.expert.project(x_TD)))


class FusionBlock(nn.Module):
    """An upper layer: all experts, attention over sequences of perception and text tokens."""

    def __init__(self, config: MMScaleConfig, others: Sequence[str] = ()) -> None:
        super().__init__()
        shape, convolution = config.expert("image", fused=True), PatchConvolution if config.image_tower.convolution else None
        self.perception = Expert(config, shape, convolution=convolution)
        self.experts = nn.ModuleDict({name: Expert(config, shape, convolution=convolution) for name in others})
        self.text = Expert(config, config.expert("text", fused=True))

    @property
    def in_order(self) -> list[Expert]:
        """The experts in the order of the buffer's parts."""
        return [self.perception, *(e for e in self.experts.values() if isinstance(e, Expert)), self.text]

    def forward(
        self, parts: tuple[Tensor, ...], plan: Plan, rows: tuple[Tensor, ...] | None, neighbours: Sequence[Neighbours] = ()
    ) -> tuple[Tensor, ...]:
        """One layer over the buffer of all parts, one after the other.

        Args:
            parts: (T, D) tokens of each expert: perception, those of modalities with their own, text.
            plan: how they attend.
            rows: rows of each part that go on after attention; None for all. The last layer passes those that a head reads: most
                tokens are only looked at there, so their feed-forward part is not computed.
            neighbours: of the tokens of each part but text, where experts have a convolution.
        """
        parts = convolved(self.in_order, parts, neighbours)
        projected = [expert.project(x_TD) for expert, x_TD in zip(self.in_order, parts, strict=True)]
        attended = attend_parts(plan, projected)
        if rows is not None:
            parts = tuple(x_TD.index_select(0, r) for x_TD, r in zip(parts, rows, strict=True))
            attended = [x_THK.index_select(0, r) for x_THK, r in zip(attended, rows, strict=True)]
        return tuple(expert.combine(*pair) for expert, *pair in zip(self.in_order, parts, attended, strict=True))


def convolved(experts: Sequence[Expert], parts: Sequence[Tensor], neighbours: Sequence[Neighbours]) -> tuple[Tensor, ...]:
    """The parts after their experts' convolutions; text has none."""
    beside = [*neighbours, *[None] * (len(parts) - len(neighbours))]
    return tuple(expert.convolve(x_TD, near) for expert, x_TD, near in zip(experts, parts, beside, strict=True))


def run_block(block: nn.Module, recompute: str, *inputs: Any) -> Any:
    """Run a layer.

    Args:
        block: the layer.
        recompute: what backward computes again, as `model.activation_checkpointing`: none, full or selective.
        inputs: its arguments.
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    if recompute == "full":
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=kept_products)


def kept_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a forward and of its recomputation that keep matrix products and attention, and compute again what is cheap."""
    forward, again = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return forward, again


def _policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    kept = operation.name() in KEPT and not _narrows(inputs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _narrows(inputs: tuple[Any, ...]) -> bool:
    """Whether this is the product that ends a feed-forward layer: nothing in the block needs its result in backward."""
    weight = inputs[-1]
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] > weight.shape[1]
