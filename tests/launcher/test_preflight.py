"""Preflight finds planted faults and names the fix, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import ClusterConfig, HostsConfig
from launcher.machine import Machine
from launcher.plan import Launcher, LaunchPlan, LaunchRequest, make_plan
from launcher.preflight_command import find
from launcher.preflight_hosts import compare, read_answers
from launcher.probe import MARK, Report, look
from mmscale.checkpoint.find import name_of
from mmscale.checkpoint.manifest import NAME
from mmscale.checkpoint.state import RunState, write_state
from mmscale.config import load_run_config
from mmscale.finding import Finding, render
from tests.launcher.launching import REPO
from tests.shards.bucket import ENVIRONMENT, s3_server, upload
from tests.shards.tars import make_data_set

HERE = Report(
    host="here",
    time=1000.0,
    python="3.11.7",
    versions={"torch": "2.13", "deepspeed": "0.19.8"},
    code="0123",
    devices=8,
    cores=64,
    memory=2**38,
    shm=2**33,
    open_files=65536,
    mark="m",
    writable=True,
    missing=[],
)


@dataclass
class Site:
    """A healthy set-up that a test breaks."""

    folder: Path
    words: list[str] = field(default_factory=list)
    port: int | None = None
    held: ExitStack = field(default_factory=ExitStack)
    """What a fault needs while it is looked for."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def findings(self) -> list[Finding]:
        stage = self.folder / "stage.yaml"
        stage.write_text(
            f"run: {self.run}\ndata: {{shards: {self.shards}}}\nobjectives: {{contrastive: {{weight: 1.0}}}}\n"
            "train: {steps: 100, global_batch: 4, precision: fp32}\ncheckpoint: {every: 10}\n"
        )
        return find(LaunchRequest(arguments=(str(stage), *self.words), cluster=ClusterConfig(ranks_per_node=2)), self.port)

    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings() if finding.level != "pass"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_data_set(tmp_path / "shards")
    (tmp_path / "shards" / "tokenizer").mkdir()
    site = Site(tmp_path)
    with site.held:
        yield site


def write_checkpoint(site: Site, **values: Any) -> None:
    state: dict[str, Any] = {"step": 20, "samples_seen": 80, "quarantined": 0, "data": "", "order": "", "tokenizer": "", "model": {}}
    state |= {"skipped": 0, "skipped_in_a_row": 0}
    state |= {"global_batch": 4, "topology": {"ranks": 2, "zero.stage": 1}, "objectives": {}, "config": {}, "versions": {}}
    folder = site.run / "checkpoints" / name_of(20)
    folder.mkdir(parents=True)
    write_state(folder, RunState(**(state | values)))
    (folder / NAME).touch()


def no_shards(site: Site) -> None:
    shutil.rmtree(site.shards)


def no_manifest(site: Site) -> None:
    (site.shards / "manifest.parquet").unlink()


def lost_shard(site: Site) -> None:
    next(site.shards.glob("*.tar")).unlink()


def cut_shard(site: Site) -> None:
    os.truncate(next(site.shards.glob("*.tar")), 1000)


def damaged_manifest(site: Site) -> None:
    os.truncate(site.shards / "manifest.parquet", 100)


def no_tokenizer(site: Site) -> None:
    (site.shards / "tokenizer").rmdir()


def run_below_a_file(site: Site) -> None:
    (site.folder / "run").write_text("")


def other_batch(site: Site) -> None:
    write_checkpoint(site, global_batch=8)


def nothing_to_do(site: Site) -> None:
    write_checkpoint(site, step=100)


def running(site: Site) -> None:
    process = site.held.enter_context(subprocess.Popen(["sleep", "60"], env=os.environ | {"MMSCALE_RUN": str(site.run)}))
    site.held.callback(process.kill)


def taken_port(site: Site) -> None:
    site.port = site.held.enter_context(socket.create_server(("", 0))).getsockname()[1]


def slow_storage(site: Site) -> None:
    site.run.mkdir()
    (site.run / "metrics.jsonl").write_text(json.dumps({"step": 1, "samples_per_s": 1e12}) + "\n")


def damaged_status(site: Site) -> None:
    site.run.mkdir()
    (site.run / "launch.json").write_text("{")


def words(*given: str) -> Callable[[Site], None]:
    def fault(site: Site) -> None:
        site.words = list(given)

    return fault


HUGE = ("model.hidden_size=65536", "model.unimodal_layers=100", "model.num_heads=256")


@pytest.mark.parametrize(
    ("fault", "check", "level", "what", "fix"),
    [
        (no_shards, "shards", "fail", "there is no folder", "Give `data.shards` the folder"),
        (damaged_manifest, "shards", "fail", "manifest.parquet", "verify .* --repair"),
        (no_manifest, "shards", "fail", "has no manifest.parquet", "mmscale shards index"),
        (lost_shard, "shards", "fail", "is in the manifest but not in the folder", "verify .* --repair"),
        (cut_shard, "shards", "fail", "1 of 3 shards of .* are missing or of another size: s-00", "verify .* --repair"),
        (
            no_tokenizer,
            "tokenizer",
            "fail",
            "There is no tokenizer folder .*tokenizer",
            r"^Repeat the `mmscale shards write` command .* `data\.tokenizer`",
        ),
        (run_below_a_file, "run_folder", "fail", "is a file", "Give `run` a folder"),
        (other_batch, "resume", "fail", "has global batch 8, the configuration 4", "Restore it"),
        (nothing_to_do, "resume", "warn", "nothing would be trained", r"Raise train\.steps"),
        (damaged_status, "other_launch", "fail", r"launch\.json' cannot be read.* Delete it", "^$"),
        (taken_port, "port", "fail", "port .* cannot be used", "Leave --master-port away"),
        (slow_storage, "read_rate", "warn", "and the run has taken 1,000,000,000,000", r"set store\.cache to a local disk"),
        (words("train.global_batch=3"), "configuration", "fail", "must divide by the ranks, 2; got 3. Use 2 or 4", "^Mend it first"),
        (words("train.step=3"), "configuration", "fail", r"train\.step", "^Mend it first"),
        (running, "other_launch", "fail", "is being trained by the processes", "mmscale runs stop"),
        (words("checkpoint.every=0"), "checkpoints", "warn", "a kill costs the whole run", r"Set checkpoint\.every"),
        (words(*HUGE, "checkpoint.keep=1000"), "disk", "fail", "are to come, .* GiB are free", r"Lower checkpoint\.keep"),
        (
            words(*HUGE, "checkpoint.every=5", "checkpoint.keep_every=5"),
            "disk",
            "fail",
            "^2[0-9] checkpoints of about",
            r"raise a checkpoint\.keep",
        ),
        (words(*HUGE), "memory", "fail", "2 ranks need more than", r"Raise zero\.stage"),
        (words("init_from=nowhere"), "start_weights", "fail", "'nowhere' does not exist.* init_from=null starts", "^$"),
        (words("model.init_text_from=nowhere"), "start_weights", "fail", "there is no folder nowhere", "nothing is downloaded"),
        (words("evaluate.every=5"), "evaluate", "fail", r"evaluate\.shards is not", r"Set evaluate\.shards"),
        (words("train.global_batch=64"), "samples", "warn", "has 12 samples, fewer than one step's 64", r"Lower train\.global_batch"),
    ],
)
def test_planted_fault_is_found(site: Site, fault: Callable[[Site], None], check: str, level: str, what: str, fix: str) -> None:
    fault(site)
    found = [f for f in site.bad() if f.check == check]
    assert [f.level for f in found] == [level], found
    assert re.search(what, found[0].what), found
    assert re.search(fix, found[0].fix), found


def test_a_place_for_copies_is_tried(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    site.words = ["checkpoint.copy_to=s3://tried/run"]
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        (tmp_path / "empty").mkdir()
        upload(tmp_path / "empty", port, "tried")
        assert [f.what for f in site.findings() if f.check == "copies"] == ["s3://tried/run can be written, listed and deleted from"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    site.words.append("store.retries=0")
    (found,) = [f for f in site.bad() if f.check == "copies"]
    assert found.what.startswith("'s3://tried/run/preflight' cannot be written, 3 times tried: Connection refused.")


def test_healthy_set_up_has_no_finding(site: Site) -> None:
    assert site.bad() == []
    write_checkpoint(site)
    assert site.bad() == []
    assert any("goes on from step 20 of 100" in f.what for f in site.findings())


def test_other_ranks_are_no_fault(site: Site) -> None:
    write_checkpoint(site, topology={"ranks": 4, "zero.stage": 1})
    assert site.bad() == []
    assert any("goes on from step 20 of 100; ranks 4 -> 2: losses go on to rounding" in f.what for f in site.findings())


@pytest.mark.cluster
def test_a_file_system_that_does_not_tell_its_size_is_not_taken_for_full(site: Site) -> None:
    """ramfs says that it has 0 blocks."""
    site.run.mkdir()
    done = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(site.run)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    site.held.callback(subprocess.run, ["umount", str(site.run)], check=True)
    (disk,) = [finding for finding in site.findings() if finding.check == "disk"]
    assert disk.level == "pass"
    assert disk.what.endswith(f"GiB are to come, {site.run} does not tell what is free")


def test_who_reads_no_words_needs_no_tokenizer(site: Site) -> None:
    (site.shards / "tokenizer").rmdir()
    assert [finding.check for finding in site.bad()] == ["tokenizer"]
    site.words += ["data.caption=null", "data.text=null", "objectives.contrastive.weight=0", "objectives.masked_image.weight=1"]
    assert site.bad() == []
    site.words += ["data.tokenizer=/nowhere"]
    assert [finding.check for finding in site.bad()] == ["tokenizer"]


def plan_for(tmp_path: Path) -> LaunchPlan:
    config = load_run_config(write(tmp_path / "stage.yaml", f"run: {tmp_path / 'run'}\ndata: {{shards: x}}\ntask: {{name: vqa}}\n"))
    launcher = Launcher(machine=Machine(cores=8, accelerator="cpu"), environment={}, here=tmp_path, python="python", launch_id="ID", port=1)
    cluster = ClusterConfig(hosts=HostsConfig(hostfile="hosts"))
    return make_plan(LaunchRequest(arguments=("stage.yaml",), cluster=cluster, hosts={"a": 8, "b": 8}), config, launcher)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def compared(tmp_path: Path, b: Report | str) -> list[Finding]:
    reports: dict[str, Report | str] = {"a": HERE, "b": b}
    return [f for f in compare(plan_for(tmp_path), HERE, reports, "m", begun=999.5, took_s=1.0) if f.level != "pass"]


@pytest.mark.parametrize(
    ("change", "check", "level", "what", "fix"),
    [
        ({"time": 1042.0}, "clocks", "warn", "the clock of b is 42 s off this machine's", "NTP"),
        ({"time": 990.0}, "clocks", "warn", "the clock of b is 10 s off", "NTP"),
        ({"python": "3.12.1"}, "versions", "fail", "b has Python 3.12.1, this machine 3.11.7", "constraints.txt"),
        ({"versions": {"torch": "2.13", "deepspeed": "missing"}}, "versions", "fail", "b has deepspeed missing", "constraints.txt"),
        ({"code": "4567"}, "code", "fail", "b has other sources of mmscale (digest 4567) than this machine (0123)", "the same commit"),
        ({"devices": 4}, "devices", "fail", "b has 4 devices, the launch wants 8", "Correct its slots"),
        ({"mark": None}, "shared", "fail", "b does not see what this machine writes", "file system that all hosts share"),
        ({"writable": False}, "shared", "fail", "b cannot write to", "permissions"),
        ({"missing": ["/data/x"]}, "paths", "fail", "b has no /data/x", "Copy it there"),
        ({"open_files": 1024}, "limits", "warn", "may open 1024 files", "Raise it"),
        ({"shm": 2**20}, "limits", "warn", "1 MiB free in /dev/shm", "--shm-size"),
    ],
)
def test_host_that_differs_is_named(tmp_path: Path, change: dict[str, Any], check: str, level: str, what: str, fix: str) -> None:
    found = compared(tmp_path, replace(HERE, **change))
    assert [(f.check, f.level) for f in found] == [(check, level)]
    assert what in found[0].what
    assert fix in found[0].fix


def test_equal_hosts_have_no_finding_and_a_silent_one_is_named(tmp_path: Path) -> None:
    assert compared(tmp_path, HERE) == []
    found = compared(tmp_path, "pdsh@ctl: b: ssh exited with exit code 255")
    assert [(f.check, f.level) for f in found] == [("hosts", "fail")]
    assert "b did not answer: pdsh@ctl: b: ssh exited" in found[0].what
    assert "--exclude b" in found[0].fix


def test_answers_are_parted_by_host() -> None:
    out = f"b: warning: motd\na: {json.dumps(asdict(HERE))}\n"
    answers = read_answers(["a", "b", "c"], out, "pdsh@ctl: b: ssh exited with exit code 255\n")
    assert answers == {"a": HERE, "b": "pdsh@ctl: b: ssh exited with exit code 255", "c": "no answer"}


def test_host_looks_at_itself(tmp_path: Path) -> None:
    (tmp_path / MARK).write_text("mark")
    report = look(tmp_path, [str(tmp_path), "/nowhere"])
    assert (report.mark, report.writable, report.missing) == ("mark", True, ["/nowhere"])
    assert report.versions["torch"][0].isdigit()


def test_table_has_the_worst_first_and_a_summary() -> None:
    findings = [Finding(check="disk", level="fail", what="full", fix="Free it."), Finding(check="port", level="pass", what="free")]
    assert render(findings) == (
        "fail  disk           full\n                     -> Free it.\npass  port           free\n1 would fail, 0 to look at, 1 good"
    )


def test_command_prints_json_and_its_exit_code_tells(site: Site) -> None:
    site.findings()
    command = [
        str(Path(sys.executable).with_name("mmscale")),
        "preflight",
        str(site.folder / "stage.yaml"),
        "--ranks-per-node",
        "2",
        "--json",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert {finding["level"] for finding in json.loads(done.stdout)} == {"pass"}
    done = subprocess.run([*command, "train.global_batch=3"], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)[0]["check"]) == (1, "configuration")
