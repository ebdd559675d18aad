"""From raw pairs to a data set of shards: list, plan, write, and sum up. Repeating an interrupted command goes on where it was.

Every file is committed by a rename; a shard counts once its sidecar is there. So a kill at any moment costs the shards that were
being written and nothing else, and the bytes are those of an uninterrupted run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shards.commit import commit_bytes
from shards.config import QuarantineConfig, WriteConfig
from shards.errors import BudgetError
from shards.index import build_manifest
from shards.plan import Plan, ShardTask, enter_plan, make_plan, sole_writer
from shards.progress import Progress
from shards.shard_writer import QUARANTINE_FOLDER, ShardResult, finished_shard, quarantine_path
from shards.sources import make_source
from shards.vocabulary import TOKENIZER_FOLDER, write_tokenizer
from shards.workers import run_tasks

QUARANTINE_NAME = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteSummary:
    """What a data set consists of, whichever command wrote which part of it."""

    written: int
    """Samples in the shards."""
    quarantined: Counter[str]
    """Refused samples by reason."""
    shards: int
    out: Path
    seconds: float
    """Wall-clock time of this command."""
    digest: str
    """The data set's version: the digest of its manifest."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if one was asked for."""

    def __str__(self) -> str:
        """One line for people."""
        refused = f"{self.quarantined.total()} quarantined ({_reasons(self.quarantined)})" if self.quarantined else "none quarantined"
        place = f"{str(self.out)!r}, version {self.digest[:12]}"
        return f"{self.written} samples in {self.shards} shards, {refused}; {place}, {self.seconds:.1f} s"


def write_shards(config: WriteConfig, *, progress: bool = True) -> WriteSummary:
    """Write a data set of shards, or finish one that an interrupted command has begun.

    Args:
        config: what to write, from where and where to.
        progress: report on stderr.

    Raises:
        ConfigError: settings that cannot be, or an `out` folder that holds something else.
        SourceError: the raw data cannot be listed or read.
        ShardError: the shards cannot be written.
        BudgetError: too many samples were refused; all others are written.
    """
    started = time.monotonic()
    config.check()
    out = Path(config.out)
    plan = make_plan(config, make_source(config).records())
    with sole_writer(out):
        enter_plan(out, plan)
        _remove_leftovers(out)
        results = _write_missing(config, plan, shown=progress)
        commit_bytes(out / QUARANTINE_NAME, _all_quarantined(out, plan.tasks))
        manifest = build_manifest(out)
        tokenizer = write_tokenizer(out, manifest, config.tokenizer)
    quarantined: Counter[str] = Counter()
    for result in results:
        quarantined.update(result.quarantined)
    summary = WriteSummary(
        written=manifest.rows,
        quarantined=quarantined,
        shards=len(manifest.shards),
        out=out,
        seconds=time.monotonic() - started,
        digest=manifest.digest,
        tokenizer=tokenizer,
    )
    _check_budget(summary, plan, config.quarantine)
    return summary


def _write_missing(config: WriteConfig, plan: Plan, *, shown: bool) -> list[ShardResult]:
    """Write the shards that are not there yet; returns the results of all."""
    found = {task.name: finished_shard(Path(config.out), task) for task in plan.tasks}
    results = [result for result in found.values() if result is not None]
    missing = [task for task in plan.tasks if found[task.name] is None]
    done = plan.records - sum(len(task.records) for task in missing)
    with Progress(plan.records, done, shown=shown) as bar:
        if results:
            bar.say(f"{len(results)} of {len(plan.tasks)} shards are there already")
        with closing(run_tasks(config, missing, config.process_count(), bar.advance)) as finished:
            results.extend(finished)
    return results


def _remove_leftovers(out: Path) -> None:
    """Delete the temporary files of a writer that was killed."""
    for folder in (out, out / QUARANTINE_FOLDER, out / TOKENIZER_FOLDER):
        for leftover in folder.glob(".*.tmp"):
            if leftover.is_file():
                leftover.unlink()


def _all_quarantined(out: Path, tasks: Sequence[ShardTask]) -> bytes:
    paths = [quarantine_path(out, task) for task in tasks]
    return b"".join(path.read_bytes() for path in paths if path.exists())


def _check_budget(summary: WriteSummary, plan: Plan, budget: QuarantineConfig) -> None:
    bad = summary.quarantined.total()
    if bad <= budget.max_fraction * plan.records and (budget.max_count is None or bad <= budget.max_count):
        return
    limit = f"quarantine.max_fraction={budget.max_fraction:g}"
    if budget.max_count is not None and bad > budget.max_count:
        limit = f"quarantine.max_count={budget.max_count}"
    with (summary.out / QUARANTINE_NAME).open(encoding="utf-8") as lines:
        first = json.loads(lines.readline())
    raise BudgetError(
        f"{bad} of {plan.records} samples were quarantined ({_reasons(summary.quarantined)}), more than {limit} allows. "
        f"The other {summary.written} are written in {str(summary.out)!r}. The first is {first['key']!r} of {first['source']}: "
        f"{first['detail']} Read {QUARANTINE_NAME} there for all; mend the source, or raise the limit."
    )


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
