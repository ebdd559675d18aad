"""What a committed checkpoint holds: MANIFEST.json, a line of size and hash a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmscale.errors import CheckpointError

NAME = "MANIFEST.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Path relative to the checkpoint's folder."""
    size: int
    """Bytes."""
    sha256: str
    """Hash of the whole content, hexadecimal."""


def describe_file(folder: Path, path: Path) -> FileEntry:
    """Measure and hash one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    return FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, digest)


def to_json(entries: list[FileEntry], step: int) -> str:
    """Render the manifest, files in order of name."""
    files = [asdict(e) for e in sorted(entries, key=lambda e: e.path)]
    return json.dumps({"version": VERSION, "step": step, "files": files}, indent=1) + "\n"


def read_manifest(folder: Path) -> list[FileEntry]:
    """Read the manifest of a committed checkpoint.

    Raises:
        CheckpointError: the folder is no checkpoint, or its manifest is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} is not a checkpoint: it has no {NAME}. Give a run folder, or a step-... folder below its checkpoints/."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [FileEntry(**entry) for entry in content["files"]]
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"The manifest {str(path)!r} is damaged: {e}. Use another checkpoint of the run.") from e


def find_fault(folder: Path, *, hashes: bool = True) -> str | None:
    """Compare a checkpoint with its manifest.

    Args:
        hashes: also read and hash every file, not only compare sizes.

    Returns:
        One sentence that names the first fault, or None.
    """
    try:
        entries = read_manifest(folder)
    except CheckpointError as e:
        return str(e)
    for entry in entries:
        path = folder / entry.path
        if not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.size:
            return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size}"
    for entry in entries if hashes else ():
        if describe_file(folder, folder / entry.path).sha256 != entry.sha256:
            return f"{entry.path} does not match its sha256"
    return None


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
