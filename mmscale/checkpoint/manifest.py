"""What a committed checkpoint holds: MANIFEST.json, a line of size and hash a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmscale.errors import CheckpointError

NAME = "MANIFEST.json"
VERSION = 2
"""2: tensors by name in safetensors files (1 held DeepSpeed's own files)."""
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")


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
        return parse(path.read_bytes(), str(folder))
    except OSError as e:
        raise CheckpointError(f"The manifest {str(path)!r} cannot be read: {e}. Use another checkpoint of the run.") from e


def parse(text: bytes, place: str) -> list[FileEntry]:
    """Take a manifest apart.

    Args:
        text: its content.
        place: the checkpoint that it is of, for errors.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    try:
        content = json.loads(text)
        version, entries = content["version"], [FileEntry(**entry) for entry in content["files"]]
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"The manifest of {place!r} is damaged: {e}. Use another checkpoint of the run.") from e
    if version != VERSION:
        raise CheckpointError(
            f"The checkpoint {place!r} is of version {version}; this mmscale reads version {VERSION}. "
            "Go on with the mmscale that wrote it, or start again in a new `run` folder."
        )
    return entries


def is_pickle(path: Path) -> bool:
    """Tell by its name and first bytes whether a file is something that Python would unpickle: a pickle, or torch's zip of one."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return path.suffix in _PICKLES  # safetensors: the length of a header, which may look like a pickle's first bytes, and the header
    return path.suffix in _PICKLES or start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")


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
        if (fault := _find_fault_outside(folder, entry)) is not None:
            return fault
    return find_changed(folder, entries) if hashes else None


def find_changed(folder: Path, entries: Sequence[FileEntry]) -> str | None:
    """Hash files and compare with their entries; one sentence that names the first one that differs, or None."""
    for entry in entries:
        try:
            if describe_file(folder, folder / entry.path).sha256 != entry.sha256:
                return f"{entry.path} does not match its sha256"
        except OSError as e:
            return f"{entry.path} cannot be read: {e}"
    return None


def find_misplaced(entry: FileEntry) -> str | None:
    """One sentence where a file's path leads out of the checkpoint."""
    outside = Path(entry.path).is_absolute() or ".." in Path(entry.path).parts
    return f"{entry.path} lies outside of the checkpoint" if outside else None


def _find_fault_outside(folder: Path, entry: FileEntry) -> str | None:
    """What can be said of a file without reading it all."""
    path = folder / entry.path
    if (fault := find_misplaced(entry)) is not None:
        return fault
    if not path.is_file():
        return f"{entry.path} is missing"
    if path.stat().st_size != entry.size:
        return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size}"
    if is_pickle(path):
        return f"{entry.path} is a pickle, which can run code when it is loaded; a checkpoint of mmscale has none"
    return None


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
