"""Which checkpoints a run has, and which is the newest that can be trusted."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mmscale.checkpoint import manifest
from mmscale.errors import CheckpointError

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Step that a checkpoint folder is named after."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{str(folder)!r} is not named like a checkpoint, step-00000100.")
    return int(match.group(1))


def committed(checkpoints: Path) -> list[Path]:
    """List the committed checkpoints of a run, oldest first; their content is not looked at."""
    if not checkpoints.is_dir():
        return []
    folders = [p for p in checkpoints.iterdir() if _NAME.fullmatch(p.name) and (p / manifest.NAME).is_file()]
    return sorted(folders, key=step_of)


def set_aside(folder: Path, fault: str) -> None:
    """Move a damaged checkpoint out of the way, and say so; it is not deleted."""
    aside = folder.with_name(f".bad-{folder.name}")
    number = 0
    while aside.exists():
        number += 1
        aside = folder.with_name(f".bad-{folder.name}.{number}")
    folder.rename(aside)
    logger.warning("checkpoint %s is damaged: %s. It was moved to %s and the one before it is used.", folder, fault, aside.name)


def resolve(path: str | Path) -> Path:
    """Find the checkpoint that a user means: a checkpoint folder, or a run folder's newest good one.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if (folder / manifest.NAME).is_file():
        return _good(folder)
    if (folder / "checkpoints").is_dir() or (folder / "status.json").is_file() or (folder / "launch.json").is_file():
        faults: dict[Path, str] = {}
        for candidate in reversed(committed(folder / "checkpoints")):
            fault = manifest.find_fault(candidate)
            if fault is None:
                for damaged, why in faults.items():
                    logger.warning("checkpoint %s is damaged: %s. %s is used.", damaged, why, candidate)
                return candidate
            faults[candidate] = fault
        for damaged, why in faults.items():
            raise CheckpointError(
                f"No checkpoint of the run {str(folder)!r} is good. The newest, {damaged.name}, is damaged: {why}. Take a copy of it, if "
                "there is one (`checkpoint.copy_to`)."
            )
        raise CheckpointError(f"The run {str(folder)!r} has no committed checkpoint yet; `mmscale runs show {folder}` says how far it is.")
    if not folder.exists():
        raise CheckpointError(f"{str(folder)!r} does not exist. Give a run folder, or a step-... folder below its checkpoints/.")
    manifest.read_manifest(folder)
    raise CheckpointError(f"{str(folder)!r} is not a checkpoint.")  # read_manifest has said why


def start_of(init_from: str) -> Path:
    """Find the checkpoint that a stage starts from.

    Raises:
        CheckpointError: there is none.
    """
    if not Path(init_from).exists():
        raise CheckpointError(
            f"`init_from`: {init_from!r} does not exist. Give a checkpoint or a run folder; init_from=null starts from random weights."
        )
    return resolve(init_from)


def _good(folder: Path) -> Path:
    fault = manifest.find_fault(folder)
    if fault is not None:
        raise CheckpointError(f"The checkpoint {str(folder)!r} is damaged: {fault}. Use another checkpoint of the run.")
    return folder
