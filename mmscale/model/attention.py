"""Attention over ragged sequences: one interface, two back ends, no padding outside this file.

A stack runs on a packed buffer of tokens. A plan says which rows of the buffer make up each sequence, and how many leading
tokens of the sequence every token of it may see: 0 is causal, all is bidirectional, the image's tokens is prefix-LM.

Shape letters: T tokens of the buffer, S sequences, L longest sequence, H heads, K width of a head, D = H * K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmscale.model import packed
from mmscale.model.packed import FusedPlan, Projected, Ragged

SHORTEST_BUCKET = 16
"""Sequences up to this length share a padded group; beyond it every doubling has its own."""


class Plan(Protocol):
    """What a stack needs to attend; built once a forward and used by all its layers."""

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(K)) v of every token within its sequence, shape (T, H, K)."""
        ...


@dataclass(frozen=True, slots=True)
class EmptyPlan:
    """No token at all. The empty result hangs on its inputs, so that every weight before it gets a gradient."""

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Return an empty (0, H, K) tensor."""
        return q_THK + k_THK + v_THK


@dataclass(frozen=True, slots=True)
class DensePlan:
    """Sequences of one length, whole and in order: the buffer is viewed as (S, L)."""

    length: int

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Bidirectional attention, without a mask or a copy."""
        q, k, v = (x.reshape(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
        return padded_attention(q, k, v, None).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Sequences of like length, padded to the longest of them."""

    sequences: int
    length: int
    mask_S1LL: Tensor | None
    """0 where a query may see a key, -inf elsewhere."""


@dataclass(frozen=True, slots=True)
class PaddedPlan:
    """Gather into padded groups, scaled-dot-product attention, gather back."""

    groups: list[PaddedGroup]
    rows: Tensor
    """(slots,) buffer row of each slot of all groups; padding reads row 0, which the masks hide."""
    slots_T: Tensor
    """Slot of each buffer row."""

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Attention of every group. Padding queries are computed and not read, so their gradient is zero."""
        q, k, v = (x.index_select(0, self.rows) for x in (q_THK, k_THK, v_THK))
        outs, start = [], 0
        for g in self.groups:
            stop = start + g.sequences * g.length
            qg, kg, vg = (x[start:stop].view(g.sequences, g.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            out = padded_attention(qg, kg, vg, g.mask_S1LL)
            outs.append(out.transpose(1, 2).flatten(0, 1))
            start = stop
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(0, self.slots_T)


def attend_parts(plan: Plan, projected: Sequence[Projected]) -> list[Tensor]:
    """Attention over a buffer of several parts that lie one after the other, for each part."""
    if isinstance(plan, FusedPlan):
        return plan.attend_parts(projected)
    joined = plan.attend(*(torch.cat(same) for same in zip(*projected, strict=True)))
    return list(torch.split(joined, [len(q_THK) for q_THK, _, _ in projected]))


def padded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of (S, H, L, K); on CPUs in fp32, which is faster there with both conversions than bf16 without."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """Two calls of a varlen kernel over sequences in any order: prefixes among themselves, then the rest against the whole sequence,
    causal. With keys [prefix; rest] and queries rest this is prefix-LM. `mmscale.model.packed` does it with fewer copies where it can.
    """

    prefix_rows: Tensor
    rest_rows: Tensor
    key_rows: Tensor
    """Buffer rows of the sequences that have a rest."""
    prefix: Ragged | None
    rest: Ragged | None
    keys: Ragged | None
    places_T: Tensor
    """Where each buffer row stands in [prefix rows; rest rows]."""

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Attention of every sequence without padding."""
        outs: list[Tensor] = []
        if self.prefix is not None:
            q, k, v = (x.index_select(0, self.prefix_rows) for x in (q_THK, k_THK, v_THK))
            outs.append(packed.varlen(q, k, v, self.prefix, self.prefix, causal=False))
        if self.rest is not None and self.keys is not None:
            q = q_THK.index_select(0, self.rest_rows)
            k, v = k_THK.index_select(0, self.key_rows), v_THK.index_select(0, self.key_rows)
            outs.append(packed.varlen(q, k, v, self.rest, self.keys, causal=True))
        return torch.cat(outs).index_select(0, self.places_T)


def dense_plan(sequences: int, length: int) -> Plan:
    """Plan for whole bidirectional sequences of one length that lie in the buffer one after the other."""
    return DensePlan(length) if sequences else EmptyPlan()


def ragged_plan(lengths_S: Tensor, prefix_S: Tensor, rows_T: Tensor | None, dtype: torch.dtype) -> Plan:
    """Plan for ragged sequences.

    Args:
        lengths_S: int64 tokens of each sequence, at least 1.
        prefix_S: int64 leading tokens that all tokens of the sequence see.
        rows_T: int64 buffer row of each token, sequence after sequence, each row once; None when they lie in that order.
        dtype: of the activations; half precision on CUDA takes the varlen kernels.
    """
    if lengths_S.numel() == 0:
        return EmptyPlan()
    rows_T = torch.arange(int(lengths_S.sum()), device=lengths_S.device) if rows_T is None else rows_T
    packs = packed.packs(lengths_S.device, dtype)
    return varlen_plan(lengths_S, prefix_S, rows_T) if packs else padded_plan(lengths_S, prefix_S, rows_T, dtype)


def padded_plan(lengths_S: Tensor, prefix_S: Tensor, rows_T: Tensor, dtype: torch.dtype) -> PaddedPlan:
    """Plan of the padded back end; arguments as `ragged_plan`."""
    starts_S = lengths_S.cumsum(0) - lengths_S
    buckets_S = (lengths_S.clamp(min=SHORTEST_BUCKET) - 1).double().log2().floor().long()
    groups: list[PaddedGroup] = []
    rows: list[Tensor] = []
    slots_T = torch.empty_like(rows_T)
    start = 0
    for bucket in sorted(set(buckets_S.tolist())):
        chosen = (buckets_S == bucket).nonzero().squeeze(1)
        lengths, prefix = lengths_S[chosen, None], prefix_S[chosen, None]
        size = int(lengths.max())
        offset_1L = torch.arange(size, device=rows_T.device)[None]
        valid_SL = offset_1L < lengths
        rows_SL = rows_T[torch.where(valid_SL, starts_S[chosen, None] + offset_1L, 0)]
        rows.append(torch.where(valid_SL, rows_SL, 0).flatten())
        slots_T[rows_SL[valid_SL]] = start + valid_SL.flatten().nonzero().squeeze(1)
        mask_type = dtype if rows_T.is_cuda else torch.float32
        groups.append(PaddedGroup(len(chosen), size, _mask(valid_SL, lengths, prefix, mask_type)))
        start += valid_SL.numel()
    return PaddedPlan(groups, rows[0] if len(rows) == 1 else torch.cat(rows), slots_T)


def _mask(valid_SL: Tensor, lengths_S1: Tensor, prefix_S1: Tensor, dtype: torch.dtype) -> Tensor | None:
    if bool(valid_SL.all()) and bool((prefix_S1 >= lengths_S1).all()):
        return None
    key = torch.arange(valid_SL.shape[1], device=valid_SL.device)
    allowed_SLL = (key[None, None] <= key[None, :, None]) | (key[None, None] < prefix_S1[:, :, None])
    allowed_SLL = allowed_SLL & valid_SL[:, None]
    return torch.zeros(allowed_SLL.shape, dtype=dtype, device=key.device).masked_fill(~allowed_SLL, float("-inf"))[:, None]


def varlen_plan(lengths_S: Tensor, prefix_S: Tensor, rows_T: Tensor) -> VarlenPlan:
    """Plan of the varlen back end; arguments as `ragged_plan`."""
    sequence_T = torch.arange(len(lengths_S), device=rows_T.device).repeat_interleave(lengths_S)
    offset_T = torch.arange(len(rows_T), device=rows_T.device) - (lengths_S.cumsum(0) - lengths_S)[sequence_T]
    prefix_S = torch.minimum(prefix_S, lengths_S)
    leading_T = offset_T < prefix_S[sequence_T]
    has_rest_S = prefix_S < lengths_S
    prefix_rows, rest_rows, key_rows = rows_T[leading_T], rows_T[~leading_T], rows_T[has_rest_S[sequence_T]]
    places_T = torch.empty_like(rows_T)
    places_T[torch.cat([prefix_rows, rest_rows])] = torch.arange(len(rows_T), device=rows_T.device)
    return VarlenPlan(
        prefix_rows,
        rest_rows,
        key_rows,
        Ragged.of(prefix_S[prefix_S > 0]) if len(prefix_rows) else None,
        Ragged.of((lengths_S - prefix_S)[has_rest_S]) if len(rest_rows) else None,
        Ragged.of(lengths_S[has_rest_S]) if len(rest_rows) else None,
        places_T,
    )
