"""A rank's file of tensors, in the safetensors format: written and hashed in one pass, piece by piece, without a second copy in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmscale.checkpoint.direct_file import direct_file
from mmscale.checkpoint.fingerprint import fingerprint
from mmscale.checkpoint.manifest import FileEntry
from mmscale.checkpoint.pieces import Piece

CHUNK = 1 << 22
"""Elements that are written and hashed at a time."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorPart:
    """What a file holds of one tensor."""

    kind: str
    name: str
    dtype: str
    """In the words of safetensors, such as F32."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Offset in the flattened tensor."""
    numel: int
    fingerprint: int


def key_of(kind: str, name: str) -> str:
    """Name of a tensor inside a file."""
    return f"{kind}/{name}"


def total_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes that a file of these pieces takes, its header not counted."""
    return sum(p.values.numel() * p.values.element_size() for p in pieces)


def write_tensors(path: Path, relative: str, pieces: Sequence[Piece]) -> tuple[FileEntry, list[TensorPart]]:
    """Write pieces to a new file and make it durable.

    Args:
        path: the file.
        relative: its name in the manifest.
        pieces: on any device; at most `CHUNK` elements of them are copied at a time.

    Returns:
        The file's size and hash, and what it holds.

    Raises:
        OSError: no space, or the disk failed.
    """
    header = encode_header((key_of(p.kind, p.name), p.values.dtype, (p.values.numel(),)) for p in pieces)
    parts = []
    with direct_file(path) as file:
        file.write(memoryview(header))
        for piece in pieces:
            total = 0
            for low in range(0, piece.values.numel(), CHUNK):
                chunk = piece.values[low : low + CHUNK].cpu().contiguous()
                file.write(memoryview(chunk.view(torch.uint8).numpy()))  # type: ignore[arg-type]  # numpy's arrays are buffers
                total += fingerprint(chunk, piece.start + low)
            size = piece.values.numel()
            dtype = NAMES[piece.values.dtype]
            parts.append(TensorPart(piece.kind, piece.name, dtype, piece.shape, piece.start, size, total & (1 << 64) - 1))
        size, digest = file.close()
    return FileEntry(relative, size, digest), parts


def encode_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Render the header of a safetensors file whose tensors follow each other without gaps: their keys, types and shapes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
