"""Where a data set lies: a local folder or a URL, and how it is printed."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

BUCKETS = frozenset({"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"})
"""Schemes of object stores: what lists, takes and deletes objects."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CREDENTIALS = re.compile(r"(://)[^/@\s]*@|(\?)[^\s\"')]+")


def is_url(root: str | Path) -> bool:
    """Whether a place is a URL rather than a folder."""
    return isinstance(root, str) and _URL.match(root) is not None


def is_bucket(root: str) -> bool:
    """Whether a place is the URL of an object store, with the name of a bucket."""
    scheme, _, rest = root.partition("://")
    return scheme.lower() in BUCKETS and bool(rest.strip("/"))


def normal(root: str | Path) -> str:
    """Return a place as text: a URL without a slash at its end, a folder as it is; `file://` becomes the folder it means."""
    if not is_url(root):
        return str(root)
    url = str(root)
    if url.lower().startswith("file://"):
        return url[len("file://") :]
    scheme, _, rest = url.partition("://")
    path, mark, query = rest.partition("?")
    return f"{scheme}://{path.rstrip('/') or path}{mark}{query}"


def joined(root: str, location: str) -> str:
    """Return the folder or URL that lies at a relative place of another."""
    if not is_url(root):
        return str(Path(root) / location)
    scheme, _, rest = root.partition("://")
    host, _, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{posixpath.normpath(f'/{path}/{location}')}".replace("://", f"://{host}", 1)


def shown(url: str) -> str:
    """Return a URL as it is printed: without user name, password and signed query."""
    return redacted(url).partition("?")[0]


def redacted(text: str) -> str:
    """Take user names, passwords and signed queries out of every URL in a text, so that it can be printed."""
    return _CREDENTIALS.sub(lambda found: found[1] or "?...", text)
