"""Why a request failed, sorted by what helps: asking again, or nothing."""

from __future__ import annotations

import re

from shards.store.place import redacted

_STATUS = re.compile(r"status code: (\d{3})( [A-Za-z][A-Za-z' -]*)?")
_CAUSES = (
    ("Connection refused", r"Connection ?[Rr]efused"),
    ("connection reset", r"Connection ?[Rr]eset"),
    ("the host name is not known", r"dns error|failed to lookup"),
    ("the body ended early", r"UnexpectedEof|IncompleteMessage|end of file before message length"),
    ("timed out", r"TimedOut|timed out"),
    ("the certificate is not trusted", r"[Cc]ertificate"),
)
_RETRYABLE_STATUS = frozenset({"408", "425", "429"})
RANGE_PAST_THE_END = "416"


class TransientError(Exception):
    """A failure that another request may not meet: 5xx, 429, a timeout, a reset connection, a body that ended early."""


class PermanentError(Exception):
    """A failure that every request will meet.

    Args:
        cause: what the server or the system said, in a few words.
        fix: one sentence.
    """

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.fix = fix


def status_of(text: str) -> str | None:
    """Return the HTTP status that an error text tells of."""
    found = _STATUS.search(text)
    return found[1] if found else None


def is_retryable(text: str) -> bool:
    """Whether an error text without a class of its own is worth another request: all but 4xx answers and a wrong URL."""
    status = status_of(text)
    if status is not None:
        return status in _RETRYABLE_STATUS or not status.startswith("4")
    return "builder error" not in text


def brief(text: str) -> str:
    """Say in a few words what went wrong: libraries answer with a page that repeats the URL, its signature included."""
    found = _STATUS.search(text)
    if found:
        return f"HTTP {found[1]}{(found[2] or '').rstrip()}"
    for words, pattern in _CAUSES:
        if re.search(pattern, text):
            return words
    first = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return redacted(first)[:200]
