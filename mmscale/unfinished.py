"""What an evaluation has predicted so far: a file beside the report that lets an interrupted one go on, bit for bit."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.tasks import Record

NAME = "unfinished.jsonl"
_ARRAY = "__array__"


class Unfinished:
    """Records by batch. The first line says what is evaluated; a file that says anything else is begun anew.

    Args:
        path: of the file.
        what: everything that the records depend on.
    """

    def __init__(self, path: Path, what: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[int, list[Record]] = {}
        self._head = {"of": hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()}
        if not self._read():
            self.done = {}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._head) + "\n", encoding="utf-8")

    def add(self, batch: int, records: Sequence[Record]) -> None:
        """Keep the records of a batch; they are on the disk when this returns."""
        line = json.dumps({**self._head, "batch": batch, "records": [_plain(record) for record in records]}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file: the report is written."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> bool:
        """Take what is there, up to a line that was torn by the end of its process; False: of something else, or nothing."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", "replace").split("\n")[:-1]  # a text may hold what splitlines takes for an end of line
        if not lines or lines[0] != json.dumps(self._head):
            return False
        for line in lines[1:]:
            entry = json.loads(line)
            if entry.get("of") != self._head["of"]:  # of another evaluation into the same folder at the same time
                continue
            self.done[entry["batch"]] = [_record(record) for record in entry["records"]]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return True


def _plain(record: Record) -> dict[str, Any]:
    return {name: _coded(value) if isinstance(value, (np.ndarray, np.generic)) else value for name, value in record.items()}


def _coded(array: Any) -> dict[str, Any]:
    return {_ARRAY: base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}


def _record(plain: Mapping[str, Any]) -> Record:
    return {name: _decoded(value) if isinstance(value, dict) and _ARRAY in value else value for name, value in plain.items()}


def _decoded(coded: Mapping[str, Any]) -> Any:
    return np.frombuffer(base64.b64decode(coded[_ARRAY]), coded["dtype"]).reshape(coded["shape"])[()]
