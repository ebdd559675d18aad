"""For all tests."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Heed Ctrl-C, and share the cores.

    A shell that starts the tests in the background lets them ignore SIGINT, and what they start inherits that. Where tests run side by
    side (pytest-xdist), threads of torch that wait for one another would take a core from the other test: one is three times as fast.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
