"""The exceptions of the middle floor, below the root in `shards.errors`."""

from shards.errors import MmscaleError


class CheckpointError(MmscaleError):
    """A folder that is no checkpoint, is unfinished or damaged, or belongs to another model or data set."""


class TopologyError(MmscaleError):
    """Ranks that disagree, or a topology that a checkpoint cannot be resumed on."""


class RunError(MmscaleError):
    """A run that cannot go on: names the step and what was seen."""
