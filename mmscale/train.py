"""Training: `deepspeed --module mmscale.train CONFIG [key=value ...]`, or under torchrun, srun or alone.

Exit codes: 0 finished, 85 checkpointed on request, 86 no progress, 87 a section took too long, 2 wrong configuration, 1 any other failure.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from mmscale import flops
from mmscale.arithmetic import describe
from mmscale.assemble import Run, assemble, run_state
from mmscale.backward import Backward
from mmscale.checkpoint.agree import agree_on_newest
from mmscale.checkpoint.fetch import fetch_newer
from mmscale.checkpoint.find import step_of
from mmscale.checkpoint.load import load_state, restore_counters
from mmscale.checkpoint.state import RunState, check_same_run, describe_change, read_state
from mmscale.config import RunConfig, load_run_config
from mmscale.counts import Counts, count
from mmscale.data.batch import Batch
from mmscale.data.loader import StepBatch, StepLoader
from mmscale.data.sources import describe_sources
from mmscale.errors import NO_PROGRESS, NoProgressError
from mmscale.hooks import Hook, StepInfo
from mmscale.hooks.audit import AuditHook, QuarantineHook
from mmscale.hooks.checkpoint import CheckpointHook
from mmscale.hooks.evaluate import EvaluateHook, has_lost_patience
from mmscale.hooks.guard import GuardHook
from mmscale.hooks.log import LogHook
from mmscale.hooks.spike import SpikeHook
from mmscale.memory import device_bytes, estimate
from mmscale.model.sequences import Wanted
from mmscale.rollback import LossSpike, roll_back, steps_passed_over
from mmscale.run_folder import RunFolder, replace_file
from mmscale.signals import StopRequest, die_with_parent
from mmscale.step import optimizer_step, pass_over
from mmscale.watchdog import Watchdog
from mmscale.world import World, connect, read_world
from shards import configfile
from shards.errors import ConfigError, MmscaleError

logger = logging.getLogger("mmscale.train")  # __name__ is __main__ when deepspeed runs the module
STOPPED = 85
"""Exit code of a run that committed a checkpoint on request and can be started again."""
WAIT_SHARE = 0.5
"""Of the shortest limit that applies at the end of a run, what is spent on waiting for the last copy."""


def train(run: Run, state: RunState | None, stop: StopRequest, watch: Watchdog) -> int:
    """Train to the last step, or until a stop is asked for, or patience is out.

    Returns:
        Steps done.

    Raises:
        LossSpike: the run is to be rolled back.
    """
    steps = run.config.train.steps
    done = state.step if state else 0
    hooks: list[Hook] = []
    over = steps_passed_over(run.folder, run.group)
    with open_loader(run, state) as loader:
        try:
            watch.enter("data", done + 1)
            for batch in loader:
                watch.enter("step", batch.step + 1)
                if not hooks:
                    hooks = build_hooks(run, state, batch, stop)
                sums = (pass_over if batch.step + 1 in over else optimizer_step)(run, batch, stop.asked)
                if run.average is not None:
                    run.average.update(sums.skipped)
                done = batch.step + 1
                info = StepInfo(done, batch.samples_seen_after, batch, sums, last=sums.stop or done == steps)
                for hook in hooks:
                    watch.enter(hook.section, done)
                    hook.after_step(info)
                    if stop.enough and not info.last:
                        info = replace(info, last=True)
                if info.last:
                    break
                watch.enter("data", done + 1)
        finally:
            for hook in hooks:
                hook.close()
    return done


def open_loader(run: Run, state: RunState | None) -> StepLoader:
    """Open the data where the run stands: one integer says where."""
    loader = run.config.loader
    return StepLoader(
        run.dataset,
        run.collator,
        global_batch=run.plan.global_batch,
        micro_batch=run.plan.micro_batch,
        rank=run.world.rank,
        size=run.world.size,
        samples_seen=state.samples_seen if state else 0,
        steps=run.config.train.steps,
        workers=loader.workers,
        threads=loader.threads,
        prefetch=loader.prefetch,
        consecutive=run.plan.consecutive,
        device=run.world.device,
    )


def build_hooks(run: Run, state: RunState | None, first: StepBatch, stop: StopRequest) -> list[Hook]:
    """Build the hooks in the order in which they run, and print what was derived."""
    shape, modalities, wanted = run.trainee.model.config, run.trainee.model.modalities, Wanted.of(run.objectives)

    backward = Backward.of(run.trainee.model)

    def training_flops(batch: Batch) -> float:
        return flops.training_flops(shape, count(shape, batch, wanted, modalities), backward)

    if run.world.is_first:
        logger.info("%s", _description(run, [count(shape, b, wanted, modalities) for b in first.host]))
    step, bad, config = (state.step, state.quarantined, run.config) if state else (0, 0, run.config)
    names, skipped = [o.name for o in run.objectives], (state.skipped, state.skipped_in_a_row) if state else (0, 0)
    guard = GuardHook(run.folder, config.guard, run.world, run.group, names, already=skipped, resumed_at=step)
    weights, losses = [o.weight for o in run.objectives], state.losses if state else ()
    spikes = SpikeHook(config.guard, run.world, weights, losses) if config.guard.spike else None
    saving = CheckpointHook(run, bad, guard, spikes, stop)
    log = LogHook(
        run.folder,
        run.world,
        run.gate,
        run.objectives,
        guard,
        every=config.log.every,
        steps=config.train.steps,
        resumed_at=step,
        rows=len(run.dataset),
        flops=training_flops,
        peak_flops=flops.peak_flops(run.world.device, run.dtype),
        tensorboard=config.log.tensorboard,
        stalled_s=lambda: saving.stalled_s,
    )
    hooks: list[Hook] = [guard, *([spikes] if spikes else []), log, QuarantineHook(run.folder, config.quarantine, bad, run.world)]
    if config.audit.samples:
        hooks.append(AuditHook(run.folder, run.world))
    if config.evaluate.every:
        hooks.append(EvaluateHook(run, step, stop))
    return [*hooks, saving]


def resume(run: Run) -> RunState | None:
    """Load the newest good checkpoint of the run folder, if there is one (all ranks call).

    Raises:
        CheckpointError, TopologyError: it belongs to another model or data set, or has what this run has no place for.
    """
    folder = agree_on_newest(run.folder.checkpoints, run.group)
    if run.copying is not None:
        folder = fetch_newer(run.copying.copies, run.folder.checkpoints, folder, run.group)
    if folder is None:
        return None
    if run.copying is not None and run.world.is_first:
        run.copying.start(folder)  # a kill may have cut its copy short
    state = read_state(folder)
    counters = {name: getattr(state, name) for name in ("step", "samples_seen", "quarantined", "skipped", "skipped_in_a_row")}
    now = run_state(run, **counters)
    check_same_run(folder, state, now)
    load_state(folder, run.engine, run.trainee.model, run.average, run.group)
    restore_counters(run.engine, state.step)
    logger.info("resumed from %s: step %d, %d samples seen; every tensor compared", folder, state.step, state.samples_seen)
    if (changed := describe_change(state, now)) is not None:
        logger.info(
            "the topology has changed (%s): losses go on to rounding, contrastive and matching ones as far as their groups fix them",
            changed,
        )
    return state


def train_from_newest(run: Run, stop: StopRequest, watch: Watchdog) -> int:
    """Train from the newest checkpoint, and again from there after a loss spike.

    Returns:
        Steps done; `stop.enough` says whether patience is out.

    Raises:
        NoProgressError, RunError: see `roll_back`.
    """
    begun = False
    while True:
        state = resume(run)
        done = 0 if state is None else state.step
        if not begun and run.world.is_first:  # what is refused leaves the run as it was
            replace_file(run.folder.config, configfile.to_yaml(run.config))
            run.folder.write_status("running", step=done, steps=run.config.train.steps)
        begun = True
        stop.enough = has_lost_patience(run, done)
        if done >= run.config.train.steps or stop.enough:
            return done
        try:
            return train(run, state, stop, watch)
        except LossSpike as spike:
            watch.enter("setup", spike.step)
            newest = agree_on_newest(run.folder.checkpoints, run.group)
            roll_back(
                run.folder, run.config.guard, spike, step_of(newest) if newest else 0, global_batch=run.plan.global_batch, group=run.group
            )


def run_stage(config: RunConfig, world: World, folder: RunFolder, watch: Watchdog) -> int:
    """Run a stage from where it stands to its end.

    Returns:
        The exit code.
    """
    stop = StopRequest()
    stop.listen()
    group = connect(world, config.train.timeout_s)
    run = assemble(config, world, group)
    try:
        done = train_from_newest(run, stop, watch)
    except NoProgressError as e:
        if world.is_first:
            folder.write_status("stuck", steps=config.train.steps, reason=str(e))
        dist.barrier(group=group)  # the first rank to end may be the end of the others
        raise
    finished = done >= config.train.steps or stop.enough
    watch.enter("save", done, anew=True)
    dist.barrier(group=group)
    if world.is_first:
        folder.write_status("finished" if finished else "stopped", step=done if finished else None, steps=config.train.steps)
        wait_for_copies(run)
    dist.barrier(group=group)
    logger.info("the run is %s", "finished" if finished else "stopped on request; the same command goes on from here")
    dist.destroy_process_group()
    return 0 if finished else STOPPED


def wait_for_copies(run: Run) -> None:
    """Give the last copy the time that the other ranks and the watchdog leave; the run itself is over and has said so."""
    limits = (run.config.train.timeout_s, run.config.watchdog.save_s or float("inf"))
    if run.copying is not None and not run.copying.wait(WAIT_SHARE * min(limits)):
        logger.warning("ALERT the last checkpoint is not copied to %s yet; the same command completes it", run.copying.copies.root)


def main(argv: Sequence[str] | None = None) -> int:
    """Per-rank entry point: CONFIG [key=value ...]."""
    words = [w for w in (sys.argv[1:] if argv is None else argv) if not w.startswith("--local_rank")]
    if "CROSS_RANK" in os.environ:  # set by deepspeed's per-host launcher, which leaves its ranks running when it is killed
        die_with_parent()
    # of a call inside DeepSpeed, which a user can do nothing about
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    world: World | None = None
    try:
        if not words or "=" in words[0]:
            raise ConfigError("Give a stage file first: mmscale.train CONFIG [key=value ...].")
        world = read_world()
        config = load_run_config(words[0], words[1:])
        folder = RunFolder(Path(config.run))
        start_logging(folder, world)
        with Watchdog(config, folder, world) as watch:
            return run_stage(config, world, folder, watch)
    except MmscaleError as e:
        return _report(e, world)


def start_logging(folder: RunFolder, world: World) -> None:
    """Log every rank to logs/rank-N.log, and rank 0 to the console."""
    folder.make()
    path = folder.log(world.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
    if world.is_first:
        console = logging.StreamHandler(sys.stdout)
        console.addFilter(lambda record: record.levelno < logging.ERROR)  # `_report` prints those to stderr
        handlers.append(console)
    root = logging.getLogger("mmscale")
    root.setLevel(logging.INFO)
    root.propagate = False
    for old in root.handlers:
        old.close()
    root.handlers = handlers
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))


def _report(error: MmscaleError, world: World | None) -> int:
    """Say once what went wrong: a wrong configuration is mostly the same on every rank, so only the first one speaks where they share a
    terminal; below `mmscale launch` each has a log of its own, and a file may lack on one host alone."""
    code = 2 if isinstance(error, ConfigError) else NO_PROGRESS if isinstance(error, NoProgressError) else 1
    if logging.getLogger("mmscale").handlers:  # else the run folder is not known yet
        logger.error("%s", error)
    if code != 2 or world is None or world.is_first or "MMSCALE_LAUNCH_ID" in os.environ:
        print(f"mmscale: error: {error}", file=sys.stderr, flush=True)
    return code


def _description(run: Run, first: Sequence[Counts]) -> str:
    """What follows from the configuration and the first batch.

    Args:
        run: the run.
        first: the micro-batches of this rank's first step.
    """
    shape, samples = run.trainee.model.config, max(1, sum(c.samples for c in first))
    backward = Backward.of(run.trainee.model)
    parameters = list(run.trainee.model.parameters())
    sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
    trained = sum(n for n, p in zip(sizes, parameters, strict=True) if p.requires_grad)
    derived = describe(
        run.config,
        run.plan,
        rows=len(run.dataset),
        parameters=sum(sizes),
        trained=trained,
        dtype=str(run.dtype).removeprefix("torch."),
        flops_per_sample=sum(flops.training_flops(shape, c, backward) for c in first) / samples,
    )
    memory = estimate(run.trainee, run.config, run.plan, run.dtype, run.world.device, first)
    sources = describe_sources(run.dataset, run.config.train.steps * run.plan.global_batch)
    return "\n".join([derived, *memory.lines(device_bytes(run.world.device)), *sources, *run.reports])


if __name__ == "__main__":
    sys.exit(main())
