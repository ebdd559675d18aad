"""What became of a checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 6
"""Names listed for each line of a printed report."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a checkpoint's tensors."""

    source: str
    loaded: list[str] = field(default_factory=list)
    """Parameters of the model that took their values from the checkpoint."""
    left: list[str] = field(default_factory=list)
    """Tensors of the checkpoint's tower that have no place in the model."""
    missing: list[str] = field(default_factory=list)
    """Parameters of the expert that the checkpoint does not hold; they keep their random start."""
    notes: list[str] = field(default_factory=list)
    """Where the tower does not compute what the checkpoint computes, and why; one sentence each."""

    def __str__(self) -> str:
        lines = [f"started from {self.source}"]
        for title, names in (("loaded", self.loaded), ("left", self.left), ("missing", self.missing)):
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {title:<8}{len(names):>5}  {', '.join(names[:SHOWN])}{more}".rstrip())
        return "\n".join(lines + [f"  note    {note}" for note in self.notes])
