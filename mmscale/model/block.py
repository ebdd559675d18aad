"""Pre-norm Transformer layers. An expert is one modality's weights of a layer; attention mixes whatever a plan joins.

Shape letters: T tokens, D hidden size, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmscale.model.attention import Plan
from mmscale.model.configuration import MMScaleConfig

Projected = tuple[Tensor, Tensor, Tensor]


class ResidualLinear(nn.Linear):
    """A linear layer that writes into the residual stream: initialised smaller, by the depth of the stack."""


class Expert(nn.Module):
    """Norms, projections and feed-forward layer of one modality."""

    def __init__(self, config: MMScaleConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.attention_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.q_norm: nn.Module = nn.RMSNorm(config.head_size, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(config.head_size, eps=1e-6) if config.qk_norm else nn.Identity()
        self.out = ResidualLinear(d, d)
        self.mlp_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.up = nn.Linear(d, config.mlp_size)
        self.act = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.down = ResidualLinear(config.mlp_size, d)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x_TD: Tensor) -> Projected:
        """Queries, keys and values, each (T, H, K)."""
        qkv: Tensor = self.qkv(self.attention_norm(x_TD))
        q, k, v = qkv.view(len(x_TD), 3, self.heads, x_TD.shape[1] // self.heads).unbind(1)
        return self.q_norm(q), self.k_norm(k), v

    def combine(self, x_TD: Tensor, attended_THK: Tensor) -> Tensor:
        """The rest of the layer after attention."""
        x_TD = x_TD + self.dropout(self.out(attended_THK.flatten(1)))
        x_TD = x_TD + self.dropout(self.down(self.act(self.up(self.mlp_norm(x_TD)))))
        return x_TD


class UnimodalBlock(nn.Module):
    """A lower layer: one expert, attention within its sequences."""

    def __init__(self, config: MMScaleConfig) -> None:
        super().__init__()
        self.expert = Expert(config)

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """One layer; (T, D)."""
        return self.expert.combine(x_TD, plan.attend(*self.expert.project(x_TD)))


class FusionBlock(nn.Module):
    """An upper layer: all experts, attention over sequences of perception and text tokens."""

    def __init__(self, config: MMScaleConfig, others: Sequence[str] = ()) -> None:
        super().__init__()
        self.perception = Expert(config)
        self.experts = nn.ModuleDict({name: Expert(config) for name in others})
        self.text = Expert(config)

    @property
    def in_order(self) -> list[Expert]:
        """The experts in the order of the buffer's parts."""
        return [self.perception, *(e for e in self.experts.values() if isinstance(e, Expert)), self.text]

    def forward(self, parts: tuple[Tensor, ...], plan: Plan, rows: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """One layer over the buffer of all parts, one after the other.

        Args:
            parts: (T, D) tokens of each expert: perception, those of modalities with their own, text.
            plan: how they attend.
            rows: rows of each part that go on after attention; None for all. The last layer passes those that a head reads: most
                tokens are only looked at there, so their feed-forward part is not computed.
        """
        projected = [expert.project(x_TD) for expert, x_TD in zip(self.in_order, parts, strict=True)]
        joined = plan.attend(*(torch.cat(same) for same in zip(*projected, strict=True)))
        attended = torch.split(joined, [len(x_TD) for x_TD in parts])
        if rows is not None:
            parts = tuple(x_TD.index_select(0, r) for x_TD, r in zip(parts, rows, strict=True))
            attended = tuple(x_THK.index_select(0, r) for x_THK, r in zip(attended, rows, strict=True))
        return tuple(expert.combine(*pair) for expert, *pair in zip(self.in_order, parts, attended, strict=True))


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """Run a layer; with `recompute` its activations are thrown away and computed again in backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
