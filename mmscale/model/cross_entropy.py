"""Cross-entropy after a linear map to the vocabulary, in chunks of rows: no tensor of rows x vocabulary beyond a bound ever exists.

The forward keeps the log-sum-exp of each row; the backward computes a chunk's logits again, one product of matrices in four. Working
the gradient out in the forward instead (Hsu et al. 2024, Liger Kernel, section 3.2) would save that product, but needs one weight
gradient for each loss that reads the rows: their factors are not known before backward. Rows that fit into one chunk keep their
probabilities instead, and nothing is computed twice.

Sources: Wijmans et al. 2025 (Cut Your Losses in Large-Vocabulary Language Models), section 4, for the recomputation from the log-sum-exp.

Shape letters: R rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 1 << 23
"""Logits that exist at one time: 32 MiB in fp32, and as much for the probabilities."""


def linear_cross_entropy(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `F.cross_entropy(F.linear(x, weight, bias).float(), labels, reduction="none")`, and whether the label has the largest logit.

    The gradient of the weight is summed over chunks in fp32 whatever the type of the weight is. There is no second derivative.

    Returns:
        The loss (R,) fp32; hits (R,) bool.
    """
    loss_R, hits_R = _LinearCrossEntropy.apply(x_RD, weight_VD, bias_V, labels_R, LOGITS_AT_ONCE)  # type: ignore[no-untyped-call]
    return loss_R, hits_R


class _LinearCrossEntropy(torch.autograd.Function):
    """Under ZeRO 3 the weight is saved as the parameter it is, and gathered again by its module's hook before this backward begins."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_R: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
        rows = max(1, at_once // len(weight_VD))
        padded = _padded(weight_VD, bias_V)
        loss_R = torch.empty(len(x_RD), dtype=torch.float32, device=x_RD.device)
        hits_R = torch.empty(len(x_RD), dtype=torch.bool, device=x_RD.device)
        lse_R, probability_RV = torch.empty_like(loss_R), None
        for i in range(0, len(x_RD), rows):
            part = slice(i, i + rows)
            logits_CV = _fp32_linear(x_RD[part], *padded)
            label_C = logits_CV.gather(1, labels_R[part, None]).squeeze(1)
            hits_R[part] = label_C >= logits_CV.amax(1)
            lse_R[part] = logits_CV.logsumexp(1)
            loss_R[part] = lse_R[part] - label_C
            if len(x_RD) <= rows and any(ctx.needs_input_grad):
                probability_RV = logits_CV.sub_(lse_R[:, None]).exp_()
        ctx.save_for_backward(x_RD, weight_VD, bias_V, labels_R, lse_R, probability_RV)
        ctx.rows = rows
        ctx.mark_non_differentiable(hits_R)
        return loss_R, hits_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_VD, bias_V, labels_R, lse_R, probability_RV = ctx.saved_tensors
        above_R, rows = above[0], ctx.rows
        grad_x_RD = torch.empty_like(x_RD)
        words, (weight_WD, bias_W) = len(weight_VD), _padded(weight_VD, bias_V)
        grad_weight_WD = torch.zeros(weight_WD.shape, dtype=torch.float32, device=x_RD.device) if len(x_RD) > rows else None
        grad_bias_W = torch.zeros(len(weight_WD), dtype=torch.float32, device=x_RD.device)
        for i in range(0, len(x_RD), rows):
            part = slice(i, i + rows)
            if probability_RV is None:
                slope_CV = _fp32_linear(x_RD[part], weight_WD, bias_W).sub_(lse_R[part, None]).exp_()
            else:
                slope_CV = probability_RV.clone()  # backward may be run again on a graph that is kept
            slope_CV.scatter_add_(1, labels_R[part, None], slope_CV.new_full((len(slope_CV), 1), -1.0))
            slope_CV.mul_(above_R[part, None])
            grad_bias_W += slope_CV.sum(0)
            slope_CV = slope_CV.to(x_RD.dtype)
            torch.mm(slope_CV, weight_WD, out=grad_x_RD[part])
            product_WD = _fp32_product(slope_CV.T, x_RD[part])
            grad_weight_WD = product_WD if grad_weight_WD is None else grad_weight_WD.add_(product_WD)
        if grad_weight_WD is None:
            grad_weight_WD = torch.zeros_like(weight_WD)
        return grad_x_RD, grad_weight_WD[:words].to(weight_VD.dtype), grad_bias_W[:words].to(bias_V.dtype), None, None


def _padded(weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """On CUDA in half precision the head with as many more words, which nothing predicts, as bring rows of logits to 16 bytes: with others
    the products run at half speed."""
    more = -len(weight_VD) % 8 if weight_VD.is_cuda and weight_VD.element_size() == 2 else 0
    return _widened(weight_VD, bias_V, more) if more else (weight_VD, bias_V)


def _widened(weight_VD: Tensor, bias_V: Tensor, more: int) -> tuple[Tensor, Tensor]:
    return F.pad(weight_VD, (0, 0, 0, more)), F.pad(bias_V, (0, more), value=float("-inf"))


def _fp32_linear(x_CD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """`F.linear` with a result in fp32; on CUDA never rounded to the type of the weight."""
    if x_CD.is_cuda and x_CD.dtype != torch.float32:
        return torch.mm(x_CD, weight_VD.T, out_dtype=torch.float32).add_(bias_V)
    return F.linear(x_CD, weight_VD, bias_V).float()


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of two matrices, of whatever type, in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
