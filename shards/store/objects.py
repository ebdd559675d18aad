"""S3, Google Cloud Storage, Azure and plain HTTP servers, through obstore.

obstore runs its connections on threads of its own, which a forked child lacks: there every call would wait for ever, hence the check.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import obstore
import obstore.store
from obstore.exceptions import BaseError, NotFoundError, NotSupportedError, PermissionDeniedError, UnauthenticatedError

from shards.errors import ConfigError, ShardError
from shards.store.failure import RANGE_PAST_THE_END, PermanentError, TransientError, brief, is_retryable, status_of
from shards.store.place import BUCKETS, shown

T = TypeVar("T")

SCHEMES = BUCKETS | {"http", "https"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a public bucket: AWS_SKIP_SIGNATURE=true)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (a public bucket: GOOGLE_SKIP_SIGNATURE=true)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or a SAS (a public container: AZURE_SKIP_SIGNATURE=true)",
    "http": "a user name in the URL, or a signed URL",
}
_FAMILIES = {"s3": "s3", "s3a": "s3", "gs": "gs", "http": "http", "https": "http"}
_METADATA_SERVICE = ("latest/api/token", "latest/meta-data", "computeMetadata", "metadata/identity")

_first_user: list[int] = []
"""The process whose threads obstore's connections run on."""
_under_way: weakref.WeakSet[Any] = weakref.WeakSet()
"""Futures that obstore's threads still refer to."""
DRAIN_S = 5.0
"""How long the end of the interpreter waits for them."""


class ObjectBackend:
    """Requests to one bucket, container or server.

    Args:
        url: the root; credentials and endpoint come from the environment.
        timeout_s: of one request.
        retries: how often obstore makes a request again by itself.
        deadline_s: until when it does.

    Raises:
        ConfigError: a URL or an environment that obstore cannot use.
    """

    def __init__(self, url: str, timeout_s: float, *, retries: int = 0, deadline_s: float = 0.0) -> None:
        _refuse_fork(url)
        self._family = _FAMILIES.get(url.partition("://")[0].lower(), "az")
        self._url, headers = _login(url) if self._family == "http" else (url, {})
        try:
            self._store: Any = obstore.store.from_url(
                self._url,
                retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=max(timeout_s, deadline_s))},
                # plain http is what a user's own endpoint or URL says, never a default
                client_options={
                    "timeout": timedelta(seconds=timeout_s),
                    "connect_timeout": timedelta(seconds=10),
                    "allow_http": True,
                    "default_headers": headers,
                },
            )
        except (BaseError, ValueError) as e:
            raise ConfigError(f"{shown(url)!r} cannot be opened: {brief(str(e))}. Check the URL and the environment variables.") from e

    async def read(self, name: str, start: int, size: int) -> memoryview:
        """Ask for a range of bytes; fewer come back where the object ends before them."""
        return memoryview(
            await self._ask(lambda: _watched(obstore.get_range_async(self._store, name, start=start, length=size)), past_the_end=b"")
        )

    async def read_whole(self, name: str) -> memoryview:
        """Ask for all bytes of an object."""

        async def get() -> Any:
            answer = await _watched(obstore.get_async(self._store, name))
            data = await _watched(answer.bytes_async())
            if len(data) != answer.meta["size"]:
                raise TransientError(f"{len(data)} of {answer.meta['size']} bytes came")
            return data

        return memoryview(await self._ask(get))

    async def size(self, name: str) -> int:
        """Ask for an object's size in bytes."""
        meta = await self._ask(lambda: _watched(obstore.head_async(self._store, name)))
        return int(meta["size"])

    async def names(self) -> list[str] | None:
        """List what lies directly below the root; None where the server cannot."""
        if self._family == "http":
            return None  # listing needs WebDAV, which hardly any server speaks
        found = await self._ask(lambda: _watched(obstore.list_with_delimiter_async(self._store)))
        return [meta["path"] for meta in found["objects"]]

    async def write(self, name: str, source: Path | bytes, part_bytes: int, concurrency: int) -> None:
        """Put an object: there whole or not at all. Above `part_bytes` it travels in parts, so many at once."""

        async def put() -> None:
            try:
                await _watched(obstore.put_async(self._store, name, source, chunk_size=part_bytes, max_concurrency=concurrency))
            except NotFoundError as e:  # no bucket; or the end of an upload, told again because its answer was lost
                raise TransientError(brief(str(e))) from e

        await self._ask(put)

    async def below(self, prefix: str) -> dict[str, int]:
        """List the objects below a prefix, all of them for an empty one: name below the root to size in bytes."""
        found = await self._ask(lambda: _watched(obstore.list(self._store, prefix or None).collect_async()))
        return {meta["path"]: int(meta["size"]) for meta in found}

    async def remove(self, names: Sequence[str]) -> None:
        """Delete objects; one that is not there is no failure."""
        with contextlib.suppress(FileNotFoundError):  # some stores say so, of any one of them
            await self._ask(lambda: _watched(obstore.delete_async(self._store, list(names))))

    async def _ask(self, request: Callable[[], Awaitable[T]], past_the_end: T | None = None) -> T:
        _refuse_fork(self._url)
        try:
            return await request()
        except (PermissionDeniedError, UnauthenticatedError) as e:
            fix = f"Check the permissions of the credentials in use: {_CREDENTIALS[self._family]}."
            raise PermanentError(brief(str(e)), fix) from e
        except NotSupportedError as e:
            raise PermanentError("the server does not serve byte ranges", "Serve the folder by nginx, Apache or an object store.") from e
        except BaseError as e:
            text = str(e)
            if past_the_end is not None and status_of(text) == RANGE_PAST_THE_END:
                return past_the_end
            raise self._sorted(text) from e

    def _sorted(self, text: str) -> Exception:
        if any(path in text for path in _METADATA_SERVICE):
            return PermanentError("no credentials were found", f"Set {_CREDENTIALS[self._family]}.")
        if is_retryable(text):
            return TransientError(brief(text))
        return PermanentError(brief(text), "Check the URL, the region and the endpoint.")


def _watched(future: Any) -> Any:
    _under_way.add(future)
    return future


def _drain() -> None:
    """Wait until no thread of obstore's will call into Python: one that does while the interpreter is taken down aborts the process."""
    end = time.monotonic() + DRAIN_S
    while _under_way and _first_user == [os.getpid()] and time.monotonic() < end:
        obstore.parse_scheme("s3://bucket")  # any call: obstore lets go of what its threads have dropped when it is called
        time.sleep(0.001)


# before the event loop is there, hence run after it has called everything off
atexit.register(_drain)


def _login(url: str) -> tuple[str, dict[str, str]]:
    """Turn the user name and password of a URL into the header that a web server expects."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    encoded = base64.b64encode(unquote(login).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {encoded}"}


def _refuse_fork(url: str) -> None:
    if not _first_user:
        _first_user.append(os.getpid())
    elif _first_user[0] != os.getpid():
        raise ShardError(
            f"{shown(url)!r} cannot be read by process {os.getpid()}, which was forked after its parent had read from an object store: "
            "connections do not survive a fork. Start workers with multiprocessing_context='forkserver' or 'spawn'."
        )
