"""A folder that holds a version of other data sets: begun by one command, finished by its manifest.

`origin.json` says which command made it of what; the same command goes on or does nothing new there, another one is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.commit import commit_bytes
from shards.errors import ConfigError, ShardError
from shards.index import shard_info
from shards.manifest import ORIGIN_NAME, Manifest, ShardInfo
from shards.mask import Mask
from shards.versions.sole import sole_writer
from shards.vocabulary import TOKENIZER_FOLDER


@contextmanager
def new_version(out: Path, command: str, of: Sequence[Manifest], settings: dict[str, Any]) -> Iterator[None]:
    """Hold a folder for a version of some data sets while it is made.

    Args:
        out: the folder; created.
        command: such as "filter".
        of: what it is made of.
        settings: what the version depends on besides.

    Raises:
        ConfigError: the folder is one of the data sets themselves, or holds anything else than this very version.
    """
    for manifest in of:
        if out.resolve() == manifest.folder.resolve():
            raise ConfigError(f"`out`: {str(out)!r} is the data set itself. Give another folder; the tars are not copied.")
    origin = {
        "command": command,
        "of": [{"folder": relative(manifest.folder, out), "version": manifest.digest} for manifest in of],
        "settings": settings,
    }
    with sole_writer(out):
        _enter(out, origin)
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        yield


def relative(folder: Path, start: Path) -> str:
    """Return the path from one folder to another, with forward slashes: it stays true when both are moved together."""
    return Path(os.path.relpath(folder.resolve(), start.resolve())).as_posix()


def derived_info(base: Path, info: ShardInfo, out: Path, mask: Mask | None) -> ShardInfo:
    """Summarise a shard of a data set as one of a version in another folder, with another row mask.

    Raises:
        ShardError: its tar or sidecar is not the one in the manifest.
    """
    tar = info.tar(base)
    derived = shard_info(tar, location=relative(tar.parent, out), mask=mask)
    if (derived.sha256, derived.index_sha256) != (info.sha256, info.index_sha256):
        raise ShardError(f"The shard {str(tar)!r} is not the one in the manifest of {str(base)!r}. Run `mmscale shards verify {base}`.")
    return derived


def copy_tokenizer(base: Path, out: Path) -> None:
    """Copy the tokenizer of a data set, where it has one: a version is trained on with the same words."""
    folder = base / TOKENIZER_FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        (out / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        commit_bytes(out / TOKENIZER_FOLDER / path.name, path.read_bytes())


def _enter(out: Path, origin: dict[str, Any]) -> None:
    path = out / ORIGIN_NAME
    text = (json.dumps(origin, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    if path.exists():
        if path.read_bytes() != text:
            raise ConfigError(
                f"`out`: the folder {str(out)!r} holds another version than this one, or one of older data: {str(path)!r} says "
                "which. Give another `out`, or delete the folder."
            )
    elif others:
        raise ConfigError(
            f"`out`: the folder {str(out)!r} is not empty and holds no version of a data set but {others[0]!r}. Give another `out`."
        )
    else:
        commit_bytes(path, text)
