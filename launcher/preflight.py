"""What would fail or not fit, said before anything is queued: `mmscale preflight CONFIG`. Every finding names its fix.

A check is a function that yields findings; it looks, it changes nothing (but for marks that it takes away again).
torch is loaded for the model's shape alone (`launcher.estimate`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.estimate import VOCABULARY, Estimate, estimate, known_vocabulary
from launcher.machine import Machine
from launcher.monitor import read_launch
from launcher.places import lacking_tokenizer
from launcher.plan import LaunchPlan
from launcher.processes import processes_of_run
from mmscale.arithmetic import plan_batch
from mmscale.checkpoint.find import committed, start_of
from mmscale.checkpoint.retention import kept
from mmscale.checkpoint.state import read_state
from mmscale.config import RunConfig
from mmscale.data_config import missing_tokenizer, training_places
from mmscale.finding import Finding
from shards.errors import MmscaleError, ShardError
from shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from shards.store.place import is_url

GIB = 2**30
READ_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is looked at."""

    config: RunConfig
    plan: LaunchPlan
    machine: Machine
    estimate: Estimate


def examine(config: RunConfig, plan: LaunchPlan, machine: Machine) -> list[Finding]:
    """Run every check that this machine can make; those of the hosts are in `launcher.preflight_hosts`."""
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and machine.accelerator == "cuda")
    needs = estimate(config, plan.ranks, bf16=bf16, vocabulary=known_vocabulary(config) or VOCABULARY)
    subject = Subject(config=config, plan=plan, machine=machine, estimate=needs)
    return [finding for check in CHECKS for finding in _guarded(check, subject)]


def _guarded(check: Callable[[Subject], Iterator[Finding]], subject: Subject) -> list[Finding]:
    """A check that meets an error of ours has found something, besides what it has found before."""
    found: list[Finding] = []
    try:
        found.extend(check(subject))
    except (MmscaleError, OSError) as e:
        found.append(Finding(check=check.__name__, level="fail", what=str(e)))
    return found


def batch(subject: Subject) -> Iterator[Finding]:
    """The arithmetic of the global batch; that it divides was checked when the launch was planned."""
    plan = plan_batch(subject.config, subject.plan.ranks)
    what = f"{plan.global_batch} samples a step = {plan.ranks} ranks x {plan.micro_batch} x {plan.accumulation}"
    yield Finding(check="batch", level="pass", what=what)


def run_folder(subject: Subject) -> Iterator[Finding]:
    """The run folder can be made and written to, and nobody is writing to it."""
    run = subject.plan.run
    above = next(path for path in (run, *run.parents) if path.exists())
    fix = "Give `run` a folder that you may write to, on a file system that all nodes share."
    if not above.is_dir():
        yield Finding(check="run_folder", level="fail", what=f"{above} is a file, so there can be no folder {run}.", fix=fix)
    elif not os.access(above, os.W_OK | os.X_OK) or os.statvfs(above).f_flag & os.ST_RDONLY:
        yield Finding(check="run_folder", level="fail", what=f"{above} cannot be written to.", fix=fix)
    else:
        yield Finding(check="run_folder", level="pass", what=f"{run} can be written to")


def other_launch(subject: Subject) -> Iterator[Finding]:
    """No other launch of this run is under way."""
    run = subject.plan.run
    pids = [str(process.pid) for process in processes_of_run(run)]
    launch = read_launch(run)
    stop = f"Wait for it, or stop it: mmscale runs stop {run}"
    if pids:
        yield Finding(check="other_launch", level="fail", what=f"the run is being trained by the processes {', '.join(pids)}", fix=stop)
    elif launch is not None and launch.job is not None:
        from launcher.submit import job_state

        state = job_state(launch.job)
        if state is not None:
            what = f"the run is SLURM's job {launch.job}, which is {state.lower()}"
            yield Finding(check="other_launch", level="fail", what=what, fix=stop)


def resume(subject: Subject) -> Iterator[Finding]:
    """A checkpoint that the run would go on from fits this configuration and these ranks."""
    found = committed(subject.plan.run / "checkpoints")
    if not found:
        return
    state, config = read_state(found[-1]), subject.config
    again = f"Restore it, or use another `run` folder with init_from={subject.plan.run}."
    if state.global_batch != config.train.global_batch:
        what = f"{found[-1].name} has global batch {state.global_batch}, the configuration {config.train.global_batch}"
        yield Finding(check="resume", level="fail", what=what, fix=again)
    now = {"ranks": subject.plan.ranks, "zero.stage": config.zero.stage}
    changed = [f"{name} {state.topology[name]} -> {value}" for name, value in now.items() if state.topology.get(name, value) != value]
    how = f"; {', '.join(changed)}: losses go on to rounding" if changed else ""
    if state.step >= config.train.steps:
        what = f"{found[-1].name} is at train.steps = {config.train.steps} already: nothing would be trained"
        yield Finding(check="resume", level="warn", what=what, fix="Raise train.steps, or use another `run` folder.")
    else:
        yield Finding(check="resume", level="pass", what=f"goes on from step {state.step} of {config.train.steps}{how}")


def copies(subject: Subject) -> Iterator[Finding]:
    """Where checkpoints are to be copied, objects can be written, listed and deleted."""
    url = subject.config.checkpoint.copy_to
    if url is None:
        return
    from shards.store.bucket import Bucket

    bucket = Bucket(url, subject.config.store)
    bucket.put("preflight", b"")
    is_listed = "preflight" in bucket.sizes()
    bucket.delete(["preflight"])
    if is_listed:
        yield Finding(check="copies", level="pass", what=f"{bucket.root} can be written, listed and deleted from")
    else:
        what = f"what is written to {bucket.root} is not listed there"
        yield Finding(check="copies", level="fail", what=what, fix="Give `checkpoint.copy_to` an object store that lists what it holds.")


def checkpoints(subject: Subject) -> Iterator[Finding]:
    """Checkpoints are made now and then, and there is room for those that are kept and the one being written."""
    config, run = subject.config.checkpoint, subject.plan.run
    steps = subject.config.train.steps
    if config.every == 0 or config.every > steps:
        what = f"checkpoint.every = {config.every} with {steps} steps: a kill costs the whole run"
        yield Finding(check="checkpoints", level="warn", what=what, fix="Set checkpoint.every to a tenth of the steps or less.")
    above = next(path for path in (run, *run.parents) if path.is_dir())
    found, disk = len(committed(run / "checkpoints")), os.statvfs(above)
    saves = {*range(config.every, steps + 1, config.every), steps} if config.every else {steps}
    most = len(kept(saves, (), config, {})) + (config.keep > 0 and config.best is not None)
    to_come = max(1, most + 1 - found)
    needed, free = to_come * subject.estimate.checkpoint_bytes, disk.f_bavail * disk.f_frsize
    size = f"{to_come} checkpoints of about {subject.estimate.checkpoint_bytes / GIB:.2f} GiB are to come, "
    size += f"{free / GIB:,.1f} GiB are free" if disk.f_blocks else f"{above} does not tell what is free"
    if not disk.f_blocks:
        yield Finding(check="disk", level="pass", what=size)
    elif needed > free:
        fix = "Lower checkpoint.keep (0 keeps all), raise a checkpoint.keep_every, free space, or put `run` on another file system."
        yield Finding(check="disk", level="fail", what=f"{size} at {above}", fix=fix)
    else:
        yield Finding(
            check="disk", level="warn" if 1.2 * needed > free else "pass", what=size, fix="Free some space." * (1.2 * needed > free)
        )
    files = to_come * (20 + 3 * subject.plan.ranks) + 10 * subject.plan.ranks
    if disk.f_files and files > disk.f_favail:
        fix = "Delete files there (old runs), or put `run` on another file system."
        yield Finding(
            check="inodes", level="fail", what=f"about {files} files are to come, {disk.f_favail} can be made at {above}", fix=fix
        )
    else:
        yield Finding(check="inodes", level="pass", what=f"about {files} files are to come")


def data(subject: Subject) -> Iterator[Finding]:
    """Every shard is there in its size, there are enough for the ranks, and a tokenizer."""
    for place in training_places(subject.config.data):
        yield from _data_set("shards", place, subject)
    if (tokenizer := lacking_tokenizer(subject.config)) is not None:
        what, _, fix = missing_tokenizer(subject.config.data, tokenizer).partition(". ")
        yield Finding(check="tokenizer", level="fail", what=what, fix=fix)
    if subject.config.evaluate.every:
        if subject.config.evaluate.shards is None:
            fix = "Set evaluate.shards to a data set of its own, or evaluate.every=0."
            yield Finding(check="evaluate", level="fail", what="evaluate.every is set and evaluate.shards is not", fix=fix)
        else:
            yield from _data_set("evaluate", subject.config.evaluate.shards, None)


def _data_set(check: str, place: str, subject: Subject | None) -> Iterator[Finding]:
    if is_url(place):
        yield Finding(check=check, level="pass", what=f"{place} lies behind a URL and is not looked at from here")
        return
    folder = Path(place)
    if not (folder / MANIFEST_NAME).is_file():
        what = f"{place} has no {MANIFEST_NAME}" if folder.is_dir() else f"there is no folder {place}"
        fix = f"Index it (mmscale shards index {place})." if folder.is_dir() else "Give `data.shards` the folder of a written data set."
        yield Finding(check=check, level="fail", what=what, fix=fix)
        return
    repair = f"mmscale shards verify {place} --full --repair --from COPY"
    try:
        manifest = read_manifest(folder)
    except ShardError as e:
        yield Finding(check=check, level="fail", what=str(e), fix=repair)
        return
    if faults := _faulty(manifest):
        what = f"{len(faults)} of {len(manifest.shards)} shards of {place} are missing or of another size: {', '.join(faults[:3])}"
        yield Finding(check=check, level="fail", what=what, fix=repair)
    else:
        yield Finding(check=check, level="pass", what=f"{place}: {len(manifest.shards)} shards, {manifest.rows:,} samples")
    if subject is not None:
        yield from _enough(place, manifest, subject)
        yield from read_rate(place, manifest, subject)


def _faulty(manifest: Manifest) -> list[str]:
    faults = []
    for info in manifest.shards:
        tar = info.tar(manifest.folder)
        if not tar.is_file() or tar.stat().st_size != info.bytes:
            faults.append(info.shard)
    return faults


def _enough(place: str, manifest: Manifest, subject: Subject) -> Iterator[Finding]:
    shards, ranks, batch = len(manifest.shards), subject.plan.ranks, subject.config.train.global_batch
    if manifest.rows < batch:
        what = f"{place} has {manifest.rows} samples, fewer than one step's {batch}: a step would hold samples twice"
        yield Finding(check="samples", level="warn", what=what, fix="Lower train.global_batch, or write more samples.")
    if shards < subject.plan.nodes:
        what = f"{place} has {shards} shards for {subject.plan.nodes} nodes ({ranks} ranks): every node reads every shard"
        yield Finding(check="samples", level="warn", what=what, fix="Write smaller shards (rows_per_shard) than one a node.")


def read_rate(place: str, manifest: Manifest, subject: Subject) -> Iterator[Finding]:
    """Storage delivers what the steps took when the run was last measured; without that, what it would feed."""
    tar = max(manifest.shards[: min(64, len(manifest.shards))], key=lambda info: info.bytes).tar(manifest.folder)
    if not tar.is_file():
        return
    rate = _read(tar)
    a_sample = max(1.0, manifest.bytes / max(1, manifest.rows))
    what = f"{rate / 2**20:,.0f} MiB/s from {tar.name} feed {rate / a_sample:,.0f} samples/s"
    from launcher.monitor import last_metrics

    measured = (last_metrics(subject.plan.run) or {}).get("samples_per_s")
    if measured is not None and rate / a_sample < measured:
        fix = "Move the shards to faster storage, or set store.cache to a local disk."
        yield Finding(check="read_rate", level="warn", what=f"{what}, and the run has taken {measured:,.0f}", fix=fix)
    else:
        yield Finding(check="read_rate", level="pass", what=what)


def _read(tar: Path) -> float:
    """Bytes a second of a cold read, at most a second long."""
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        start, count = time.perf_counter(), 0
        while count < READ_BYTES and time.perf_counter() - start < 1 and (content := os.read(descriptor, 1 << 20)):
            count += len(content)
        return count / max(1e-6, time.perf_counter() - start)
    finally:
        os.close(descriptor)


def start_weights(subject: Subject) -> Iterator[Finding]:
    """What the run starts from is there and whole by name."""
    config = subject.config
    if config.init_from is not None:
        start_of(config.init_from)
        yield Finding(check="start_weights", level="pass", what=f"init_from {config.init_from}")
    for key in ("init_text_from", "init_image_from"):
        folder = getattr(config.model, key)
        if folder is not None and not Path(folder).is_dir():
            fix = "Give the path of a transformers folder that is on every node; nothing is downloaded in a run."
            yield Finding(check="start_weights", level="fail", what=f"model.{key}: there is no folder {folder}", fix=fix)


def memory(subject: Subject) -> Iterator[Finding]:
    """Weights, gradients and optimizer fit into the memory of this machine, where ranks run on it without an accelerator.

    A CUDA device's memory is not known without its driver; the run compares its own, finer estimate with it before step 0.
    """
    state, ranks = subject.estimate.state_bytes, len(subject.plan.hosts[0][1])
    what = f"about {subject.estimate.parameters / 1e6:,.1f} M parameters, {state / GIB:.2f} GiB of model state a rank"
    if subject.plan.is_local and subject.machine.accelerator == "cpu":
        import psutil

        available = psutil.virtual_memory().available
        if state * ranks > available:
            fix = "Raise zero.stage, make the model smaller, or use more hosts."
            what = f"{what}: {ranks} ranks need more than the {available / GIB:.1f} GiB that are available here"
            yield Finding(check="memory", level="fail", what=what, fix=fix)
            return
    yield Finding(check="memory", level="pass", what=what)


def port(subject: Subject) -> Iterator[Finding]:
    """The rendezvous port is free on this machine, where the ranks meet on it."""
    if not subject.plan.is_local:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", subject.plan.master_port))
        except OSError as e:
            fix = "Leave --master-port away, or give a free one."
            yield Finding(check="port", level="fail", what=f"port {subject.plan.master_port} cannot be used: {e.strerror}", fix=fix)
        else:
            yield Finding(check="port", level="pass", what=f"port {subject.plan.master_port} is free")


CHECKS = (batch, run_folder, other_launch, resume, checkpoints, copies, data, start_weights, memory, port)
