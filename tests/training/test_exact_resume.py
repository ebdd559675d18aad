"""kill -9 of every process at a random moment: the resumed run equals the undisturbed one bit for bit, and no position is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.training.runs import audited, kill_after, losses, train, write_stage


def assert_whole(run: Path, steps: int, batch: int) -> None:
    """Every position of the run is in the audit, in the step that it belongs to."""
    lines = audited(run)
    assert sorted(lines) == list(range(steps * batch))
    assert all(step == position // batch + 1 for position, (step, _) in lines.items())


def check(tmp_path: Path, glyphs: Path, *, zero: int, workers: int, steps: int, kills: int, extra: tuple[str, ...] = ()) -> None:
    """Train once undisturbed and once with kills, and compare."""
    stage = write_stage(tmp_path, glyphs)
    words = [f"zero.stage={zero}", f"loader.workers={workers}", f"train.steps={steps}", "checkpoint.every=5", *extra]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = train(2, stage, f"run={whole}", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rng = random.Random(f"{zero} {workers}")
    for kill in range(kills):
        lines = max(rng.randrange(1, max(2, steps // (kills + 1))), 0 if kill else 6)  # there is a checkpoint to go on from
        kill_after(2, stage, [f"run={broken}", *words], broken, lines=lines, extra_s=rng.uniform(0, 0.3))
        assert len(losses(broken)) < steps, f"kill {kill} came after the end"
    done = train(2, stage, f"run={broken}", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "resumed from" in done.stdout
    assert len(losses(whole)) == steps
    assert losses(broken) == losses(whole)
    assert_whole(whole, steps, 16)
    assert_whole(broken, steps, 16)
    assert audited(broken) == audited(whole)


def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, glyphs: Path) -> None:
    """The shortest case, in the default suite; EMA and accumulation are on."""
    check(tmp_path, glyphs, zero=2, workers=0, steps=20, kills=1, extra=("train.ema_decay=0.9", "train.micro_batch=4"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_three_kills_in_sixty_steps(tmp_path: Path, glyphs: Path, zero: int, workers: int) -> None:
    check(tmp_path, glyphs, zero=zero, workers=workers, steps=60, kills=3)
