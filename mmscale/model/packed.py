"""Attention by varlen kernels over sequences that are laid out for them: no copy that can be spared, no wait for the device.

Causal sequences come first, those that see all of themselves follow. Every token is a row of the perception expert's buffer or of the
text expert's. A causal sequence is [v; c]: what it shows, which sees itself, then its text, which sees v and its own past (prefix-LM).
So the experts' rows enter three calls, and only where a call needs both kinds are rows put between rows:

    v of causal sequences    a slice of the perception rows, among themselves
    c of causal sequences    a slice of the text rows, against [v; c]
    all other sequences      both kinds, in the order of the sequences

Shape letters: T rows, A rows of perception, B rows of text, S sequences, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.model.fused import fused

HEAD_MULTIPLE = 8
"""What the width of a head must be a multiple of in the varlen kernels."""
Projected = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each (T, H, K)."""


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this kind take the varlen kernels: half precision on CUDA."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Offsets of packed sequences, as the varlen kernels take them."""

    offsets: Tensor
    """int32, one more than sequences."""
    longest: int
    """At least the length of the longest."""

    @classmethod
    def of(cls, lengths_S: Tensor, longest: int | None = None) -> Ragged:
        """Offsets of these lengths. Without `longest` it syncs with the device for it."""
        offsets = F.pad(lengths_S.cumsum(0), (1, 0)).int()
        return cls(offsets, longest if longest is not None else int(lengths_S.max()))


def varlen(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, causal: bool) -> Tensor:
    """Call the kernel. With queries shorter than keys its causal mask is aligned at the bottom right: query i of n sees the keys up to
    the i-th of the last n. It takes heads of a multiple of 8; narrower ones are filled with zeros, which add nothing to a product."""
    from torch.nn.attention.varlen import varlen_attn  # a torch of 2.10 or later, which only this back end needs

    width, window = q.shape[-1], (-1, 0 if causal else -1)
    if spare := -width % HEAD_MULTIPLE:
        q, k, v = (F.pad(t, (0, spare)) for t in (q, k, v))
    places = queries.offsets, keys.offsets, queries.longest, keys.longest
    out = varlen_attn(q, k, v, *places, scale=width**-0.5, window_size=window)
    assert isinstance(out, Tensor)
    return out[..., :width] if spare else out


@dataclass(frozen=True, slots=True)
class Order:
    """How rows of two buffers stand in one: a permutation, so that nothing is ever added up in backward."""

    rows_T: Tensor
    """Row of [a; b] that comes next."""
    from_A: Tensor
    """Where each row of a stands."""
    from_B: Tensor
    backend: str | None = None
    """Of torch.compile, for one pass over the rows where operations take two."""


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return _joined(a, b, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        return above[0].index_select(0, ctx.order.from_A), above[0].index_select(0, ctx.order.from_B), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        ctx.order = order
        return joined.index_select(0, order.from_A), joined.index_select(0, order.from_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        return _joined(above[0], above[1], ctx.order), None


def _joined(a: Tensor, b: Tensor, order: Order) -> Tensor:
    joined: Tensor = fused(_interleaved, order.backend, (a, b, order.rows_T))
    return joined


def _interleaved(a: Tensor, b: Tensor, rows_T: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return torch.cat([a, b]).index_select(0, rows_T)
    first = (rows_T < len(a)).view(-1, *[1] * (a.ndim - 1))
    return torch.where(first, a[rows_T.clamp(max=len(a) - 1)], b[(rows_T - len(a)).clamp(min=0)])


def join(a: Tensor, b: Tensor, order: Order) -> Tensor:
    """Put rows of two buffers into one."""
    joined: Tensor = _Join.apply(a, b, order)  # type: ignore[no-untyped-call]
    return joined


def part(joined: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Undo `join`."""
    a, b = _Part.apply(joined, order)  # type: ignore[no-untyped-call]
    return a, b


def _cut(projected: Projected, rows: int) -> tuple[Projected, Projected]:
    """The first rows, and those after them. Split, not sliced twice: backward then joins two gradients and adds up none."""
    q, k, v = (torch.split(x, [rows, len(x) - rows]) for x in projected)
    return (q[0], k[0], v[0]), (q[1], k[1], v[1])


@dataclass(frozen=True, slots=True)
class TextPlan:
    """Sequences of one buffer, one after the other: causal ones first, then such as see all of themselves."""

    causal: Ragged | None
    causal_rows: int
    whole: Ragged | None

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """As `attention.Plan.attend`."""
        if self.causal is None or self.whole is None:
            one = self.whole if self.causal is None else self.causal
            return q_THK if one is None else varlen(q_THK, k_THK, v_THK, one, one, self.causal is not None)
        first, rest = _cut((q_THK, k_THK, v_THK), self.causal_rows)
        return torch.cat([varlen(*first, self.causal, self.causal, True), varlen(*rest, self.whole, self.whole, False)])


def text_plan(lengths_S: Tensor, causal: int, causal_rows: int, rows: int, longest: int | None) -> TextPlan:
    """Plan of a buffer of texts alone.

    Args:
        lengths_S: int64 tokens of each sequence, at least 1.
        causal: how many of them, from the first on, are causal.
        causal_rows: their rows.
        rows: all rows.
        longest: at least the length of the longest; None: not known, the device is waited for.
    """
    return TextPlan(
        Ragged.of(lengths_S[:causal], longest) if causal_rows else None,
        causal_rows,
        Ragged.of(lengths_S[causal:], longest) if rows > causal_rows else None,
    )


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """Sequences over the rows of perception and of text; see the head of this file."""

    dense: int | None
    """Tokens of every unit of perception where all are alike."""
    perception_rows: int
    """A, of all sequences."""
    causal_rows: tuple[int, int]
    """Rows of causal sequences: of perception, of text."""
    shown: Ragged | None
    """v of causal sequences; None where it is dense, or there is none."""
    texts: Ragged | None
    keys: Ragged | None
    causal_order: Order
    whole: Ragged | None
    """All other sequences."""
    whole_order: Order

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """As `attention.Plan.attend`, over [perception rows; text rows]."""
        parts = list(zip(*(x.tensor_split([self.perception_rows]) for x in (q_THK, k_THK, v_THK)), strict=True))
        return torch.cat(self.attend_parts([(q, k, v) for q, k, v in parts]))

    def attend_parts(self, projected: Sequence[Projected]) -> list[Tensor]:
        """Attention of the perception rows and of the text rows."""
        (shown, others_a), (spoken, others_b) = (_cut(x, rows) for x, rows in zip(projected, self.causal_rows, strict=True))
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        if len(shown[0]):
            found[0].append(self._shown(*shown))
        if self.texts is not None and self.keys is not None:
            k, v = (join(x, y, self.causal_order) for x, y in zip(shown[1:], spoken[1:], strict=True))
            found[1].append(varlen(spoken[0], k, v, self.texts, self.keys, True))
        if self.whole is not None:
            q, k, v = (join(x, y, self.whole_order) for x, y in zip(others_a, others_b, strict=True))
            for outs, out in zip(found, part(varlen(q, k, v, self.whole, self.whole, False), self.whole_order), strict=True):
                outs.append(out)
        return [self._together(outs, x) for outs, x in zip(found, projected, strict=True)]

    def _shown(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.dense is None:
            assert self.shown is not None
            return varlen(q, k, v, self.shown, self.shown, False)
        q, k, v = (x.reshape(-1, self.dense, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    @staticmethod
    def _together(outs: list[Tensor], projected: Projected) -> Tensor:
        if not outs:  # the empty result hangs on its inputs, so that every weight before it gets a gradient
            q, k, v = (x[:0] for x in projected)
            return q + k + v
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def fused_plan(
    leading_S: Tensor,
    text_S: Tensor,
    places: tuple[Tensor, Tensor],
    *,
    causal: int,
    causal_rows: tuple[int, int],
    dense: int | None,
    longest: int,
    backend: str | None = None,
) -> FusedPlan:
    """Plan of the upper stack.

    Args:
        leading_S: int64 perception tokens of each sequence; causal sequences come first.
        text_S: int64 text tokens of each.
        places: where each perception row, and each text row, stands when sequence follows sequence.
        causal: how many sequences are causal.
        causal_rows: their rows of perception and of text.
        dense: tokens of every unit of perception where all are alike.
        longest: at least the length of the longest sequence.
        backend: as `Order.backend`.
    """
    (from_A, from_B), (shown, spoken) = places, causal_rows
    total_S, cut = leading_S + text_S, shown + spoken
    rows_T = torch.empty_like(torch.cat(places))
    rows_T[torch.cat(places)] = torch.arange(len(rows_T), device=rows_T.device)
    first, rest = rows_T[:cut], rows_T[cut:]
    others, count = len(rows_T) - cut, len(from_A)
    return FusedPlan(
        dense,
        count,
        causal_rows,
        Ragged.of(leading_S[:causal], longest) if shown and dense is None else None,
        Ragged.of(text_S[:causal], longest) if spoken else None,
        Ragged.of(total_S[:causal], longest) if spoken else None,
        Order(torch.where(first < count, first, first - count + shown), from_A[:shown], from_B[:spoken], backend),
        Ragged.of(total_S[causal:], longest) if others else None,
        Order(torch.where(rest < count, rest - shown, rest - shown - spoken), from_A[shown:] - cut, from_B[spoken:] - cut, backend),
    )
