"""The exceptions of the whole project; the upper floors add their own leaves below these roots."""

from __future__ import annotations


class MmscaleError(Exception):
    """Root of every error that a user can cause or mend; its text is one readable paragraph.

    MmscaleError
    ├── ConfigError        a key, a type or a combination in a configuration
    ├── DataError          what is wrong with data
    │   ├── SourceError    raw input that cannot be listed or read at all
    │   ├── SampleError    one sample that cannot be used: quarantined by name and reason
    │   ├── ShardError     a shard, sidecar or manifest that is missing, unfinished or malformed
    │   ├── IntegrityError bytes that do not match their checksum
    │   └── BudgetError    more bad samples than the budget allows
    └── (mmscale.errors)   CheckpointError, TopologyError, RunError
    """


class ConfigError(MmscaleError):
    """A configuration that cannot be used: names the key, what was got, what is possible."""


class DataError(MmscaleError):
    """Root of everything that is wrong with data rather than with a configuration."""


class SourceError(DataError):
    """Raw input that cannot be listed or opened at all."""


class SampleError(DataError):
    """One sample that cannot be used. It is quarantined; the others go on.

    Args:
        key: the sample's key.
        reason: a short stable word for counting, such as `truncated` or `empty_caption`.
        detail: one sentence for a person.
    """

    def __init__(self, key: str, reason: str, detail: str) -> None:
        super().__init__(f"{key}: {reason}: {detail}")
        self.key = key
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str]]:
        """Goes to other processes with its three parts."""
        return type(self), (self.key, self.reason, self.detail)


class ShardError(DataError):
    """A shard, sidecar or manifest that is missing, unfinished or malformed."""


class IntegrityError(DataError):
    """Bytes that do not match their recorded checksum; names `shard:key`."""


class BudgetError(DataError):
    """More bad samples than the configured budget allows."""
