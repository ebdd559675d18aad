"""Run a pipeline: on this machine stage after stage, or on SLURM as jobs that wait for each other.

A stage is done when its command has ended with 0; FOLDER/done/NAME then holds the command. A command that has changed since is run again,
and so is all that comes after it. FOLDER/begun/NAME holds the commands that a stage was begun with, its own and those of all that it comes
after: a run that was begun with others is moved out of the way, as it would go on, or have nothing left to do, with what they have made.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher import start, submit
from launcher.cluster import load_cluster
from launcher.engines import slurm
from launcher.engines.programs import find_program
from launcher.errors import LaunchError
from launcher.monitor import LaunchRecord, summarize, write_launch
from launcher.pipeline import Stage
from launcher.plan import LaunchPlan, LaunchRequest
from launcher.processes import processes_of_run
from mmscale.errors import RunError
from mmscale.run_folder import RunFolder, replace_file
from shards import configfile

WHERE = ("--ranks-per-node", "--nodes", "--cluster", "--hostfile", "--engine", "--set")
"""Options of `launch` with a value that change nothing of what is learned."""
HOW = ("train.steps=", "train.micro_batch=", "log.", "loader.", "checkpoint.", "watchdog.", "audit.", "store.")
"""Words of a stage that do not."""


def pending(folder: Path, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that are not done: never, with another command, or before one that they come after."""
    left: list[Stage] = []
    for stage in stages:
        mark = folder / "done" / stage.name
        is_done = mark.is_file() and mark.read_text(encoding="utf-8") == command_of(stage)
        if not is_done or {other.name for other in left} & set(stage.after):
            left.append(stage)
    return left


def command_of(stage: Stage) -> str:
    """A stage's command as one line, as its mark holds it."""
    return shlex.join(["mmscale", *stage.words]) + "\n"


def _left(folder: Path, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that are not done, without the marks that they had: whatever happens from here on, none counts as done."""
    left = pending(folder, stages)
    for name in ("done", "begun"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stage in left:
        (folder / "done" / stage.name).unlink(missing_ok=True)
    return left


def _begin(folder: Path, stage: Stage, stages: Sequence[Stage]) -> None:
    """Note what a stage is begun with; a run that was begun with something else makes room for another one, and is kept."""
    mark, lineage = folder / "begun" / stage.name, _lineage(stage, stages)
    before, run = _begun_with(folder, stage, stages), _run_of(stage)
    shared = any(_run_of(other) == run for other in stages if other.name in lineage and other.name != stage.name)
    if run is not None and run.is_dir() and not shared and not _goes_on(before, lineage, stage.name):
        if pids := [str(process.pid) for process in processes_of_run(run.resolve())]:
            raise RunError(
                f"The stage {stage.name!r} is to be begun anew, and its run {str(run)!r} is still being trained on this machine, by the "
                f"processes {', '.join(pids)}. Wait for it, or stop it with `mmscale runs stop {run}`."
            )
        aside = next(path for n in itertools.count(1) if not (path := run.with_name(f"{run.name}.before-{n}")).exists())
        run.rename(aside)
        print(f"== {stage.name}: the run of other commands was moved to {aside}", flush=True)
    replace_file(mark, json.dumps(lineage, indent=1) + "\n")


def _begun_with(folder: Path, stage: Stage, stages: Sequence[Stage]) -> dict[str, list[str]]:
    """What a stage was begun with last; where it was not, or nothing is known of it, what it would be begun with now."""
    mark = folder / "begun" / stage.name
    found: dict[str, list[str]] = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else _lineage(stage, stages)
    return found


def _lineage(stage: Stage, stages: Sequence[Stage]) -> dict[str, list[str]]:
    """The words of a stage and of all that it comes after, by name."""
    by_name, found, waiting = {other.name: other for other in stages}, dict[str, list[str]](), [stage.name]
    while waiting:
        name = waiting.pop()
        found[name] = list(by_name[name].words)
        waiting += [other for other in by_name[name].after if other not in found]
    return found


def _goes_on(before: Mapping[str, list[str]], now: Mapping[str, list[str]], name: str) -> bool:
    """Whether a run is the same, or the same for more or fewer steps, on other ranks, or with other logs and checkpoints."""
    others = {key: words for key, words in before.items() if key != name}
    same = others == {key: words for key, words in now.items() if key != name}
    return same and _what_is_learned(before.get(name, [])) == _what_is_learned(now[name])


def _what_is_learned(words: Sequence[str]) -> list[str]:
    kept = [word for word, before in zip(words, ["", *words], strict=False) if before not in WHERE and not word.startswith(HOW)]
    return sorted(word for word in kept if word not in WHERE)


def _run_of(stage: Stage) -> Path | None:
    """The run folder of a launch, as its words or else its stage file name it."""
    if stage.words[0] != "launch":
        return None
    given = [word.removeprefix("run=") for word in stage.words if word.startswith("run=")]
    alone = [word for word, before in itertools.pairwise(reversed(stage.words)) if not before.startswith("--") or "=" in before]
    files = [word for word in reversed(alone) if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    named = given[-1] if given else configfile.read_yaml(Path(files[0])).get("run") if files else None
    return None if named is None else Path(str(named))


def run_here(folder: Path, stages: Sequence[Stage]) -> int:
    """Run what is not done, in order; stages that do not need one that failed are run all the same.

    Returns:
        0, or the exit code of the first stage that failed.
    """
    from launcher.demo import wait_for

    failed: dict[str, int] = {}
    left = _left(folder, stages)
    for stage in stages:
        if stage not in left:
            print(f"== {stage.name}: done before", flush=True)
        elif set(stage.after) & failed.keys():
            failed[stage.name] = 1
            print(f"== {stage.name}: left out, as what it needs has failed", flush=True)
        else:
            _begin(folder, stage, stages)
            print(f"== {stage.name}: {command_of(stage)}", end="", flush=True)
            code = wait_for(subprocess.Popen([find_program("mmscale"), *stage.words], start_new_session=True))
            if code == 0:
                replace_file(folder / "done" / stage.name, command_of(stage))
            else:
                failed[stage.name] = code
    print(table(folder, stages))
    return next(iter(failed.values()), 0)


def run_on_slurm(folder: Path, stages: Sequence[Stage], cluster: str, words: Sequence[str]) -> int:
    """Submit what is not done as jobs with `afterok` dependencies; a stage whose job is in the queue already is left there.

    A `launch` becomes the job that it would be by itself; any other command a job of one task on one node.

    Raises:
        RunError: sbatch refuses a job.
    """
    for stage in pending(folder, stages):
        if (job := _queued_job(folder, stage)) is not None and _begun_with(folder, stage, stages) != _lineage(stage, stages):
            raise RunError(
                f"The stage {stage.name!r} is job {job}, which was begun with what has changed since. Take it out of the queue (scancel "
                f"{job}) and run the pipeline again."
            )
    left = _left(folder, stages)
    (folder / "jobs").mkdir(exist_ok=True)
    for stage in left:
        record = folder / "jobs" / f"{stage.name}.json"
        if (queued_as := _queued_job(folder, stage)) is not None:
            print(f"{stage.name}: is job {queued_as} already")
            continue
        jobs = [_job(folder, name) for name in stage.after if name in {other.name for other in left}]
        script = folder / "jobs" / f"{stage.name}.sbatch"
        plan = start.plan_here(_request(stage, cluster, words)) if stage.words[0] == "launch" else None
        queued = None if plan is None else submit.queued_job(plan.run)
        if plan is not None and queued is not None:
            raise submit.already_a_job(plan.run, *queued)
        _begin(folder, stage, stages)
        if plan is not None:
            RunFolder(plan.run).make()
        script.write_text(_script(folder, stage, plan, cluster, words), encoding="utf-8")
        options = [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"] if jobs else []
        done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RunError(f"sbatch refuses {script}: {' '.join(done.stderr.split())}")
        job = done.stdout.strip().split(";")[0]
        replace_file(record, json.dumps({"job": job, "command": command_of(stage)}) + "\n")
        if plan is not None:
            write_launch(plan.run, LaunchRecord.started(plan, job=job))
        print(f"{stage.name}: job {_job(folder, stage.name)}{' after ' + ', '.join(jobs) if jobs else ''}")
    return 0


def _queued_job(folder: Path, stage: Stage) -> str | None:
    """The job of a stage's command, where it is in the queue.

    Raises:
        RunError: it is just ending: what comes after it must not wait for a job that has failed.
    """
    record = folder / "jobs" / f"{stage.name}.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    state = submit.job_state(before["job"]) if before.get("command") == command_of(stage) else None
    if state == "COMPLETING":
        raise RunError(f"The job {before['job']} of the stage {stage.name!r} is just ending. Run the pipeline again in a moment.")
    return None if state is None else str(before["job"])


def _job(folder: Path, name: str) -> str:
    return str(json.loads((folder / "jobs" / f"{name}.json").read_text(encoding="utf-8"))["job"])


def _script(folder: Path, stage: Stage, plan: LaunchPlan | None, cluster: str, words: Sequence[str]) -> str:
    """The sbatch script of a stage, which has a plan where it is a launch; its last act is the mark that it is done."""
    mark = (folder / "done" / stage.name).resolve()
    finished = f"printf %s {shlex.quote(command_of(stage))} >{shlex.quote(str(mark))}"
    if plan is not None:
        return slurm.script(plan, finished=finished)
    where, log = load_cluster(cluster, [*words]), (folder / "jobs" / f"{stage.name}-%j.log").resolve()
    lines = ["#!/usr/bin/env bash", f"# {stage.name}: a stage of a pipeline"]
    lines += [f"#SBATCH {word}" for word in slurm.alone(where.slurm, stage.name, str(log))]
    lines += [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *where.setup]
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in where.environment.items()]
    return "\n".join(
        [*lines, shlex.join([find_program("mmscale"), *stage.words]), "code=$?", f"[ $code = 0 ] && {finished}", "exit $code", ""]
    )


def _request(stage: Stage, cluster: str, words: Sequence[str]) -> LaunchRequest:
    """What a `launch` stage asks for on SLURM: its configuration and words; the number of ranks is the cluster's or its own option."""
    given, rest = list(words), list(stage.words[1:])
    for option, key in (("--ranks-per-node", "ranks_per_node"), ("--nodes", "nodes")):
        if option in rest:
            place = rest.index(option)
            given.append(f"{key}={rest[place + 1]}")
            del rest[place : place + 2]
    module = "mmscale.train"
    if "--module" in rest:
        place = rest.index("--module")
        module = rest[place + 1]
        del rest[place : place + 2]
    if strange := [word for word in rest if word.startswith("--")]:
        raise LaunchError(
            f"The stage {stage.name!r} gives {', '.join(strange)} to launch, which a pipeline on SLURM has no use for.", exit_code=2
        )
    return start.request(rest, cluster, [*given, "engine=slurm"], module=module)


def table(folder: Path, stages: Sequence[Stage]) -> str:
    """A line a stage: whether it is done, how far its run is, what its evaluation found."""
    left = {stage.name for stage in pending(folder, stages)}
    width = max(len(stage.name) for stage in stages)
    return "\n".join(f"{stage.name:<{width}}  {'-' if stage.name in left else 'done':<5} {_result(stage)}".rstrip() for stage in stages)


def _result(stage: Stage) -> str:
    given = dict(word.split("=", 1) for word in stage.words if "=" in word and not word.startswith("-"))
    report = Path(given.get("out", "")) / "report.json"
    if stage.words[0] == "evaluate" and report.is_file():
        metrics = json.loads(report.read_text(encoding="utf-8"))["metrics"]
        return "  ".join(f"{name} {'null' if value is None else f'{value:.4g}'}" for name, value in metrics.items())
    folder = _run_of(stage)
    if folder is not None and folder.is_dir():
        try:
            run = summarize(folder)
        except RunError:
            return ""
        loss = run.metrics.get("loss")
        return f"{run.state}, step {run.step} of {run.steps}" + ("" if loss is None else f", loss {loss:.4f}")
    return ""
