"""The sections of a stage file about what happens when something fails: checkpoints, the guard, the watchdog. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from shards.configfile import need
from shards.store.place import is_bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to commit, and what to keep."""

    every: int = 0
    """Steps between checkpoints; 0 commits only the last step."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after a commit. 0 keeps all."""
    keep_every: int = 0
    """Of older ones, those whose step divides by this are kept too; 0 for none."""
    best: str | None = None
    """A metric of `evaluate`; the checkpoint of the step where it was highest is kept too."""
    background: bool = False
    """Copy the state and write it while training goes on; takes the state's size in CPU memory, each rank its share."""
    max_failures: int = 3
    """Saves that may fail one after the other, with training going on from the checkpoint before; then the run ends."""
    timeout_s: float = 3600.0
    """Longest wait of a rank for the others to have written their files; where training waits too, `watchdog.save_s` comes first."""
    mttf_hours: float | None = None
    """Mean time to a failure of the whole run, for the interval that is advised; null: 7.9 h x 1024 / ranks (Kokolis et al. 2024)."""
    copy_to: str | None = None
    """Where committed checkpoints are copied to as well, such as s3://bucket/run: an object store's URL, of this run alone. A run whose
    folder has no checkpoint as new as there goes on from there."""

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        for key, least in (("every", 0), ("keep", 0), ("keep_every", 0), ("max_failures", 1)):
            need(getattr(self, key) >= least, f"`checkpoint.{key}` must be at least {least}; got {getattr(self, key)}.")
        need(self.timeout_s > 0, f"`checkpoint.timeout_s` must be more than 0; got {self.timeout_s}.")
        mttf = self.mttf_hours
        need(mttf is None or mttf > 0, f"`checkpoint.mttf_hours` must be more than 0, or null; got {mttf}.")
        need(
            self.copy_to is None or is_bucket(self.copy_to),
            f"`checkpoint.copy_to` must be the URL of an object store, such as s3://bucket/run; got {self.copy_to!r}. For a second folder "
            "put `run` on a file system that is backed up.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What is done about steps that go wrong. One whose loss or gradient norm is not finite changes nothing and is skipped; a loss that
    stands out rolls the run back to its last commit. Past their budgets the run ends with exit code 86: no restart would help it."""

    max_consecutive: int = 5
    """Most steps in a row that may be skipped."""
    max_fraction: float = 0.01
    """Largest part of the steps done that may be skipped."""
    max_count: int = 10
    """Steps that may always be skipped, however few were done; `max_consecutive` holds all the same."""
    spike: float = 0.0
    """A loss so many deviations above the median of those before is a spike, such as 10; 0 looks for none. The deviation is 1.48 times the
    median one, and at least 1 % of the median."""
    spike_window: int = 100
    """Steps before that a loss is compared with; until there are so many, nothing is a spike."""
    max_rollbacks: int = 3
    """How often a run is rolled back to one and the same checkpoint."""

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        for key in ("max_consecutive", "max_fraction", "max_count"):
            need(getattr(self, key) >= 0, f"`guard.{key}` must be at least 0; got {getattr(self, key)}.")
        need(self.spike >= 0, f"`guard.spike` must be above 0, or 0 for none; got {self.spike}.")
        for key, least in (("spike_window", 2), ("max_rollbacks", 1)):
            need(getattr(self, key) >= least, f"`guard.{key}` must be at least {least}; got {getattr(self, key)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """Longest time of each section of a run, in seconds; one that takes longer ends the run. 0 sets no limit."""

    setup_s: float = 3600.0
    """Joining the ranks, opening the data, building the model, loading a checkpoint."""
    data_s: float = 600.0
    """Waiting for the batches of a step; of the first one, starting the workers too."""
    step_s: float = 900.0
    """A step with its line of the log; of the first one, compiling too."""
    evaluate_s: float = 3600.0
    """An evaluation during training."""
    save_s: float = 1800.0
    """What a checkpoint stalls training, and the end of the run."""

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        for section, limit_s in asdict(self).items():
            need(limit_s >= 0, f"`watchdog.{section}` must be seconds, or 0 for no limit; got {limit_s:g}.")
