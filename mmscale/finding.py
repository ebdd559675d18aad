"""What a check found, with its fix, and the table of several. No torch here: the launcher looks before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["fail", "warn", "pass", "skip"]
ORDER: tuple[Level, ...] = ("fail", "warn", "pass", "skip")
"""The worst first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    level: Level
    what: str
    """Of `skip`: why it was not looked at."""
    fix: str = ""
    """What to do; empty where all is well."""
    node: str | None = None
    """The node at fault, where it is one of several."""


def render(findings: Sequence[Finding]) -> str:
    """A line a finding, the worst first, its fix below it, and a summary."""
    lines = []
    for finding in sorted(findings, key=lambda finding: ORDER.index(finding.level)):
        lines.append(f"{finding.level:<5} {finding.check:<14} {finding.what}")
        lines += [f"{'':<20} -> {finding.fix}"] if finding.fix and finding.level in ("fail", "warn") else []
    counts = {level: sum(finding.level == level for finding in findings) for level in ORDER}
    skipped = f", {counts['skip']} not looked at" if counts["skip"] else ""
    return "\n".join([*lines, f"{counts['fail']} would fail, {counts['warn']} to look at, {counts['pass']} good{skipped}"])


def failed_nodes(findings: Sequence[Finding]) -> list[str]:
    """The nodes that failed by name, each once."""
    return list(dict.fromkeys(finding.node for finding in findings if finding.level == "fail" and finding.node is not None))
