"""One command's share of the work: the shards of its part, each claimed before it is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from shards.claim import Claims
from shards.commit import remove_leftovers
from shards.config import WriteConfig
from shards.part import Part
from shards.plan import Plan, ShardTask, shard_name
from shards.pool import run
from shards.progress import Progress
from shards.shard_writer import ShardResult, ShardWriter, finished_shard

POLL_S = 0.5
"""Pause between two looks at what others are writing."""


def write_part(config: WriteConfig, plan: Plan, part: Part, claims: Claims, *, shown: bool) -> list[ShardResult]:
    """Write the shards of a part that are not there yet, and wait for those of it that others are writing.

    Returns:
        What became of each shard of the part, whoever wrote it.
    """
    numbers = part.shards(plan.shards)
    results = _finished(config, numbers)
    total = sum(map(plan.size, numbers))
    with Progress(total, sum(map(plan.size, results)), shown=shown) as bar:
        if part.count > 1:
            bar.say(f"part {part}: {len(numbers)} of {plan.shards} shards" + (f", {numbers[0]} to {numbers[-1]}" if numbers else ""))
        if results:
            bar.say(f"{len(results)} of {len(numbers)} shards are there already")
        waiting = False
        while missing := [number for number in numbers if number not in results]:
            written = _write(config, plan, missing, claims, bar)
            others = _finished(config, (number for number in missing if number not in written))
            bar.advance(sum(map(plan.size, others)))
            results |= written | others
            if not written and not others:
                if not waiting:
                    bar.say(f"waiting for {shard_name(missing[0])}, which {claims.holder_of(shard_name(missing[0]))} is writing")
                waiting = True
                time.sleep(POLL_S)
    return list(results.values())


def _finished(config: WriteConfig, numbers: Iterable[int]) -> dict[int, ShardResult]:
    found = ((number, finished_shard(Path(config.out), number)) for number in numbers)
    return {number: result for number, result in found if result is not None}


def _write(config: WriteConfig, plan: Plan, missing: list[int], claims: Claims, bar: Progress) -> dict[int, ShardResult]:
    """Write those of the missing shards that nobody else has claimed."""
    written: dict[int, ShardResult] = {}
    processes = min(config.process_count(), len(missing))
    tasks = _claimed(config, plan, missing, claims)
    try:
        with closing(run(ShardWriter(config), tasks, processes, report=bar.advance)) as results:
            for _, result in results:
                claims.release(shard_name(result.number))
                written[result.number] = result
    finally:
        remove_leftovers(Path(config.out))  # of processes that were in the middle of a shard
    return written


def _claimed(config: WriteConfig, plan: Plan, missing: list[int], claims: Claims) -> Iterator[ShardTask]:
    """Claim one shard after the other; what another command has committed in the meantime is left alone."""
    for number in missing:
        if claims.take(shard_name(number)):
            if finished_shard(Path(config.out), number) is None:
                yield plan.task(number)
            else:
                claims.release(shard_name(number))
