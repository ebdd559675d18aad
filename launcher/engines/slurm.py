"""A plan as a script for sbatch, which runs without this launcher, and the command that submits it."""

from __future__ import annotations

import shlex
import shutil
from importlib import resources
from pathlib import Path

from launcher.cluster import SlurmConfig
from launcher.plan import INHERITED, LaunchPlan
from mmscale.errors import RunError

TEMPLATE = "job.sbatch"


def command(plan: LaunchPlan) -> list[str]:
    """The command line, the name of the program first. Pure."""
    return ["sbatch", "--parsable", str(script_path(plan))]


def variables(plan: LaunchPlan) -> dict[str, str]:
    """None: the script holds the ranks' variables."""
    return {}


def files(plan: LaunchPlan) -> dict[Path, str]:
    """The script. Pure."""
    return {script_path(plan): script(plan)}


def script_path(plan: LaunchPlan) -> Path:
    """Where the script lies."""
    return plan.run / "job.sbatch"


def program(plan: LaunchPlan) -> str:
    """Path of sbatch.

    Raises:
        RunError: SLURM's client is not installed.
    """
    found = shutil.which("sbatch")
    if found is None:
        raise RunError(
            "There is no `sbatch` on this machine's PATH. Launch from a host of the cluster that has SLURM's client, or use --dry-run."
        )
    return found


def script(plan: LaunchPlan, finished: str = ":") -> str:
    """The sbatch script: what was decided goes into the template's marked places. Pure.

    Args:
        plan: the launch.
        finished: a shell command that is run once the last step is done.
    """
    slurm = plan.cluster.slurm
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in plan.environment)
    places = {
        "DIRECTIVES": "\n".join(f"#SBATCH {word}" for word in directives(plan)),
        "RUN": shlex.quote(str(plan.run)),
        "HERE": shlex.quote(str(plan.here)),
        "PYTHON": shlex.quote(plan.python),
        "COMMAND": shlex.join([plan.module, *plan.arguments]),
        "RESTARTS": str(slurm.restarts),
        "NODE_FAILURES": str(slurm.node_failures),
        "EXCLUDE": shlex.quote(slurm.exclude or ""),
        "CHECK_NODES": "yes" if plan.checks_nodes else "no",
        "CHECK_WORDS": shlex.join(plan.of_check().arguments),
        "RANKS_A_NODE": str(len(plan.hosts[0][1])),
        "INHERITED": " ".join(INHERITED),
        "FINISHED": finished,
        "EXPORTS": exports,
        "SETUP": "\n".join(plan.cluster.setup) or ":  # nothing",
        "SRUN_OPTIONS": "".join(f" {shlex.quote(option)}" for option in slurm.srun_options),
    }
    text = resources.files("launcher.engines").joinpath(TEMPLATE).read_text(encoding="utf-8")
    for name, value in places.items():
        text = text.replace(f"@{name}@", value)
    return text


def directives(plan: LaunchPlan) -> list[str]:
    """The options of sbatch, one a line of the script. Pure."""
    slurm = plan.cluster.slurm
    words = [f"--job-name={_quoted(plan.run.name)}", f"--nodes={plan.nodes}", f"--ntasks-per-node={len(plan.hosts[0][1])}"]
    words += _asked(slurm)
    words += [f"--time={slurm.time}", f"--signal=B:USR1@{slurm.signal_s}", "--requeue", "--open-mode=append"]
    return [*words, f"--output={_quoted(f'{plan.run}/job-%j.log')}", *slurm.options]


def alone(slurm: SlurmConfig, name: str, log: str) -> list[str]:
    """The options of a job of one task that is no run, such as writing shards. Pure."""
    words = [f"--job-name={name}", "--nodes=1", "--ntasks=1", *_asked(slurm), f"--time={slurm.time}", f"--output={_quoted(log)}"]
    return [*words, *slurm.options]


def _quoted(text: str) -> str:
    """As sbatch reads a directive: blanks need double quotes."""
    return f'"{text}"' if " " in text else text


def _asked(slurm: SlurmConfig) -> list[str]:
    asked = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "gres": slurm.gres,
        "constraint": slurm.constraint,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "exclude": slurm.exclude,
    }
    return [f"--{name}={value}" for name, value in asked.items() if value is not None]
