"""Preflight of the hosts themselves: each is asked over pdsh what it is and has (`launcher.probe`), and the answers are compared.

Under SLURM the login node is not where the ranks run: there sbatch is asked whether it would take the job.
"""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.engines import programs, slurm
from launcher.plan import LaunchPlan
from launcher.probe import MARK, Report, look
from mmscale.errors import RunError
from mmscale.finding import Finding
from mmscale.nodes.judge import OPEN_FILES, SHM

PATIENCE_S = 60.0
SKEW_S = 2.0


def examine_hosts(plan: LaunchPlan, paths: Sequence[str]) -> list[Finding]:
    """Look at the hosts of a plan; this machine alone is looked at too.

    Args:
        plan: the launch.
        paths: what must be there on every host, absolute.
    """
    if plan.engine == "slurm":
        return list(_ask_sbatch(plan))
    mark = secrets.token_hex(8)
    made = not plan.run.exists()
    try:
        plan.run.mkdir(parents=True, exist_ok=True)
        (plan.run / MARK).write_text(mark, encoding="utf-8")
    except OSError:
        return []  # the run folder's own check says it
    try:
        begun = time.time()
        reports = {"localhost": look(plan.run, list(paths))} if plan.is_local else _ask(plan, paths)
        took_s = time.time() - begun
    except RunError as e:
        return [Finding(check="hosts", level="fail", what=str(e))]
    finally:
        (plan.run / MARK).unlink(missing_ok=True)
        if made:
            plan.run.rmdir()
    return list(compare(plan, look(plan.run, []), reports, mark, begun=begun, took_s=took_s))


def compare(
    plan: LaunchPlan, here: Report, reports: Mapping[str, Report | str], mark: str, *, begun: float, took_s: float
) -> Iterator[Finding]:
    """Compare the hosts' answers with this machine and among each other. Pure.

    Args:
        plan: the launch.
        here: this machine's own answer.
        reports: host -> its answer, or what it said instead of one.
        mark: what was written into the run folder.
        begun: when the hosts were asked, by this machine's clock.
        took_s: until the last of them had answered.
    """
    good = {host: report for host, report in reports.items() if isinstance(report, Report)}
    for host, said in reports.items():
        if isinstance(said, str):
            fix = f"Make `ssh {host} {shlex.quote(plan.python)} --version` work without a password, or leave it out: --exclude {host}"
            yield Finding(check="hosts", level="fail", what=f"{host} did not answer: {said}", fix=fix)
    for host, report in good.items():
        yield from _host(plan, here, host, report, mark)
        late = max(begun - report.time, report.time - begun - took_s, 0.0)
        if late > SKEW_S:
            what = f"the clock of {host} is {late:.0f} s off this machine's"
            yield Finding(check="clocks", level="warn", what=what, fix="Set it by NTP (chronyc makestep): logs and timeouts go by it.")
    if good and len(good) == len(reports):
        yield Finding(check="hosts", level="pass", what=f"{len(good)} answered: {', '.join(good)}")


def _host(plan: LaunchPlan, here: Report, host: str, report: Report, mark: str) -> Iterator[Finding]:
    slots = dict(plan.hosts).get(host, ())
    if report.devices is not None and slots and max(slots) >= report.devices:
        what = f"{host} has {report.devices} devices, the launch wants {max(slots) + 1}"
        yield Finding(check="devices", level="fail", what=what, fix="Correct its slots in the hostfile, or give --ranks-per-node.")
    if report.mark != mark:
        what = f"{host} does not see what this machine writes into {plan.run}"
        yield Finding(check="shared", level="fail", what=what, fix="Put `run` on a file system that all hosts share, under the same path.")
    elif not report.writable:
        yield Finding(check="shared", level="fail", what=f"{host} cannot write to {plan.run}", fix="Correct its permissions or its mount.")
    for path in report.missing:
        fix = "Copy it there, or put it on a file system that all hosts share, under the same path."
        yield Finding(check="paths", level="fail", what=f"{host} has no {path}", fix=fix)
    theirs = {"Python": report.python, **report.versions}
    ours = {"Python": here.python, **here.versions}
    for name, version in theirs.items():
        if version != ours[name]:
            what = f"{host} has {name} {version}, this machine {ours[name]}"
            yield Finding(check="versions", level="fail", what=what, fix="Install the same everywhere: constraints.txt holds the versions.")
    if report.code != here.code:
        what = f"{host} has other sources of mmscale (digest {report.code}) than this machine ({here.code})"
        fix = "Bring its checkout to the same commit, or install mmscale on a file system that all hosts share."
        yield Finding(check="code", level="fail", what=what, fix=fix)
    if report.open_files < OPEN_FILES:
        what = f"a process on {host} may open {report.open_files} files"
        yield Finding(check="limits", level="warn", what=what, fix="Raise it to 65536 (ulimit -n, /etc/security/limits.conf).")
    if report.shm < SHM:
        what = f"{host} has {report.shm / 2**20:.0f} MiB free in /dev/shm, which loader.workers and NCCL use"
        yield Finding(check="limits", level="warn", what=what, fix="Make it larger (a container: --shm-size=8g, --ipc=host).")


def _ask(plan: LaunchPlan, paths: Sequence[str]) -> dict[str, Report | str]:
    """Run the probe on every host at once."""
    exports = [f"export {name}={shlex.quote(value)};" for name, value in plan.environment]
    probe = shlex.join([plan.python, "-m", "launcher.probe", str(plan.run), *paths])
    hosts = [host for host, _ in plan.hosts]
    words = [programs.need_pdsh(), "-R", "ssh", "-f", "1024", "-t", "10", "-u", str(int(PATIENCE_S)), "-w", ",".join(hosts)]
    line = " ".join([f"cd {shlex.quote(str(plan.here))} &&", *exports, probe])
    done = subprocess.run([*words, line], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return read_answers(hosts, done.stdout, done.stderr)


def read_answers(hosts: Sequence[str], out: str, err: str) -> dict[str, Report | str]:
    """Part what pdsh prints, `HOST: LINE`, into the hosts' answers; one without an answer has its last complaint. Pure."""
    answers: dict[str, Report | str] = {}
    for host in hosts:
        lines = [line.removeprefix(f"{host}: ") for line in out.splitlines() if line.startswith(f"{host}: {{")]
        said = [line for line in err.splitlines() if host in line.replace(":", " ").split()]
        answers[host] = Report(**json.loads(lines[-1])) if lines else (said[-1] if said else "no answer")
    return answers


def _ask_sbatch(plan: LaunchPlan) -> Iterator[Finding]:
    """Whether SLURM would take the job: partition, account, qos, nodes, time limit, gres."""
    try:
        program = slurm.program(plan)
    except RunError as e:
        yield Finding(check="slurm", level="fail", what=str(e), fix="Run this on a host of the cluster.")
        return
    done = subprocess.run([program, "--test-only"], input=slurm.script(plan), capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split()).removeprefix("sbatch: ")
    if done.returncode != 0:
        yield Finding(check="slurm", level="fail", what=f"sbatch would refuse it: {said}", fix="Change `slurm` of the cluster file.")
    else:
        yield Finding(check="slurm", level="pass", what=said or "sbatch would take it")


def host_paths(plan: LaunchPlan, shards: Sequence[str | Path]) -> list[str]:
    """What every host must have: the working directory, the interpreter, the shards."""
    return [str(plan.here), plan.python, *(str((plan.here / path).resolve()) for path in shards)]
