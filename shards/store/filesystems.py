"""Every other kind of URL, through fsspec: memory, ftp, sftp, hf, webhdfs, ... Its calls block, so they run in threads."""

from __future__ import annotations

import asyncio
import ftplib
from collections.abc import Callable
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from shards.errors import ConfigError
from shards.store.failure import PermanentError, TransientError, brief
from shards.store.place import shown

T = TypeVar("T")


class FilesystemBackend:
    """Requests to one fsspec file system.

    Args:
        url: the root; credentials are what the file system's own library finds.

    Raises:
        ConfigError: an unknown scheme, or one whose library is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._root = url_to_fs(url)
        except (ValueError, ImportError, OSError) as e:
            scheme = url.partition("://")[0]
            raise ConfigError(
                f"{shown(url)!r} cannot be opened: {brief(str(e))}. Known are folders, s3, gs, az, http and https; "
                f"for others fsspec needs the library of {scheme!r}."
            ) from e

    async def read(self, name: str, start: int, size: int) -> memoryview:
        """Ask for a range of bytes; fewer come back where the object ends before them."""
        return memoryview(await _ask(lambda: self._fs.cat_file(self._path(name), start=start, end=start + size)))

    async def read_whole(self, name: str) -> memoryview:
        """Ask for all bytes of an object."""
        return memoryview(await _ask(lambda: self._fs.cat_file(self._path(name))))

    async def size(self, name: str) -> int:
        """Ask for an object's size in bytes."""
        return int(await _ask(lambda: self._fs.size(self._path(name))))

    async def names(self) -> list[str] | None:
        """List what lies directly below the root."""
        found: list[dict[str, Any]] = await _ask(lambda: self._fs.ls(self._root, detail=True))
        return [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "file"]

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


async def _ask(call: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(call)
    except FileNotFoundError:
        raise
    except PermissionError as e:
        raise PermanentError(brief(str(e)), "Check the permissions of the credentials in use.") from e
    except (OSError, EOFError, RuntimeError, ftplib.Error) as e:
        raise TransientError(brief(str(e) or type(e).__name__)) from e
