"""Where the programs are that the engines start."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from mmscale.errors import RunError


def find_program(name: str) -> str:
    """Find a program beside the running Python, or else on PATH.

    Raises:
        RunError: it is at neither.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise RunError(
            f"There is no program `{name}` beside {sys.executable} nor on PATH. Install mmscale with its requirements: pip install -e ."
        )
    return found


def need_pdsh() -> str:
    """Find pdsh.

    Raises:
        RunError: it is not installed.
    """
    found = shutil.which("pdsh")
    if found is None:
        raise RunError(
            "Ranks on other hosts are started over pdsh, and there is no `pdsh` on this machine's PATH. Install the package pdsh."
        )
    return found
