"""The first process of a cluster's namespaces: makes hosts, starts SLURM and sshd on them, and stays until it is killed.

`python -m tests.cluster.inside HOSTS FOLDER`, below `unshare`. A host is a network namespace with an address and a host name; all share
the file system. What is to be known from outside is written to FOLDER/environment.json once everything is up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SLURM = """ClusterName=test
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile={work}/log/slurmctld.log
SlurmdLogFile={work}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=20
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
"""
PARTITIONS = """PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=120 State=UP
"""
SSH = """Host n*
  IdentityFile {work}/key/user
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def sh(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def on_host(number: int, *words: str) -> list[str]:
    """A command as it is run on a host. Not `ip netns exec`, which hides the control groups from slurmd."""
    script = f'hostname n{number}; exec "$@"'
    return ["nsenter", f"--net=/run/netns/n{number}", "unshare", "--uts", "bash", "-c", script, "on", *words]


def make_network(hosts: int, work: Path) -> None:
    """A bridge, and for every host a namespace with an address on it and a name."""
    sh("mount", "--make-rprivate", "/")
    sh("mount", "-t", "tmpfs", "none", "/run")
    for name in ("munge", "sshd", "netns", "lock"):
        Path("/run", name).mkdir()
    lines = ["127.0.0.1 localhost", "10.77.0.1 ctl", *(f"10.77.0.{10 + i} n{i}" for i in range(1, hosts + 1))]
    (work / "etc" / "hosts").write_text("\n".join(lines) + "\n")
    sh("mount", "--bind", str(work / "etc" / "hosts"), "/etc/hosts")
    (work / "etc" / "ssh_config").write_text(SSH.format(work=work))
    sh("mount", "--bind", str(work / "etc" / "ssh_config"), "/etc/ssh/ssh_config")
    sh("hostname", "ctl")
    script = ["link set lo up", "link add br0 type bridge", "addr add 10.77.0.1/24 dev br0", "link set br0 up"]
    for i in range(1, hosts + 1):
        script += [f"netns add n{i}", f"link add v{i} type veth peer name eth0 netns n{i}", f"link set v{i} master br0 up"]
        script += [f"-n n{i} addr add 10.77.0.{10 + i}/24 dev eth0", f"-n n{i} link set eth0 up", f"-n n{i} link set lo up"]
    for line in script:
        sh("ip", *line.split())


def start_slurm(hosts: int, work: Path) -> None:
    """munge, a controller, and a slurmd on every host."""
    key = work / "key" / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (work / "key").chmod(0o700)
    sh(
        "munged",
        "--force",
        "--num-threads=4",
        f"--key-file={key}",
        "--pid-file=/run/munge/munged.pid",
        f"--seed-file={work}/key/seed",
        f"--log-file={work}/log/munged.log",
    )
    nodes = "".join(f"NodeName=n{i} NodeAddr=10.77.0.{10 + i} CPUs=4 RealMemory=4000 State=UNKNOWN\n" for i in range(1, hosts + 1))
    (work / "etc" / "slurm.conf").write_text(SLURM.format(work=work) + nodes + PARTITIONS)
    (work / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    daemons = [["slurmctld", "-D"], *(on_host(i, "slurmd", "-D", "-N", f"n{i}") for i in range(1, hosts + 1))]
    for number, words in enumerate(daemons):
        (work / "spool" / f"n{number}").mkdir(exist_ok=True)
        with (work / "log" / f"daemon-{number}.out").open("wb") as out:
            subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL)


def start_ssh(hosts: int, work: Path) -> None:
    """sshd on every host, with one key for all."""
    for name in ("host", "user"):
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / "key" / name))
    options = ["StrictModes=no", "UsePAM=no", "PermitRootLogin=yes", f"AuthorizedKeysFile={work}/key/user.pub"]
    for i in range(1, hosts + 1):
        here = [*options, f"ListenAddress=10.77.0.{10 + i}", f"PidFile=/run/sshd.n{i}.pid"]
        sh(*on_host(i, "/usr/sbin/sshd", "-f", "/dev/null", "-h", str(work / "key" / "host"), *(word for o in here for word in ("-o", o))))


def main() -> None:
    """Bring everything up, say so, and collect the processes that end."""
    hosts, work = int(sys.argv[1]), Path(sys.argv[2])
    for name in ("state", "log", "spool", "etc", "key"):
        (work / name).mkdir()
    make_network(hosts, work)
    environment = {"SLURM_CONF": str(work / "etc" / "slurm.conf"), "PDSH_RCMD_TYPE": "ssh", "GLOO_SOCKET_IFNAME": "eth0"}
    os.environ |= environment
    start_slurm(hosts, work)
    start_ssh(hosts, work)
    deadline = time.monotonic() + 60
    while (
        subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%D %t"], capture_output=True, text=True, check=False).stdout != f"{hosts} idle\n"
    ):
        if time.monotonic() > deadline:
            sys.exit("SLURM did not come up: " + "".join(p.read_text() for p in (work / "log").glob("slurm*.log"))[-4000:])
        time.sleep(0.3)
    (work / "environment.tmp").write_text(json.dumps(environment))
    (work / "environment.tmp").rename(work / "environment.json")
    while True:
        os.wait()


if __name__ == "__main__":
    main()
