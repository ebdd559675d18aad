"""What ranks do with an object store, in processes of their own: copy a run's newest checkpoint there, and go on from what is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmscale.checkpoint.agree import agree_on_newest
from mmscale.checkpoint.copies import Copies
from mmscale.checkpoint.copying import Copying
from mmscale.checkpoint.fetch import fetch_newer
from mmscale.checkpoint.find import committed, step_of
from mmscale.errors import CheckpointError
from mmscale.recovery_config import CheckpointConfig
from mmscale.run_folder import RunFolder
from shards.store.config import StoreConfig
from tests.shards.bucket import ENVIRONMENT

STORE = StoreConfig(chunk_bytes=5 << 20, request_timeout_s=5, deadline_s=20, retries=4)


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.lines.append(record.getMessage())

    @staticmethod
    def listen() -> Said:
        """Begin."""
        said, logger = Said(), logging.getLogger("mmscale")
        logger.setLevel(logging.INFO)
        logger.handlers = [said]
        return said


def use(port: int) -> None:
    """Point S3 at a port of this machine."""
    os.environ |= ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def copy(run: str, url: str, port: int, keep: int = 2, step: int | None = None, released: Sequence[int] = ()) -> list[str]:
    """Copy a checkpoint, the newest by default, as a run does; what is logged.

    Args:
        run: its folder.
        url: where to.
        port: of the server.
        keep: how many newest copies are kept.
        step: of the checkpoint.
        released: steps that the run has deleted.
    """
    use(port)
    said, folder = Said.listen(), RunFolder(Path(run))
    (folder.path / "pid").write_text(str(os.getpid()))
    copying = Copying(Copies(url, STORE), folder, CheckpointConfig(keep=keep))
    copying.released.update(released)
    copying.start(next(f for f in reversed(committed(folder.checkpoints)) if step in (None, step_of(f))))
    assert copying.wait(100)
    return said.lines


def go_on(run: str, url: str, port: int) -> dict[str, Any]:
    """Find the checkpoint to go on from, as a run does (on every rank): its step or 0, and what is logged."""
    use(port)
    said, checkpoints, group = Said.listen(), RunFolder(Path(run)).checkpoints, dist.group.WORLD
    assert group is not None
    try:
        newest = agree_on_newest(checkpoints, group)
        found = fetch_newer(Copies(url, STORE), checkpoints, newest, group)
    except CheckpointError as e:
        return {"step": None, "said": said.lines, "error": str(e)}
    return {"step": 0 if found is None else step_of(found), "said": said.lines, "error": None}
