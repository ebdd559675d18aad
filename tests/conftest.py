"""For all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Heed Ctrl-C, also where a shell started the tests in the background: it lets them ignore SIGINT, and what they start inherits that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
