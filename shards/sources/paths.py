"""Which files a `path` of a configuration means: a file, a folder, a glob, or braces."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from shards.errors import SourceError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(path: str, extensions: Sequence[str]) -> list[Path]:
    """List the files that `path` means, sorted by name (braces: in their order).

    Args:
        path: a file; a folder, for the files directly in it; a glob; or a name with `{000..099}`.
        extensions: what a folder's files must end in, each with its dot.

    Raises:
        SourceError: nothing is there.
    """
    given = Path(path)
    if given.is_dir():
        files = sorted(f for f in given.iterdir() if f.is_file() and f.name.lower().endswith(tuple(extensions)) and f.name[0] != ".")
        if not files:
            raise SourceError(f"The folder {path!r} holds no {' or '.join(extensions)} file. Give another `path`.")
        return files
    if given.is_file():
        return [given]
    if _RANGE.search(path):
        return _existing([Path(name) for name in _braces(path)], path)
    found = sorted(Path(name) for name in glob.glob(path))  # noqa: PTH207
    if not found:
        raise SourceError(f"There is nothing at {path!r}. Give the `path` of an existing file, folder or glob.")
    return _existing(found, path)


def _existing(files: list[Path], path: str) -> list[Path]:
    for file in files:
        if not file.is_file():
            raise SourceError(f"`path` {path!r} names {str(file)!r}, which is not a file. Correct the path.")
    return files


def _braces(path: str) -> list[str]:
    match = _RANGE.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    width = len(first) if first.startswith("0") else 0
    heads = [f"{path[: match.start()]}{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return [head + tail for head in heads for tail in _braces(path[match.end() :])]
