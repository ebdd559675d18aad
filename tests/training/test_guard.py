"""Steps that are not finite: nothing changes, they are counted and named, the run goes on exactly, and stops past its budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mmscale.checkpoint.model_folder import model_weights
from mmscale.checkpoint.reader import StateReader
from mmscale.guard import Gate
from mmscale.hooks.guard import GuardHook
from mmscale.objectives.masked_image import MaskedImage
from mmscale.recovery_config import GuardConfig
from mmscale.run_folder import RunFolder
from mmscale.step import StepSums
from mmscale.world import World
from tests.model.streams import GRIDS, MODALITIES, stream_batch
from tests.model.tiny import make_batch, random_rows, tiny_model
from tests.objectives.ranks import run_ranks
from tests.training.alone import Alone
from tests.training.runs import STAGE, losses, records, run_grid, write_stage

STEPS, SKIPPED = 8, (1, 4, 6)
"""Steps counted from 1; those of `poison.PLACES` are counted from 0."""
WORDS = "train.ema_decay=0.9 checkpoint.every=1 checkpoint.keep=0 guard.max_count=3"


def variants(stage: int | None) -> list[str]:
    """Every precision and accumulation of a ZeRO stage, or a choice of all."""
    chosen = [(0, "fp32", 8), (2, "bf16", 8), (3, "fp32", 4)]
    every = [(stage, precision, micro) for precision in ("fp32", "bf16") for micro in (4, 8)]
    name, words = "zero{0}-{1}-micro{2}", "zero.stage={0} train.precision={1} train.micro_batch={2}"
    lines = [f"{name} {words} {WORDS}".format(*case) for case in (chosen if stage is None else every)]
    if stage is None or stage < 3:
        lines.append(f"muon zero.stage={stage or 1} optimizer.name=muon {WORDS}")
    return lines


def changed(run: Path, step: int) -> list[str]:
    """Files of a step's checkpoint with a tensor that is not bit for bit that of the step before: model, average, optimizer."""
    before, after = (run / "checkpoints" / f"step-{s:08}" for s in (step - 1, step))
    found = []
    for path in sorted(after.rglob("*.safetensors")):
        old, new = load_file(before / path.relative_to(after)), load_file(path)
        # some of DeepSpeed's optimizers have no moments before their first step
        if old.keys() != new.keys() or not all(torch.equal(old[k], new[k]) for k in old):
            found.append(path.name)
    return found


@pytest.mark.parametrize("zero", [None, *(pytest.param(zero, marks=pytest.mark.slow) for zero in range(4))])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, glyphs: Path, zero: int | None) -> None:
    stage = write_stage(tmp_path, glyphs, STAGE.replace("steps: 12", f"steps: {STEPS}"))
    lines = variants(zero)
    run_grid(2, stage, tmp_path, lines, program="poison.py")
    for line in lines:
        name = line.split()[0]
        check_run(tmp_path / name)
        copy = tmp_path / f"{name}-resumed"
        shutil.copytree(tmp_path / name, copy)
        for step in range(5, STEPS + 1):
            shutil.rmtree(copy / "checkpoints" / f"step-{step:08}")
    run_grid(2, stage, tmp_path, [line.replace(" ", "-resumed ", 1) for line in lines], program="poison.py")
    for line in lines:
        whole, resumed = tmp_path / line.split()[0], tmp_path / f"{line.split()[0]}-resumed"
        assert "step-00000004: step 4, 64 samples seen" in (resumed / "logs" / "rank-0.log").read_text()
        assert losses(resumed) == losses(whole)
        assert records(resumed / "skipped.jsonl") == records(whole / "skipped.jsonl")


def check_run(run: Path) -> None:
    """Steps 1, 4 and 6 left everything as it was, the others did not; each is named."""
    for step in range(2, STEPS + 1):
        files = changed(run, step)
        assert (not files) == (step in SKIPPED), (run.name, step, files)
    metrics = records(run / "metrics.jsonl")
    assert [r["skipped_steps"] for r in metrics] == [1, 1, 1, 2, 2, 3, 3, 3]
    assert [r["step"] for r in metrics if r["loss"] is None] == [1, 6]
    assert [r["step"] for r in metrics if r["grad_norm"] is None] == list(SKIPPED)
    assert [r["samples_seen"] for r in metrics] == [16 * s for s in range(1, STEPS + 1)]
    named = records(run / "skipped.jsonl")
    assert {(r["step"], r["rank"], *r["losses"].items()) for r in named} == {
        (1, 0, ("captioning", "inf")),
        (4, 1),
        (6, 1, ("contrastive", "inf")),
    }
    assert all(r["gradient_only"] == (r["step"] == 4) for r in named)
    read = {(r["step"], r["key"]) for r in records(run / "audit" / "rank-1.jsonl")}
    assert all((r["step"], key) in read for r in named if r["rank"] == 1 for key in r["keys"])
    log = (run / "logs" / "rank-0.log").read_text()
    assert "step 6 skipped, not finite: contrastive inf on rank 1, micro-step 0 (" in log
    assert "step 4 skipped, not finite: gradient on rank 1, micro-step 0 (" in log
    assert json.loads((run / "checkpoints" / "step-00000004" / "run.json").read_text())["skipped_in_a_row"] == 1


def test_past_the_budget_the_good_state_is_committed_and_the_run_fails(alone: Alone, stage: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = alone(stage, f"run={run}", "train.steps=3", "train.ema_decay=0.9")
    assert code == 0, out + err
    words = (f"run={run}", "train.steps=9", "train.ema_decay=0.9", "objectives.captioning.weight=1e39", "guard.max_consecutive=2")
    code, out, err = alone(stage, *words)
    assert code == 86
    said = [line for line in err.splitlines() if line.startswith("mmscale: error")]
    assert said == [
        "mmscale: error: Step 6 was skipped because the gradient is not finite on rank 0: 3 in a row and 3 of 6 steps, more than "
        "guard.max_consecutive = 2, or guard.max_fraction = 0.01 and guard.max_count = 10, allow. Ranks and samples are listed in "
        f"{run}/skipped.jsonl. Skipped steps changed no weight: go on from the last checkpoint with a lower optimizer.lr or "
        "train.clip_norm, with train.precision=fp32, or without those samples."
    ]
    good, kept = (dict(model_weights(StateReader(run / "checkpoints" / f"step-0000000{s}"))) for s in (3, 6))
    assert all(torch.equal(good[k], kept[k]) for k in good)
    code, out, err = alone(stage, f"run={run}", "train.steps=9", "train.ema_decay=0.9")  # what spoiled it is gone
    assert code == 0, out + err
    assert [r["skipped_steps"] for r in records(run / "metrics.jsonl")] == [0, 0, 0, 1, 2, 3, 3, 3, 3]


def traced(rank: int, ranks: int) -> list[bool]:
    """Whether each of two micro-batches is named, the first with a gradient that is not finite; of sound, clips and texts alone."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo", verbose=False)
    model, nothing, found = tiny_model(modalities=MODALITIES), {name: [None] * 8 for name in GRIDS}, []
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True), config=config)
    gate, objective = Gate(engine, 0.0, *model.embeddings()), MaskedImage(weight=1.0)
    for name in ("audio", "video", "other"):
        for bad in (True, False):
            loss = engine(stream_batch(model, grids=nothing | {name: GRIDS[name]}), [objective])["masked_image"].sum
            trace = gate.backward(loss + (0 * loss).sqrt() if bad else loss, 1)
            found.append(bool(trace.isnan()))
            engine.zero_grad()
    return found


def test_a_micro_batch_of_sound_alone_is_named(tmp_path: Path) -> None:
    (got,) = run_ranks(traced, 1, tmp_path)
    assert got == [True, False] * 3


def guarded(rank: int, ranks: int, flags: list[int], late: int, config: GuardConfig, folder: str) -> list[tuple[int, int, bool]]:
    """Total, in a row and whether it failed after each step, and after settling."""
    import torch.distributed as dist

    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    hook = GuardHook(RunFolder(Path(folder)), config, world, dist.group.WORLD, ["a"], late=late)
    seen = []
    batch = SimpleNamespace(host=[make_batch(random_rows(2))])
    for step, flag in enumerate(flags, start=1):
        sums = StepSums(
            torch.ones(1), torch.ones(1), skipped=torch.tensor(float(flag)), micro=[(torch.tensor([torch.nan]), torch.tensor(0.0))]
        )
        hook.after_step(SimpleNamespace(step=step, sums=sums, batch=batch))  # type: ignore[arg-type]
        seen.append((hook.total, hook.in_a_row, hook.failure is not None))
    hook.settle()
    return [*seen, (hook.total, hook.in_a_row, hook.failure is not None)]


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ([1, 1, 0, 1], GuardConfig(max_consecutive=2), [(1, 1, False), (2, 2, False), (2, 0, False), (3, 1, False)]),
        ([0, 1, 1, 0], GuardConfig(max_consecutive=1), [(0, 0, False), (1, 1, False), (2, 2, True), (2, 0, True)]),
        ([1, 0, 0, 1], GuardConfig(max_count=1, max_fraction=0.4), [(1, 1, False), (1, 0, False), (1, 0, False), (2, 1, True)]),
        ([1, 0, 0, 1], GuardConfig(max_count=1, max_fraction=0.5), [(1, 1, False), (1, 0, False), (1, 0, False), (2, 1, False)]),
    ],
)
@pytest.mark.parametrize("late", [0, 1])
def test_budget_and_flags_that_come_a_step_late(
    tmp_path: Path, flags: list[int], config: GuardConfig, expected: list[tuple[int, int, bool]], late: int
) -> None:
    (got,) = run_ranks(guarded, 1, tmp_path, flags, late, config, str(tmp_path))
    assert got == [*([(0, 0, False)] * late + expected)[: len(expected)], expected[-1]]
    assert len(records(tmp_path / "skipped.jsonl")) == sum(flags)


def passed_over(rank: int, ranks: int, folder: str) -> str:
    """What is said of more steps passed over by roll-backs than the guard allows."""
    import torch.distributed as dist

    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    hook = GuardHook(RunFolder(Path(folder)), GuardConfig(max_count=1), world, dist.group.WORLD, ["a"], late=0)
    for step in (50, 51):
        sums = StepSums(torch.ones(1), torch.full((1,), torch.nan), passed_over=True)
        sums.skipped = torch.ones(())
        hook.after_step(SimpleNamespace(step=step, sums=sums, batch=SimpleNamespace(host=[make_batch(random_rows(2))])))  # type: ignore[arg-type]
    return str(hook.failure)


def test_steps_passed_over_are_not_called_broken(tmp_path: Path) -> None:
    (said,) = run_ranks(passed_over, 1, tmp_path, str(tmp_path))
    assert said.startswith("Step 51 was passed over, since the run was rolled back for a spike of its loss (")
    assert "2 of 51 steps are left out, more than guard.max_fraction = 0.01 and guard.max_count = 1 allow." in said
    assert "finite" not in said
