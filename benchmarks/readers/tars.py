"""The samples of the shards, for the readers that keep them in a format of their own."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path


def samples(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (key, JPEG) in the order of the tars."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name.removesuffix(".jpg"), file.read()


def link(tars: Path, folder: Path) -> None:
    """Make a folder with hard links to the tars."""
    folder.mkdir(parents=True)
    for path in tars.glob("*.tar"):
        (folder / path.name).hardlink_to(path)
