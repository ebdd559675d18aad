"""A checkpoint's model for everybody else: a folder in the transformers layout, written tensor by tensor."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmscale.checkpoint import manifest
from mmscale.checkpoint.direct_file import write_all
from mmscale.checkpoint.fingerprint import fingerprint
from mmscale.checkpoint.index import NAME as INDEX
from mmscale.checkpoint.index import STATE, build_index, file_of
from mmscale.checkpoint.model_folder import MODEL, Weight, model_tensors, plain_weights, read_weight
from mmscale.checkpoint.pieces import FROZEN, MASTER
from mmscale.checkpoint.reader import StateReader
from mmscale.checkpoint.state import NAME as RUN
from mmscale.checkpoint.tensor_file import CHUNK, DTYPES, NAMES, TensorPart, encode_header, key_of
from mmscale.errors import CheckpointError
from mmscale.run_folder import fsync, replace_file

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Tensor:
    kind: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def export_model(
    checkpoint: Path, out: Path, *, shard_bytes: int = 5 << 30, dtype: Literal["fp32", "bf16"] = "fp32", average: bool = True
) -> list[Path]:
    """Write a checkpoint's model as config.json, safetensors files and tokenizer/, for `MMScaleModel.from_pretrained`.

    Works from any number of ranks and any ZeRO stage, in memory for `CHUNK` elements.

    Args:
        shard_bytes: largest file of weights; a single larger tensor has a file of its own.
        dtype: type of the floating-point weights.
        average: take the moving average where the checkpoint has one.

    Raises:
        CheckpointError: `out` exists, or the checkpoint cannot be read.
    """
    reader = StateReader(checkpoint)
    with _made_whole(out) as made:
        shutil.copytree(checkpoint / MODEL, made, dirs_exist_ok=True)
        weights = {w.name: w for w in plain_weights(reader, average=average)}
        shards = _divide(_exported(reader, weights.values(), _TYPES[dtype]), shard_bytes)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = names if len(shards) > 1 else ["model.safetensors"]
        for name, tensors in zip(names, shards, strict=True):
            chunks = ((t, c.to(t.dtype)) for t in tensors for c in _exported_chunks(reader, weights[t.name]))
            _write(made / name, [(t.name, t.dtype, t.shape) for t in tensors], chunks)
        if len(shards) > 1:
            weight_map = {t.name: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
            total = sum(t.size for tensors in shards for t in tensors)
            content = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
            (made / "model.safetensors.index.json").write_text(content + "\n", encoding="utf-8")
    return [out / name for name in names]


def average_checkpoints(checkpoints: Sequence[Path], out: Path) -> None:
    """Write the mean of several checkpoints' trained weights as a checkpoint to evaluate, to export or to start from.

    Source: checkpoint averaging (Vaswani et al. 2017, section 6.1). Frozen weights, buffers and tokenizer are those of the last one.

    Raises:
        CheckpointError: they are not of one model, or `out` exists.
    """
    readers = [StateReader(c) for c in checkpoints]
    last = readers[-1]
    tensors = model_tensors(last, average=False)
    for reader, path in zip(readers, checkpoints, strict=True):
        if changed := _differing(reader, last, tensors):
            raise CheckpointError(f"{str(path)!r} is not of the same model as {str(checkpoints[-1])!r}: {changed} differs.")
    with _made_whole(out) as made:
        (made / STATE).mkdir(parents=True)
        shutil.copytree(checkpoints[-1] / MODEL, made / MODEL)
        shutil.copy(checkpoints[-1] / RUN, made / RUN)
        entries = [_Tensor(k, n, DTYPES[last.entry(k, n).dtype], last.entry(k, n).shape) for k, n in tensors]
        chunks = ((t, c) for t in entries for c in _chunks(readers if t.kind == MASTER else [last], t.kind, t.name))
        header = [(key_of(t.kind, t.name), t.dtype, (torch.Size(t.shape).numel(),)) for t in entries]
        sums = _write(made / file_of(0), header, chunks)
        parts = [
            TensorPart(t.kind, t.name, NAMES[t.dtype], t.shape, 0, torch.Size(t.shape).numel(), sums.get((t.kind, t.name), 0))
            for t in entries
        ]
        replace_file(made / STATE / INDEX, build_index([parts], [{}]).to_json())
        files = [manifest.describe_file(made, p) for p in sorted(made.rglob("*")) if p.is_file()]
        replace_file(made / manifest.NAME, manifest.to_json(files, json.loads((made / RUN).read_text(encoding="utf-8"))["step"]))


@contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` at the end; after a failure nothing is left."""
    if out.exists():
        raise CheckpointError(f"{str(out)!r} exists already. Name a new folder.")
    made = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    made.mkdir(parents=True)
    try:
        yield made
        fsync(made)
        made.rename(out)
        fsync(out.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _exported(reader: StateReader, weights: Iterable[Weight], dtype: torch.dtype) -> list[_Tensor]:
    found = []
    for weight in weights:
        entry = reader.entry(weight.kind, weight.stored)
        own = DTYPES[entry.dtype]
        found.append(_Tensor(weight.kind, weight.name, dtype if own.is_floating_point else own, entry.shape))
    return found


def _exported_chunks(reader: StateReader, weight: Weight) -> Iterator[Tensor]:
    """Yield a weight part by part; one with an adapter at once."""
    if weight.adapter is None:
        yield from _chunks([reader], weight.kind, weight.stored)
    else:
        yield read_weight(reader, weight).flatten()


def _divide(tensors: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    """Fill one file after the other."""
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _chunks(readers: Sequence[StateReader], kind: str, name: str) -> Iterator[Tensor]:
    """Yield the mean over checkpoints of a tensor, part by part."""
    size = readers[0].entry(kind, name).numel
    for low in range(0, size, CHUNK):
        parts = [r.read(kind, name, low, min(CHUNK, size - low)) for r in readers]
        yield parts[0] if len(parts) == 1 else torch.stack(parts).double().mean(0).to(parts[0].dtype)


def _write(
    path: Path, header: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], chunks: Iterator[tuple[_Tensor, Tensor]]
) -> dict[tuple[str, str], int]:
    """Write a file of tensors and make it durable; returns their fingerprints."""
    sums: dict[tuple[str, str], int] = {}
    at: dict[tuple[str, str], int] = {}
    with path.open("xb", buffering=0) as file:
        write_all(file.fileno(), memoryview(encode_header(header)))
        for tensor, chunk in chunks:
            key = tensor.kind, tensor.name
            sums[key] = (sums.get(key, 0) + fingerprint(chunk, at.get(key, 0))) & (1 << 64) - 1
            at[key] = at.get(key, 0) + chunk.numel()
            content = memoryview(chunk.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers
            write_all(file.fileno(), content)
    fsync(path)
    return sums


def _differing(reader: StateReader, last: StateReader, tensors: list[tuple[str, str]]) -> str | None:
    """Name the first tensor that another checkpoint lacks, or has in another shape; frozen ones must be equal."""
    own = model_tensors(reader, average=False)
    for kind, name in sorted(set(own) ^ set(tensors)):
        return f"{kind} {name}"
    for kind, name in tensors:
        before, after = reader.entry(kind, name), last.entry(kind, name)
        if before.shape != after.shape or (kind == FROZEN and before != after):
            return f"{kind} {name}"
    return None
