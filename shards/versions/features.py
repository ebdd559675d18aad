"""What duplicates are found by, of every sample of a shard; kept in a file a shard, so that a killed command loses no work."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.clean import OWN_FIELDS
from shards.commit import commit_bytes
from shards.errors import SampleError
from shards.manifest import ShardInfo
from shards.perceptual import LOOK_VERSION, THUMBNAIL_BYTES, look_of
from shards.sample import IMAGE_EXTENSIONS, Sample
from shards.versions.near import Features, Words
from shards.versions.rows import ShardRows, is_text

_SCHEMA = pa.schema(
    [
        pa.field("exact_high", pa.uint64()),
        pa.field("exact_low", pa.uint64()),
        pa.field("structure", pa.uint64()),
        pa.field("thumbnail", pa.binary(THUMBNAIL_BYTES)),
        pa.field("thumbnail_digest", pa.uint64()),
        pa.field("label", pa.uint64(), nullable=False),
    ]
)
_NUMBERS = re.compile(r"(?:^|_)id$|^input_")
"""Fields that number a sample, or that tell where it was before."""
TEXT_VERSION = 3
"""Of what `by=pair` compares."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTask:
    """One shard to go through; the call that makes its file if it is not there."""

    base: Path
    info: ShardInfo
    folder: Path
    """Of the files."""
    looks: bool
    """Decode the pictures too."""

    @property
    def path(self) -> Path:
        """The file: named after the shard and after all that its content depends on."""
        identity = f"{self.info.sha256} {self.info.index_sha256} {LOOK_VERSION} {TEXT_VERSION} {self.looks}".encode() + (
            self.info.mask or b""
        )
        return self.folder / f"{self.info.shard.removesuffix('.tar')}-{hashlib.sha256(identity).hexdigest()[:16]}.arrow"


def write_features(task: FeatureTask) -> None:
    """Go through a shard and commit its file.

    Raises:
        ShardError, IntegrityError: the shard cannot be read as it was written.
    """
    with ShardRows(task.base, task.info) as rows:
        found = [_features(rows, row, task.looks) for row in range(len(rows))]
    columns = [pa.array([values[i] for values in found], field.type) for i, field in enumerate(_SCHEMA)]
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, _SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=_SCHEMA))
    commit_bytes(task.path, buffer.getvalue())


def read_features(tasks: Sequence[FeatureTask], *, labels: bool) -> Features:
    """Join the files of shards.

    Args:
        tasks: the shards, in order.
        labels: whether captions must be equal too.
    """
    table = pa.concat_tables([_SCHEMA.empty_table(), *(_read(task.path) for task in tasks)])
    columns = {name: _words(table[name]) for name in _SCHEMA.names if name != "thumbnail"}
    return Features(
        exact_n2=np.column_stack([columns["exact_high"], columns["exact_low"]]),
        has_picture_n=table["exact_low"].is_valid().to_numpy(),
        structure_n=columns["structure"],
        thumbnail_n=table["thumbnail"],
        thumbnail_digest_n=columns["thumbnail_digest"],
        has_look_n=table["structure"].is_valid().to_numpy(),
        label_n=columns["label"] if labels else np.zeros(table.num_rows, dtype=np.uint64),
    )


def _words(column: pa.ChunkedArray) -> Words:
    words: Words = pa.concat_arrays(column.chunks).fill_null(0).to_numpy()
    return words


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        return file.read_all()


def _features(rows: ShardRows, row: int, looks: bool) -> tuple[int | bytes | None, ...]:
    """Return the values of `_SCHEMA` for a sample; its picture is read only if it must be."""
    sample = rows.read(row, is_text)
    label = _digest_word(_text(sample))
    digest = _original_digest(sample)
    image = None
    if (looks or digest is None) and any(_is_image(part["ext"]) for part in rows.parts(row)):
        image = rows.read(row, _is_image).image()
    if digest is None and image is not None:
        digest = hashlib.sha256(image[1]).hexdigest()
    exact = (None, None) if digest is None else (int(digest[:16], 16), int(digest[16:32], 16))
    look = look_of(image[1]) if looks and image is not None else None
    if look is None:
        return *exact, None, None, None, label
    return *exact, look.structure, look.thumbnail, _digest_word(look.thumbnail), label


def _original_digest(sample: Sample) -> str | None:
    """Return the sha256 of the picture before it was resized, which writers note in KEY.json."""
    try:
        digest = sample.fields().get("sha256")
    except SampleError:
        return None
    return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def _text(sample: Sample) -> bytes:
    """What `by=pair` compares: the captions, or where there are none the json's other fields, such as a question and its answers."""
    try:
        captions = sample.captions()
        if captions:
            return "\n".join(captions).encode()
        fields = {name: value for name, value in sample.fields().items() if name not in OWN_FIELDS and not _NUMBERS.search(name)}
        return json.dumps(fields, sort_keys=True).encode()
    except SampleError as e:
        return f"{e.reason} {sample.key}".encode()


def _digest_word(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _is_image(ext: str) -> bool:
    return ext.rpartition(".")[2] in IMAGE_EXTENSIONS
