"""What reads the hidden states: projections, the contrastive scalars, the language, matching, image and task heads.

Every head is its own module, called once a forward: ZeRO-3 gathers its weights around that call.

Shape letters: R rows, D hidden size, V vocabulary, C outputs of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmscale.model.attention import padded_attention
from mmscale.model.block import activation
from mmscale.model.configuration import ExpertShape, MMScaleConfig
from mmscale.model.cross_entropy import linear_cross_entropy


class Projection(nn.Module):
    """Final norm of a lower stack, and the linear map into the contrastive space. A post-norm stack needs no final norm."""

    def __init__(self, config: MMScaleConfig, shape: ExpertShape, bias: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity() if shape.post_norm else nn.LayerNorm(shape.width, eps=shape.eps)
        self.linear = nn.Linear(shape.width, config.projection_size, bias=bias)

    def forward(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The normed states (R, D), and unit vectors in fp32 (R, projection size)."""
        normed = self.norm(x_RD)
        return normed, F.normalize(self.linear(normed).float(), dim=-1)


class AttentionPool(nn.Module):
    """A learned query gathers from all tokens of an image. Source: Zhai et al. 2022 (Scaling Vision Transformers), section 3.2."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()
        d = shape.width
        self.heads = shape.heads
        self.probe = nn.Parameter(torch.empty(1, d))
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=shape.eps)
        self.up = nn.Linear(d, shape.mlp)
        self.act = activation(shape.activation)
        self.down = nn.Linear(shape.mlp, d)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """One state an image, (N, D)."""
        n, length, d = x_NLD.shape
        q_NH1K = self.q(self.probe).view(1, self.heads, 1, d // self.heads).expand(n, -1, -1, -1)
        k_NHLK, v_NHLK = self.kv(x_NLD).view(n, length, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        # without images the empty result hangs on its inputs, as in `EmptyPlan`
        gathered = padded_attention(q_NH1K, k_NHLK, v_NHLK, None) if n else q_NH1K + (k_NHLK + v_NHLK).sum(2, keepdim=True)
        gathered_ND: Tensor = self.out(gathered.reshape(n, d))
        return gathered_ND + self.down(self.act(self.up(self.norm(gathered_ND))))  # type: ignore[no-any-return]


class PooledProjection(Projection):
    """The same of a stack without a [CLS] token: norm, attention pooling, linear map."""

    def __init__(self, config: MMScaleConfig, shape: ExpertShape) -> None:
        super().__init__(config, shape)
        self.pool = AttentionPool(shape)

    def forward(self, x_NLD: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled states (N, D) of whole images, and unit vectors in fp32 (N, projection size)."""
        pooled_ND = self.pool(self.norm(x_NLD))
        return pooled_ND, F.normalize(self.linear(pooled_ND).float(), dim=-1)


class ContrastiveScale(nn.Module):
    """Temperature and bias of the sigmoid loss. Source: Zhai et al. 2023 (SigLIP), section 3.2: t = 10, b = -10 for batches of 32k.

    The bias starts at -ln(candidates), the log-odds of a random pair, which is SigLIP's value at its batch size: with a smaller batch the
    loss otherwise spends its first thousands of steps on finding it. Both are stored divided by `GAIN`: an adaptive optimizer moves every
    number by about the learning rate a step, and these two have to travel further than a weight.
    """

    GAIN = 10.0
    LARGEST = math.log(100.0)

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Factor and bias of a similarity, fp32 (1,) each; new tensors, which outlive the gathered parameters."""
        return (self.log_scale.float() * self.GAIN).clamp(max=self.LARGEST).exp(), self.bias.float() * self.GAIN


class LanguageHead(nn.Module):
    """Map to the vocabulary; its weight is its own, not the word table's, and is held here for the chunked loss."""

    def __init__(self, config: MMScaleConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.backend: str | None = None
        """Of torch.compile, for the loss."""

    def forward(self, x_RD: Tensor, labels_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Without labels: the logits (R, V) and an empty tensor. With labels: cross-entropy (R,) fp32 and hits (R,) bool."""
        x_RD = self.norm(x_RD)
        if labels_R is None:
            logits_RV = F.linear(x_RD, self.weight, self.bias)
            return logits_RV, logits_RV[:0]
        return linear_cross_entropy(x_RD, self.weight, self.bias, labels_R, self.backend)


class OutputLinear(nn.Linear):
    """The layer that ends a head: it starts small, so that the first predictions are all about alike."""


class NormHead(nn.Module):
    """Norm and linear map: matching (one logit), masked image, task heads.

    Args:
        config: the model's shape.
        outputs: numbers that it predicts.
        concat: it reads three states that are normed already.
    """

    def __init__(self, config: MMScaleConfig, outputs: int, *, concat: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity() if concat else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.linear = OutputLinear((3 if concat else 1) * config.hidden_size, outputs)

    def start_at(self, values_C: Sequence[float]) -> None:
        """Before training: outputs that are about these, whatever is read."""
        with torch.no_grad():
            self.linear.bias.copy_(torch.tensor(values_C))

    def forward(self, x_RD: Tensor) -> Tensor:
        """Outputs in fp32, (R, C)."""
        out: Tensor = self.linear(self.norm(x_RD))
        return out.float()
