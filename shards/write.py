"""From raw pairs to a data set of shards: list, plan, write, and sum up. Repeating an interrupted command goes on where it was.

Every file is committed by a rename; a shard counts once its sidecar is there. So a kill at any moment costs the shards that were
being written and nothing else, and the bytes are those of an uninterrupted run. Commands on any number of hosts may write into one
folder at the same time: each takes the shards of its part that nobody has claimed.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from shards.claim import Claims
from shards.commit import remove_leftovers
from shards.config import QuarantineConfig, WriteConfig
from shards.errors import BudgetError, ShardError
from shards.finish import FILTERED_NAME, QUARANTINE_NAME, clean_up, finish, finished_manifest, missing_shards, reasons_in
from shards.manifest import Manifest
from shards.part import Part, choose_part
from shards.plan import Plan, enter_plan, make_plan
from shards.shard_writer import FILTERED_FOLDER, QUARANTINE_FOLDER, ShardResult
from shards.sources import make_source
from shards.vocabulary import TOKENIZER_FOLDER
from shards.write_part import POLL_S, write_part

FINISH = "finish"
"""The claim on summing up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteSummary:
    """What a data set consists of, whichever command wrote which part of it; of a part, while others are missing."""

    written: int
    """Samples in the shards."""
    quarantined: Counter[str]
    """Refused samples by reason."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Samples that the filter has left out, by reason."""
    shards: int
    out: Path
    seconds: float
    """Wall-clock time of this command."""
    digest: str | None
    """The data set's version: the digest of its manifest; None while shards are missing."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if one was asked for."""
    part: Part
    """What this command was to write."""
    missing: int = 0
    """Shards of other parts that are not there yet."""

    def __str__(self) -> str:
        """One line for people."""
        refused = f"{self.quarantined.total()} quarantined ({_reasons(self.quarantined)})" if self.quarantined else "none quarantined"
        if self.filtered:
            refused += f", {self.filtered.total()} filtered ({_reasons(self.filtered)})"
        if self.digest is None:
            place = f"{self.missing} shards of other parts are still missing in {str(self.out)!r}"
            return f"part {self.part}: {self.written} samples in {self.shards} shards, {refused}; {place}; {self.seconds:.1f} s"
        place = f"{str(self.out)!r}, version {self.digest[:12]}"
        return f"{self.written} samples in {self.shards} shards, {refused}; {place}, {self.seconds:.1f} s"


def write_shards(config: WriteConfig, *, progress: bool = True) -> WriteSummary:
    """Write a data set of shards or one part of it, or finish what an interrupted command has begun.

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
    part = choose_part(config.part, os.environ)
    plan = make_plan(config, make_source(config).records())
    try:
        enter_plan(out, plan)
        for folder in (out, out / QUARANTINE_FOLDER, out / FILTERED_FOLDER, out / TOKENIZER_FOLDER):
            remove_leftovers(folder)
        with Claims(out) as claims:
            results = write_part(config, plan, part, claims, shown=progress)
            missing = missing_shards(out, plan)
            manifest = None if missing else _finish(config, plan, claims)
    except OSError as e:
        raise ShardError(
            f"Writing in {str(out)!r} failed: {e.strerror or e}. Mend that and repeat the command; finished shards are kept."
        ) from e
    seconds = time.monotonic() - started
    if manifest is None:
        return _summary_of_part(out, part, results, missing, seconds)
    summary = _summary_of_whole(config, part, manifest, seconds)
    _check_budget(summary, plan, config.quarantine)
    return summary


def _finish(config: WriteConfig, plan: Plan, claims: Claims) -> Manifest:
    """Sum up, unless another command is at it: then wait for it, and do it after all if it dies."""
    out = Path(config.out)
    waited = False
    while not claims.take(FINISH):
        waited = True
        time.sleep(POLL_S)
    manifest = finished_manifest(out, plan) if waited else None
    manifest = manifest or finish(out, plan, config)
    clean_up(out)
    claims.clear(FINISH)
    claims.release(FINISH)
    return manifest


def _summary_of_part(out: Path, part: Part, results: list[ShardResult], missing: int, seconds: float) -> WriteSummary:
    return WriteSummary(
        written=sum(result.rows for result in results),
        quarantined=sum((Counter(result.quarantined) for result in results), Counter[str]()),
        filtered=sum((Counter(result.filtered) for result in results), Counter[str]()),
        shards=len(results),
        out=out,
        seconds=seconds,
        digest=None,
        part=part,
        missing=missing,
    )


def _summary_of_whole(config: WriteConfig, part: Part, manifest: Manifest, seconds: float) -> WriteSummary:
    out = Path(config.out)
    return WriteSummary(
        written=manifest.rows,
        quarantined=reasons_in(out / QUARANTINE_NAME),
        filtered=reasons_in(out / FILTERED_NAME),
        shards=len(manifest.shards),
        out=out,
        seconds=seconds,
        digest=manifest.digest,
        tokenizer=out / TOKENIZER_FOLDER if config.tokenizer.kind != "none" else None,
        part=part,
    )


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
