"""A batch laid out in one block of bytes, so that a process hands it to another by saying where its tensors lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmscale.data.batch import Batch, Mixing, PatchStream, TextStream

ALIGNMENT = 64
"""Bytes that a tensor's place is a multiple of."""
_STREAMS = ("caption", "text")
_PLAIN = ("positions_M", "weights_M", "image_rows_N", "patch_mask_NP", "gumbel_MG")


@dataclass(frozen=True, slots=True)
class Packed:
    """Where the tensors of a batch lie in an arena; its pixels (N, H, H, 3) are the first bytes."""

    images: int
    image_size: int
    places: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    """(name, dtype, shape, offset in bytes)."""
    keys: list[str]
    fields: list[dict[str, Any]]
    streams: list[str]


def pack(batch: Batch, arena: Tensor, decoded_bytes: int) -> Packed:
    """Copy every tensor into an arena behind its first `decoded_bytes`, but for pixels and patches, which lie in these already."""
    places = []
    offset = decoded_bytes
    for name, tensor in _tensors(batch).items():
        at = tensor.data_ptr() - arena.data_ptr()
        if name.endswith(".values_TC") and tensor.numel() and 0 <= at < decoded_bytes:
            places.append((name, tensor.dtype, tuple(tensor.shape), at))
            continue
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        size = tensor.numel() * tensor.element_size()
        assert offset + size <= arena.numel(), f"{name} does not fit into its arena"
        arena[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        places.append((name, tensor.dtype, tuple(tensor.shape), offset))
        offset += size
    return Packed(len(batch.image_rows_N), batch.pixels_NCHW.shape[-1], places, batch.keys, batch.fields, list(batch.streams))


def unpack(packed: Packed, arena: Tensor) -> Batch:
    """Rebuild a batch whose tensors are views of an arena."""
    found: dict[str, Tensor] = {}
    for name, dtype, shape, offset in packed.places:
        size = math.prod(shape) * dtype.itemsize
        found[name] = arena[offset : offset + size].view(dtype).view(shape)
    n, side = packed.images, packed.image_size
    caption, text = (TextStream(**{f.name: found[f"{s}.{f.name}"] for f in fields(TextStream)}) for s in _STREAMS)
    streams = {s: PatchStream(**{f.name: found[f"streams.{s}.{f.name}"] for f in fields(PatchStream)}) for s in packed.streams}
    return Batch(
        positions_M=found["positions_M"],
        weights_M=found["weights_M"],
        image_rows_N=found["image_rows_N"],
        patch_mask_NP=found["patch_mask_NP"],
        gumbel_MG=found["gumbel_MG"],
        caption=caption,
        text=text,
        keys=packed.keys,
        fields=packed.fields,
        pixels_NCHW=arena[: n * side * side * 3].view(n, side, side, 3).permute(0, 3, 1, 2),
        targets={name.removeprefix("targets."): t for name, t in found.items() if name.startswith("targets.")},
        streams=streams,
        kept_NK=found.get("kept_NK"),
        mixing=Mixing(found["mixing.rows_M"], found["mixing.shares_M"]) if "mixing.rows_M" in found else None,
    )


def _tensors(batch: Batch) -> dict[str, Tensor]:
    streams = {f"{s}.{f.name}": getattr(getattr(batch, s), f.name) for s in _STREAMS for f in fields(TextStream)}
    targets = {f"targets.{name}": tensor for name, tensor in batch.targets.items()}
    patches = {f"streams.{s}.{f.name}": getattr(stream, f.name) for s, stream in batch.streams.items() for f in fields(PatchStream)}
    kept = {} if batch.kept_NK is None else {"kept_NK": batch.kept_NK}
    mixing = {} if batch.mixing is None else {f"mixing.{f.name}": getattr(batch.mixing, f.name) for f in fields(Mixing)}
    return {name: getattr(batch, name) for name in _PLAIN} | streams | targets | patches | kept | mixing
