"""Run a plan's command to its end, whatever happens to it, and say truthfully how it ended.

What DeepSpeed's launcher does not do, and this does: an exit code of 0 counts only with a status.json that says `finished` for this very
launch; a signal reaches every rank at once; nothing that was started is left running.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from launcher import logs, processes
from launcher.engines import engine_of
from launcher.errors import LaunchError
from launcher.monitor import LaunchRecord, Status, read_launch, read_status, unfit, write_launch
from launcher.plan import INHERITED, LaunchPlan
from launcher.submit import already_a_job, queued_job
from launcher.watch import STOPPED, Rank, Watch, own_address
from mmscale.errors import NO_PROGRESS, RunError
from mmscale.finding import failed_nodes
from mmscale.nodes.limits import UNFIT
from mmscale.run_folder import RunFolder
from mmscale.signals import die_with_parent
from mmscale.watchdog import OVERRAN

POLL_S = 0.1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a plan's command ended."""

    code: int
    """Its own exit code."""
    watch: Watch
    lost: list[Rank]
    """The ranks whose host said nothing any more."""

    @property
    def lost_hosts(self) -> str:
        """Their hosts, for people."""
        return ", ".join(sorted({rank.host for rank in self.lost}))


@dataclass(slots=True)
class Received:
    """The signals that came, oldest first."""

    numbers: list[signal.Signals] = field(default_factory=list)
    forwarded: int = 0
    deadline: float = float("inf")
    """When the ranks' time to end is over, on the monotonic clock."""


def supervise(plan: LaunchPlan) -> int:
    """Start a plan, follow it, clean up after it; where it is to look at its nodes first, the same ranks do that before.

    Returns:
        The exit code: 0 finished, 85 checkpointed on request, 86 no progress, 128 + N ended by signal N.

    Raises:
        LaunchError: the run failed, or a node its check.
        RunError: it could not be started.
    """
    _refuse_second_launch(plan)
    engine_of(plan.engine).program(plan)
    with _listening() as received:
        RunFolder(plan.run).make()
        write_launch(plan.run, LaunchRecord.started(plan))
        if plan.checks_nodes:
            check = plan.of_check()
            ended = _carry_out(check, received)
            if ended.code != 0 or received.numbers:
                return _stop_before(plan, check, ended, received)
        return _verdict(plan, _carry_out(plan, received), received)


def _carry_out(plan: LaunchPlan, received: Received) -> Ended:
    """Run the plan's command to its end, and leave nothing of it."""
    engine = engine_of(plan.engine)
    program = engine.program(plan)
    plan.logs.mkdir(parents=True, exist_ok=True)
    for path, text in engine.files(plan).items():
        path.write_text(text, encoding="utf-8")
    command = [program, *engine.command(plan)[1:]]
    environment = {k: v for k, v in os.environ.items() if k not in INHERITED} | engine.variables(plan)
    processes.become_subreaper()
    watch = Watch(plan.logs, _own_address(plan), silence_s=plan.cluster.hosts.silence_s, grace_s=plan.grace_s)
    try:
        # a session of its own: the terminal's Ctrl-C comes to us alone, and we pass it on once
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,  # it would go on to start ranks that nobody watches
        )
        lost = _follow(plan, child, watch, received)
    finally:
        left = processes.kill_descendants()
        watch.close()
    if left:
        _say(f"{left} processes of the run were still there and were killed.")
    return Ended(child.returncode, watch, lost)


def _follow(plan: LaunchPlan, child: subprocess.Popen[bytes], watch: Watch, received: Received) -> list[Rank]:
    """Until the command has ended: copy the first rank's output, note which ranks end, pass signals on.

    Returns:
        The ranks whose host said nothing any more; then everything is ended at once.
    """
    follower = logs.Follower(sys.stdout.buffer)
    while child.poll() is None:
        watch.look(POLL_S)
        processes.reap(keep=child.pid)
        follower.copy([plan.rank_log(0)])
        if lost := watch.silent():
            for process in processes.descendants():
                processes.send(process, signal.SIGKILL)
            child.wait()
            return lost
        if watch.failed_s() > plan.grace_s:
            watch.send(signal.SIGKILL)  # a rank that is stopped, or hangs in a collective on another host, ends by nothing else
        _pass_on(plan, child, watch, received)
    watch.look(POLL_S)
    follower.copy([plan.rank_log(0)])
    return []


def _pass_on(plan: LaunchPlan, child: subprocess.Popen[bytes], watch: Watch, received: Received) -> None:
    """Give a new signal to the ranks; kill everything at a second request to stop, or when the time is over."""
    stops = [n for n in received.numbers if n not in (signal.SIGUSR1, signal.SIGUSR2)]
    if len(stops) > 1 or time.monotonic() > received.deadline:
        watch.send(signal.SIGKILL)
        for process in processes.descendants():
            processes.send(process, signal.SIGKILL)
        return
    for number in received.numbers[received.forwarded :]:
        received.forwarded += 1
        if watch.alive():
            watch.send(number)
        elif number in stops:
            for process in processes.descendants():  # deepspeed's handler tells the other hosts
                processes.send(process, signal.SIGTERM)
        if number in stops:
            received.deadline = time.monotonic() + plan.grace_s
            _say(f"{number.name} passed on to the ranks. They have {plan.grace_s:g} s to end; once more kills them at once.")


def _own_address(plan: LaunchPlan) -> str:
    """Where the ranks reach this process."""
    if plan.is_local:
        return "127.0.0.1"
    host = plan.hosts[0][0]
    try:
        return plan.cluster.hosts.launcher_address or own_address(host)
    except OSError as e:
        raise RunError(
            f"The first host, {host!r}, has no address here: {e}. Give the hostfile names that this machine knows, or set "
            "`hosts.launcher_address` of the cluster to an address of this machine that the hosts reach."
        ) from e


@contextmanager
def _listening() -> Iterator[Received]:
    """Collect signals instead of dying of them; one that is ignored (nohup) stays ignored."""
    received = Received()
    numbers = [n for n in FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    before = {n: signal.signal(n, lambda number, _: received.numbers.append(signal.Signals(number))) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_second_launch(plan: LaunchPlan) -> None:
    if (queued := queued_job(plan.run)) is not None:
        raise already_a_job(plan.run, *queued)
    launch = read_launch(plan.run)
    launcher = None if launch is None else launch.launcher()
    pids = sorted({p.pid for p in (*processes.processes_of_run(plan.run), *([launcher] if launcher else ()))} - {os.getpid()})
    if pids:
        raise RunError(
            f"The run {str(plan.run)!r} is already being trained on this machine, by the processes {', '.join(map(str, pids))}: two "
            f"launches would write over each other. Wait for it, or stop it with `mmscale runs stop {plan.run}`."
        )


def _verdict(plan: LaunchPlan, ended: Ended, received: Received) -> int:
    """How it ended, from the command's exit code and the run's own word."""
    code, status = ended.code, read_status(plan.run)
    mine = status if status is not None and status.launch_id == plan.launch_id else None
    number = received.numbers[0] if received.numbers else None
    if code in (STOPPED, NO_PROGRESS) or (mine is not None and mine.state in ("stopped", "stuck")):
        result = NO_PROGRESS if code == NO_PROGRESS or (mine is not None and mine.state == "stuck") else STOPPED
    elif code == 0 and mine is not None and mine.state == "finished":
        result = 0
    elif number is not None:
        result = 128 + number
    else:
        result = 1 if ended.lost else code % 256 or 1
    write_launch(plan.run, LaunchRecord.started(plan).ended(result))
    if result == NO_PROGRESS:
        _print_first_failure(plan, ended.watch)
    if result in (0, STOPPED, NO_PROGRESS):
        _say({0: "finished", STOPPED: "stopped on request, checkpoint committed", NO_PROGRESS: "no progress"}[result] + f": {plan.run}")
    elif number is not None:
        _say(f"ended by {number.name} {_where(mine)}. The same command goes on from its newest checkpoint.")
    else:
        _print_first_failure(plan, ended.watch)
        raise LaunchError(_explain(plan, ended, mine), exit_code=result)
    return result


def _stop_before(plan: LaunchPlan, check: LaunchPlan, ended: Ended, received: Received) -> int:
    """The check of the nodes did not pass, or a signal came meanwhile: the ranks are not started."""
    failed = unfit(plan.run, LaunchRecord.started(plan)) if ended.code else []
    number = received.numbers[0] if received.numbers else None
    result = 128 + number if number is not None else UNFIT if failed else ended.code % 256 or 1
    write_launch(plan.run, LaunchRecord.started(plan).ended(result))
    if number is not None:
        _say(f"ended by {number.name} before its ranks were started. The same command starts it.")
        return result
    advice = f"The output of every rank is in {check.logs}; --set checks.run=false does without the check."
    if not failed:  # it did not come so far as to say why
        _print_first_failure(check, ended.watch)
        raise LaunchError(
            f"The check of the nodes was broken off: {_how(check, ended)}. The run was not started. {advice}", exit_code=result
        )
    nodes = failed_nodes(failed)
    where = f" on {', '.join(nodes)}" if nodes else ""
    out = f", or leave {'it' if len(nodes) == 1 else 'them'} out: --exclude {'@'.join(nodes)}" if nodes and not plan.is_local else ""
    raise LaunchError(
        f"The check of the nodes failed{where}, and the run was not started. Mend what its table names{out}. "
        f"{RunFolder(plan.run).nodes} has the table. {advice}",
        exit_code=result,
    )


def _explain(plan: LaunchPlan, ended: Ended, mine: Status | None) -> str:
    code = ended.code
    advice = f"The output of every rank is in {plan.logs}. "
    again = "the same command goes on from the newest checkpoint, or starts where there is none"
    advice += f"Mend what it says; {again}." if mine is None else f"{again[0].upper()}{again[1:]}."
    if ended.lost:
        return (
            f"The run ended {_where(mine)} because nothing was heard of {ended.lost_hosts} for {plan.cluster.hosts.silence_s:g} s: "
            f"the host or its network is down. Mend it, or leave it out with --exclude. {advice}"
        )
    if code == 0:
        return (
            f"`{plan.engine}` ended with exit code 0, but the run did not finish: it ended {_where(mine)}. This is what "
            f"DeepSpeed's launcher does when one of its own processes is killed, by a signal or for want of memory. {advice}"
        )
    if code == OVERRAN:
        return (
            f"The run failed {_where(mine)}: a rank hung, or a section of it took longer than `watchdog` allows (exit code {OVERRAN}). "
            f"Where the threads stood is in {RunFolder(plan.run).stacks(0).parent}, a file a rank. {advice}"
        )
    return f"The run failed {_where(mine)}: {_how(plan, ended)}. {advice}"


def _how(plan: LaunchPlan, ended: Ended) -> str:
    code = ended.code
    if ended.lost:
        return f"nothing was heard of {ended.lost_hosts}"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    killed = f", which is how it reports a rank that {signal.Signals(256 - code).name} ended" if 256 - code in (6, 7, 9, 11, 14, 15) else ""
    return f"`{plan.engine}` {how}{killed}"


def _where(mine: Status | None) -> str:
    if mine is None:
        return "before its first step (its status.json tells nothing of this launch)"
    return f"at step {mine.step if mine.step is not None else '?'} of {mine.steps} (its status.json says {mine.state!r})"


def _print_first_failure(plan: LaunchPlan, watch: Watch) -> None:
    rank = logs.first_failure(watch.ended(), {rank: plan.rank_log(rank) for rank in range(plan.ranks)})
    if rank is None:
        return
    host = f" on {watch.ranks[rank].host}" if rank in watch.ranks and not plan.is_local else ""
    _say(f"rank {rank}{host} ended first; its last lines:")
    for line in logs.last_words(plan.rank_log(rank)):
        print(f"  [rank {rank}] {line}", file=sys.stderr)


def _say(text: str) -> None:
    print(f"mmscale launch: {text}", file=sys.stderr, flush=True)
