"""The checksum that a sidecar carries of itself, for the time before a manifest vouches for the whole file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def is_sound(table: pa.Table) -> bool:
    """Compare a table with its checksum, which only a table that hangs together can be asked for."""
    metadata = dict(table.schema.metadata)
    recorded = metadata.pop(b"mmscale.crc32c", None)
    try:
        table.validate(full=True)
    except pa.ArrowException:
        return False
    return bool(recorded == content_checksum(table, metadata))


def content_checksum(table: pa.Table, metadata: Mapping[bytes, bytes]) -> bytes:
    """Sum up names, values and metadata, however Arrow lays them out."""
    checksum = google_crc32c.Checksum(repr(sorted(metadata.items())).encode())
    for name in table.column_names:
        checksum.update(name.encode())
        for values in _flat(table[name].combine_chunks() if table.num_rows else pa.array([], table.schema.field(name).type)):
            checksum.update(values)
    return bytes(checksum.digest()).hex().encode()


def _flat(array: pa.Array) -> Iterator[bytes]:
    """Yield the values of an array, nested ones too."""
    yield np.asarray(array.is_valid()).tobytes()
    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _flat(child)
    elif pa.types.is_list(array.type):
        yield pc.list_value_length(array).to_numpy(zero_copy_only=False).tobytes()
        yield from _flat(array.flatten())
    elif pa.types.is_string(array.type):
        yield pc.binary_length(array).to_numpy(zero_copy_only=False).tobytes()
        yield "".join(array.drop_null().to_pylist()).encode()
    else:
        yield pc.fill_null(array, 0).to_numpy(zero_copy_only=False).tobytes()
