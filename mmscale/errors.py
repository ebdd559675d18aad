"""The exceptions of the middle floor, below the root in `shards.errors`."""

from shards.errors import MmscaleError

NO_PROGRESS = 86
"""Exit code of a run that is not to be started again as it is."""


class CheckpointError(MmscaleError):
    """A folder that is no checkpoint, is unfinished or damaged, or belongs to another model or data set."""


class TopologyError(MmscaleError):
    """Ranks that disagree, or a topology that a checkpoint cannot be resumed on."""


class RunError(MmscaleError):
    """A run that cannot go on: names the step and what was seen."""


class NoProgressError(RunError):
    """A run that would end the same way at every restart: its ranks exit with `NO_PROGRESS`."""
