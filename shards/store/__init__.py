"""Bytes of a data set, from a folder, an object store, a web server or any other file system."""

from __future__ import annotations

from pathlib import Path

from shards.store.base import Store
from shards.store.config import StoreConfig
from shards.store.local import LocalStore
from shards.store.origin import Backend
from shards.store.place import is_url, normal
from shards.store.remote import RemoteStore


def open_store(root: str | Path, config: StoreConfig | None = None) -> Store:
    """Open the place where a data set lies.

    Args:
        root: a folder, or a URL.
        config: requests and cache, for a URL.

    Raises:
        ConfigError: a URL that nothing here can open, or options out of range.
    """
    config = config or StoreConfig()
    config.check()
    place = normal(root)
    return RemoteStore(place, _backend(place, config), config) if is_url(place) else LocalStore(Path(place))


def _backend(url: str, config: StoreConfig) -> Backend:
    # imported when they are needed: a local data set does without both libraries
    from shards.store.objects import SCHEMES, ObjectBackend

    if url.partition("://")[0].lower() in SCHEMES:
        return ObjectBackend(url, config.request_timeout_s)
    from shards.store.filesystems import FilesystemBackend

    return FilesystemBackend(url)
