"""state/index.json: which tensors a checkpoint holds, their fingerprints, and which file has which range of them; and reading by it.

It says nothing of ZeRO: a tensor is a name, a shape and ranges in files, so that any number of ranks and any stage can read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmscale.errors import CheckpointError

STATE = "state"
"""Folder of the tensors inside a checkpoint."""
NAME = "index.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    """In the words of safetensors, such as F32."""
    fingerprint: str
    """`checkpoint.fingerprint` of the whole, hexadecimal."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(slots=True)
class StateIndex:
    """The tensors of a checkpoint and where they lie."""

    tensors: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    """kind -> name -> tensor."""
    ranges: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    """name -> (rank whose file it is, start, elements), in order of start; the same for every kind of that name."""
    scalars: dict[str, float] = field(default_factory=dict)
    """What the optimizer counts, such as its steps."""

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield (kind, name) of each tensor."""
        for kind, entries in self.tensors.items():
            yield from ((kind, name) for name in entries)

    def to_json(self) -> str:
        """Render the index; equal states give equal bytes."""
        tensors = {k: {n: [list(e.shape), e.dtype, e.fingerprint] for n, e in sorted(v.items())} for k, v in sorted(self.tensors.items())}
        content = {"version": VERSION, "scalars": self.scalars, "tensors": tensors, "ranges": dict(sorted(self.ranges.items()))}
        return json.dumps(content, separators=(",", ":")) + "\n"


def file_of(rank: int) -> str:
    """Name of a rank's file of tensors, relative to the checkpoint."""
    return f"{STATE}/rank-{rank:05d}.safetensors"


def build_index(parts: Sequence[Sequence[Any]], scalars: Sequence[dict[str, float]]) -> StateIndex:
    """Put together what the ranks have written.

    Args:
        parts: of each rank, the `TensorPart`s of its file.
        scalars: of each rank, what its optimizer counts.

    Raises:
        CheckpointError: a tensor is not there whole, or ranks disagree.
    """
    shapes: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    sums: dict[tuple[str, str], int] = {}
    ranges: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for rank, own in enumerate(parts):
        for part in own:
            key = (part.kind, part.name)
            if shapes.setdefault(key, (part.shape, part.dtype)) != (part.shape, part.dtype):
                raise CheckpointError(f"The ranks disagree on the shape of {part.kind} {part.name}.")
            sums[key] = (sums.get(key, 0) + part.fingerprint) & (1 << 64) - 1
            ranges.setdefault(key, []).append((rank, part.start, part.numel))
    index = StateIndex(scalars=next((s for s in scalars if s), {}))
    if any(s and s != index.scalars for s in scalars):
        raise CheckpointError(f"The ranks disagree on what their optimizers count: {scalars}.")
    for (kind, name), (shape, dtype) in shapes.items():
        entry = TensorEntry(shape, dtype, f"{sums[kind, name]:016x}")
        own_ranges = sorted(ranges[kind, name], key=lambda r: r[1])
        _check_whole(kind, name, entry.numel, own_ranges)
        if index.ranges.setdefault(name, own_ranges) != own_ranges:
            raise CheckpointError(f"{kind} {name} is divided over the ranks otherwise than its weights.")
        index.tensors.setdefault(kind, {})[name] = entry
    return index


def read_index(checkpoint: Path) -> StateIndex:
    """Read the index of a committed checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, of another version, or does not cover its tensors.
    """
    path = checkpoint / STATE / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise CheckpointError(f"{str(path)!r} has version {content['version']}; this version of mmscale reads version {VERSION}.")
        tensors = {k: {n: TensorEntry(tuple(e[0]), e[1], e[2]) for n, e in v.items()} for k, v in content["tensors"].items()}
        index = StateIndex(tensors, {n: [(a, b, c) for a, b, c in v] for n, v in content["ranges"].items()}, content["scalars"])
        for kind, name in index.names():
            _check_whole(kind, name, index.tensors[kind][name].numel, index.ranges[name])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise CheckpointError(f"{str(path)!r} cannot be read: {e}. Use another checkpoint of the run.") from e
    return index


def _check_whole(kind: str, name: str, numel: int, ranges: list[tuple[int, int, int]]) -> None:
    at = 0
    for _, start, size in ranges:
        if start != at:
            raise CheckpointError(f"{kind} {name} is not whole: elements {min(at, start)} to {max(at, start)} are in no file or in two.")
        at += size
    if at != numel:
        raise CheckpointError(f"{kind} {name} is not whole: {at} of {numel} elements are in the files.")
