"""Cross-entropy after a linear map to the vocabulary, in chunks of rows: no tensor of rows x vocabulary beyond a bound ever exists.

The forward keeps the log-sum-exp of each row; the backward computes a chunk's logits again, one product of matrices in four. Working
the gradient out in the forward instead (Hsu et al. 2024, Liger Kernel, section 3.2) would save that product, but needs one weight
gradient for each loss that reads the rows: their factors are not known before backward. Rows that fit into one chunk keep their
logits instead, and no product is computed twice.

Sources: Wijmans et al. 2025 (Cut Your Losses in Large-Vocabulary Language Models), section 4, for the recomputation from the log-sum-exp.

Shape letters: R rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.model.fused import fused

LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that exist at one time, by the type of the device: 32 MiB in fp32, and 256 MiB where a chunk has to fill a GPU, since its products
are quick only with thousands of rows and the weight's gradient is gone through once a chunk."""


def logits_at_once(device: str) -> int:
    """The bound on a chunk's logits on this type of device."""
    return LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cpu"])


def linear_cross_entropy(
    x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_R: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `F.cross_entropy(F.linear(x, weight, bias).float(), labels, reduction="none")`, and whether the label has the largest logit.

    The gradient of the weight is summed over chunks in fp32 whatever the type of the weight is. There is no second derivative.

    Args:
        x_RD: the rows.
        weight_VD: of the head.
        bias_V: of the head.
        labels_R: int64 words.
        backend: of torch.compile, for what is done to each logit; None: operation by operation.

    Returns:
        The loss (R,) fp32; hits (R,) bool.
    """
    at_once = logits_at_once(x_RD.device.type)
    loss_R, hits_R = _LinearCrossEntropy.apply(x_RD, weight_VD, bias_V, labels_R, at_once, backend)  # type: ignore[no-untyped-call]
    return loss_R, hits_R


class _LinearCrossEntropy(torch.autograd.Function):
    """Under ZeRO 3 the weight is saved as the parameter it is, and gathered again by its module's hook before this backward begins."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_R: Tensor, at_once: int, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, at_once // len(weight_VD))
        weight_WD, bias_W = _padded(weight_VD, bias_V)
        loss_R = torch.empty(len(x_RD), dtype=torch.float32, device=x_RD.device)
        hits_R = torch.empty(len(x_RD), dtype=torch.bool, device=x_RD.device)
        lse_R, logits_RW = torch.empty_like(loss_R), None
        for i in range(0, len(x_RD), rows):
            part = slice(i, i + rows)
            logits_CW, left_W = _logits(x_RD[part], weight_WD, bias_W, backend)
            lse_R[part], label_C, largest_C = fused(_statistics, backend, (logits_CW, labels_R[part]), left_W)
            hits_R[part] = label_C >= largest_C
            loss_R[part] = lse_R[part] - label_C
            if len(x_RD) <= rows and any(ctx.needs_input_grad):
                logits_RW = logits_CW
        ctx.save_for_backward(x_RD, weight_VD, bias_V, labels_R, lse_R, logits_RW)
        ctx.rows, ctx.backend = rows, backend
        ctx.mark_non_differentiable(hits_R)
        return loss_R, hits_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_VD, bias_V, labels_R, lse_R, logits_RW = ctx.saved_tensors
        above_R, rows = above[0], ctx.rows
        grad_x_RD = torch.empty_like(x_RD)
        words, (weight_WD, bias_W) = len(weight_VD), _padded(weight_VD, bias_V)
        grad_weight_WD = torch.zeros(weight_WD.shape, dtype=torch.float32, device=x_RD.device) if len(x_RD) > rows else None
        grad_bias_W = torch.zeros(len(weight_WD), dtype=torch.float32, device=x_RD.device)
        for i in range(0, len(x_RD), rows):
            part = slice(i, i + rows)
            if logits_RW is None:
                logits_CW, left_W = _logits(x_RD[part], weight_WD, bias_W, ctx.backend)
            else:
                logits_CW, left_W = logits_RW, None if ctx.backend is None else bias_W
            changing = (logits_CW, labels_R[part], lse_R[part], above_R[part])
            slope_CW, slope_W = fused(_slopes, ctx.backend, changing, left_W, x_RD.dtype)
            grad_bias_W += slope_W
            torch.mm(slope_CW, weight_WD, out=grad_x_RD[part])
            product_WD = _fp32_product(slope_CW.T, x_RD[part])
            grad_weight_WD = product_WD if grad_weight_WD is None else grad_weight_WD.add_(product_WD)
        if grad_weight_WD is None:
            grad_weight_WD = torch.zeros_like(weight_WD)
        return grad_x_RD, grad_weight_WD[:words].to(weight_VD.dtype), grad_bias_W[:words].to(bias_V.dtype), None, None, None


def _statistics(logits_CW: Tensor, labels_C: Tensor, bias_W: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the log-sum-exp, the label's logit, the largest."""
    if bias_W is not None:
        logits_CW = logits_CW + bias_W
    return logits_CW.logsumexp(1), logits_CW.gather(1, labels_C[:, None]).squeeze(1), logits_CW.amax(1)


def _slopes(
    logits_CW: Tensor, labels_C: Tensor, lse_C: Tensor, above_C: Tensor, bias_W: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradient at the logits, in the type of the products that take it, and its sum over the rows in fp32."""
    if bias_W is not None:
        logits_CW = logits_CW + bias_W
    slope_CW = (logits_CW - lse_C[:, None]).exp_()
    if torch.compiler.is_compiling():  # a comparison joins the other operations, a scatter would not
        slope_CW = slope_CW - (torch.arange(slope_CW.shape[1], device=slope_CW.device) == labels_C[:, None]).float()
    else:
        slope_CW.scatter_add_(1, labels_C[:, None], slope_CW.new_full((len(slope_CW), 1), -1.0))
    slope_CW = slope_CW.mul_(above_C[:, None])
    return slope_CW.to(dtype), slope_CW.sum(0)


def _logits(x_CD: Tensor, weight_WD: Tensor, bias_W: Tensor, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The logits of a chunk in fp32, and the bias where it has yet to be added: compiled, that goes with what is done to them next."""
    if backend is not None:
        return _fp32_product(x_CD, weight_WD.T), bias_W
    if x_CD.is_cuda and x_CD.dtype != torch.float32:
        return _fp32_product(x_CD, weight_WD.T).add_(bias_W), None
    return F.linear(x_CD, weight_WD, bias_W).float(), None


def _padded(weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """On CUDA in half precision the head with as many more words, which nothing predicts, as bring rows of logits to 16 bytes: with others
    the products run at half speed."""
    more = -len(weight_VD) % 8 if weight_VD.is_cuda and weight_VD.element_size() == 2 else 0
    return _widened(weight_VD, bias_V, more) if more else (weight_VD, bias_V)


def _widened(weight_VD: Tensor, bias_V: Tensor, more: int) -> tuple[Tensor, Tensor]:
    return F.pad(weight_VD, (0, 0, 0, more)), F.pad(bias_V, (0, more), value=float("-inf"))


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of two matrices, of whatever type, in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
