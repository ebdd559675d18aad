"""The `mmscale` command. What a subcommand needs is imported when it runs, so that `mmscale --help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import ConfigError, MmscaleError

app = typer.Typer(
    name="mmscale",
    help="From raw text-image pairs to a trained and evaluated fusion Transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
shards_app = typer.Typer(help="Write, adopt, check, mend and look at shards; make versions of data sets.", no_args_is_help=True)
runs_app = typer.Typer(help="Look at runs and stop them.", no_args_is_help=True)
checkpoints_app = typer.Typer(help="Look at a run's checkpoints.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(runs_app, name="runs")
app.add_typer(checkpoints_app, name="checkpoints")

Words = Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, then words that go over it.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards.")]
Place = Annotated[str, typer.Argument(metavar="DIR|URL", help="Folder of shards, or where they lie behind a URL.")]
RunFolderArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


class EngineChoice(str, Enum):
    """Launchers that `mmscale launch` drives."""

    deepspeed = "deepspeed"
    torchrun = "torchrun"
    slurm = "slurm"


StageFile = Annotated[str, typer.Argument(metavar="CONFIG", help="The stage's YAML file.")]
StageWords = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Words that go over it.")]
Cluster = Annotated[
    str | None, typer.Option(help="Where: a part (local, hosts, slurm) or a YAML file (configs/cluster); default: this machine.")
]
EngineOption = Annotated[EngineChoice | None, typer.Option(help="Who starts the ranks; default: the cluster's, or deepspeed.")]
RanksPerNode = Annotated[int | None, typer.Option(help="Default: one a CUDA device, one where there is none; the hostfile's slots.")]
Hostfile = Annotated[Path | None, typer.Option(help="File of `HOST slots=N` lines; default: this machine alone.")]
Nodes = Annotated[int | None, typer.Option(help="Use only the first so many hosts; SLURM: ask for so many nodes.")]
ClusterWords = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Goes over the cluster file, such as slurm.partition=long.")
]


class WeightType(str, Enum):
    """Types that `mmscale checkpoints export` writes."""

    fp32 = "fp32"
    bf16 = "bf16"


def main() -> None:
    """Console script: a user's mistake is one paragraph on stderr and exit code 2 (configuration) or 1, never a traceback."""
    try:
        app()
    except MmscaleError as e:
        print(f"mmscale: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, ConfigError) else getattr(e, "exit_code", 1))
    except OSError as e:
        if e.filename is None or e.strerror is None:  # not a user's file or folder
            raise
        print(f"mmscale: {e.filename!r} cannot be used: {e.strerror}. Give another place, or mend that one.", file=sys.stderr)
        sys.exit(1)


@shards_app.command("write")
def shards_write(
    words: Words = None,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="Write the I-th of N parts; default: ask SLURM, else all.")] = None,
) -> None:
    """Turn raw pairs into shards, for example: source=table path=pairs.parquet out=data/x image.short_side=256.

    Sources: folder, table, webdataset, coco, karpathy, vqa, nlvr, esc50, glyphs. Keys are in docs/shards.md and configs/demo/shards.yaml.
    """
    from launcher import shard_commands

    shard_commands.write_data_set(*split_words([*(words or []), *([] if part is None else [f"part={part}"])]))


@shards_app.command("index")
def shards_index(
    folder: Folder,
    energon: Annotated[bool, typer.Option("--energon", help="Also write what Megatron-Energon reads: .tar.idx and .nv-meta.")] = False,
) -> None:
    """Adopt WebDataset tars that others wrote, img2dataset's among them: index each and write the manifest."""
    from launcher import shard_commands

    shard_commands.index_tars(folder, energon)


@shards_app.command("verify")
def shards_verify(
    folder: Place,
    sample: Annotated[int | None, typer.Option(help="Check and decode only so many samples, spread over the shards.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Re-hash every shard and decode every sample.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="With --full: index or fetch again, leave damaged samples out; say each step.")
    ] = False,
    copies: Annotated[str | None, typer.Option("--from", metavar="DIR|URL", help="With --repair: where copies of the tars are.")] = None,
) -> None:
    """Check shards against their checksums. Exit code 1 and the shard:key of every fault that there is, or that stays after --repair."""
    from launcher import shard_commands

    if (repair and not full) or (copies is not None and not repair):
        raise ConfigError(
            "--repair needs --full, which finds what is to be repaired, and --from needs --repair. Add the one that is missing."
        )
    if repair:
        raise typer.Exit(shard_commands.repair_data_set(folder, copies))
    raise typer.Exit(shard_commands.verify_data_set(folder, sample, full))


@shards_app.command("filter")
def shards_filter(folder: Folder, words: Words = None) -> None:
    """Make a version without the samples that rules drop, for example: out=data/y min_side=200 'where=score>=0.5'."""
    from launcher import shard_commands

    shard_commands.filter_version(folder, *split_words(words or []))


@shards_app.command("dedup")
def shards_dedup(folder: Folder, words: Words = None) -> None:
    """Make a version without duplicate pictures, for example: out=data/y near=4 against=data/test."""
    from launcher import shard_commands

    shard_commands.dedup_version(folder, *split_words(words or []))


@shards_app.command("split")
def shards_split(folder: Folder, words: Words = None) -> None:
    """Make versions that share no sample, for example: out=data/parts train=0.9 val=0.1 by=source."""
    from launcher import shard_commands

    shard_commands.split_versions(folder, *split_words(words or []))


@shards_app.command("merge")
def shards_merge(
    words: Annotated[list[str] | None, typer.Argument(metavar="DIR... [KEY=VALUE]...", help="Folders of shards, then words.")] = None,
) -> None:
    """Make one data set of several by hard links, or of new tars, for example: data/x data/y out=data/xy rewrite=true."""
    from launcher import shard_commands

    folders = [Path(word) for word in words or [] if "=" not in word]
    shard_commands.merge_versions(folders, [word for word in words or [] if "=" in word])


@shards_app.command("show")
def shards_show(
    folder: Place,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Show this sample instead of the whole.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the picture goes; default: here, named after DIR or KEY.")] = None,
) -> None:
    """Print statistics and draw histograms with a contact sheet (PNG), or print one sample and save its image."""
    from launcher import shard_commands

    shard_commands.show_data_set(folder, key, out)


@app.command()
def launch(
    config: StageFile,
    words: StageWords = None,
    cluster: Cluster = None,
    engine: EngineOption = None,
    ranks_per_node: RanksPerNode = None,
    hostfile: Hostfile = None,
    include: Annotated[str | None, typer.Option(help="Of the hostfile only HOST@HOST:0,2.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Of the hostfile all but HOST@HOST:0,2.")] = None,
    nodes: Nodes = None,
    master_address: Annotated[str | None, typer.Option(help="Address of the first host that the others reach.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Default: a free port.")] = None,
    cluster_words: ClusterWords = None,
    module: Annotated[str, typer.Option(help="The module that every rank runs.")] = "mmscale.train",
    grace_s: Annotated[float, typer.Option(help="Seconds the ranks get to end after a signal.")] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, the command and its files, start nothing.")] = False,
) -> None:
    """Train a stage: start the ranks, follow them, leave nothing behind, and say truthfully how it ended. SLURM: submit it as a job."""
    from launcher import start

    options: dict[str, object] = {"engine": engine, "nodes": nodes, "ranks_per_node": ranks_per_node, "hosts.hostfile": hostfile}
    options |= {"hosts.include": include, "hosts.exclude": exclude, "hosts.master_address": master_address}
    request = start.request((config, *(words or [])), cluster, [*(cluster_words or []), *given(options)], module=module, grace_s=grace_s)
    raise typer.Exit(start.launch(request, master_port, dry_run=dry_run))


@app.command("model-config")
def model_config(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDER [FOLDER]", help="Transformers checkpoints: one of each tower, or of both.")
    ],
) -> None:
    """Print the `model` section that pretrained checkpoints need: a file for `mmscale launch ... model=FILE`."""
    from launcher import model_commands

    model_commands.print_model_section(folders)


@app.command()
def preflight(
    config: StageFile,
    words: StageWords = None,
    cluster: Cluster = None,
    engine: EngineOption = None,
    ranks_per_node: RanksPerNode = None,
    hostfile: Hostfile = None,
    nodes: Nodes = None,
    master_port: Annotated[int | None, typer.Option(help="Default: a free port.")] = None,
    cluster_words: ClusterWords = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what would fail or not fit, and the fix, before anything is started or queued. Exit code 1 when something would fail."""
    from launcher import start
    from launcher.preflight_command import preflight as look

    options: dict[str, Any] = {"engine": engine, "nodes": nodes, "ranks_per_node": ranks_per_node, "hosts.hostfile": hostfile}
    request = start.request((config, *(words or [])), cluster, [*(cluster_words or []), *given(options)])
    raise typer.Exit(look(request, master_port, as_json=as_json))


@app.command("plan")
def plan_on_paper(
    config: StageFile,
    words: StageWords = None,
    gpus: Annotated[int, typer.Option(help="GPUs, 1 to 16,384; they need not exist.")] = 8,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="Which: a part (configs/hardware: a100, b200, h100, h200) or a YAML file.")] = "h100",
    assumption_words: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Goes over what is assumed, such as hardware.mfu=[0.3,0.4].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a stage takes on a cluster on paper: memory, micro-batch, time, checkpoints. Exit code 1 when nothing fits."""
    from launcher.forecast_command import plan

    raise typer.Exit(plan(config, words or [], gpus, gpus_per_node, gpu, assumption_words or [], as_json=as_json))


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file of stages (configs/pipeline).")],
    words: StageWords = None,
    cluster: Annotated[str | None, typer.Option(help="A cluster file of SLURM's: submit jobs; default: run here, in order.")] = None,
    cluster_words: ClusterWords = None,
    show: Annotated[bool, typer.Option("--show", help="Only print which stages are done, and their results.")] = False,
) -> None:
    """Run stages in the order of their dependencies; what is done is not done again, what was broken off goes on."""
    from launcher import pipeline_run
    from launcher.pipeline import load_pipeline

    folder, stages = load_pipeline(file, words or [])
    if show:
        print(pipeline_run.table(folder, stages))
    elif cluster is not None:
        raise typer.Exit(pipeline_run.run_on_slurm(folder, stages, cluster, cluster_words or []))
    else:
        raise typer.Exit(pipeline_run.run_here(folder, stages))


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run folder (its newest checkpoint).")],
    words: Words = None,
) -> None:
    """Evaluate a checkpoint, for example: task=retrieval data=data/x.

    Tasks: classification, vqa, tagging, regression, reasoning, anomaly, retrieval, captioning, answering, or one of your own
    (docs/tasks.md). configs/demo/evaluate.yaml has every key, commented.
    """
    from mmscale.evaluate import evaluate_command

    metrics = evaluate_command(checkpoint, *split_words(words or []))
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {'null' if value is None else f'{value:.6g}'}")


@runs_app.command("ls")
def runs_ls(below: Annotated[Path, typer.Argument(metavar="[DIR]", help="Look for runs here and below.")] = Path("runs")) -> None:
    """List the runs below a folder: state, step, loss, rate, time left."""
    from launcher import run_commands

    run_commands.ls(below)


@runs_app.command("show")
def runs_show(
    run: RunFolderArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with a line whenever something has changed.")] = False,
) -> None:
    """Show a run: why it failed, how far it is, its newest metrics, its checkpoints, its newest launch."""
    from launcher import run_commands

    run_commands.show(run, follow=follow)


@runs_app.command("logs")
def runs_logs(
    run: RunFolderArgument,
    rank: Annotated[list[int] | None, typer.Option(help="Only this rank; may be given several times.")] = None,
    lines: Annotated[int, typer.Option(help="The last so many of each rank.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
) -> None:
    """Print what the ranks of the newest launch said, each line with its rank before it."""
    from launcher import run_commands

    run_commands.show_logs(run, rank or [], lines, follow=follow)


@runs_app.command("stop")
def runs_stop(
    run: RunFolderArgument,
    grace_s: Annotated[
        float | None, typer.Option(help="Seconds until what is left is killed; usually what the launch gives its ranks, and some more.")
    ] = None,
) -> None:
    """Stop a run that was launched on this machine, or is a job of SLURM; its ranks commit a checkpoint first."""
    from launcher import run_commands

    run_commands.stop(run, grace_s)


@checkpoints_app.command("ls")
def checkpoints_ls(run: RunFolderArgument) -> None:
    """List a run's committed checkpoints: step, size, age."""
    from launcher import run_commands

    run_commands.list_checkpoints(run)


@checkpoints_app.command("verify")
def checkpoints_verify(run: RunFolderArgument) -> None:
    """Re-hash every file of a run's checkpoints. Exit code 1 when one is damaged."""
    from launcher import run_commands

    raise typer.Exit(run_commands.verify_checkpoints(run))


@checkpoints_app.command("pin")
def checkpoints_pin(
    run: RunFolderArgument,
    step: Annotated[int, typer.Argument(metavar="STEP", help="The step that the checkpoint is named after.")],
    release: Annotated[bool, typer.Option("--release", help="Let go of it instead.")] = False,
) -> None:
    """Keep a checkpoint for good, whatever checkpoint.keep says."""
    from launcher import checkpoint_commands

    checkpoint_commands.pin_checkpoint(run, step, pinned=not release)


@checkpoints_app.command("export")
def checkpoints_export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run folder (its newest checkpoint).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    shard_gib: Annotated[float, typer.Option(help="Largest file of weights.")] = 5.0,
    dtype: Annotated[WeightType, typer.Option(help="Type of the weights.")] = WeightType.fp32,
    average: Annotated[bool, typer.Option(help="Take the moving average where there is one.")] = True,
) -> None:
    """Write a checkpoint's model as safetensors in the transformers layout, in little memory."""
    from launcher import checkpoint_commands

    checkpoint_commands.export_checkpoint(checkpoint, out, shard_gib=shard_gib, dtype=dtype.value, average=average)


@checkpoints_app.command("average")
def checkpoints_average(
    run: RunFolderArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint to make.")],
    last: Annotated[int, typer.Option(help="How many of the newest checkpoints.")] = 2,
) -> None:
    """Average the weights of a run's newest checkpoints into one to evaluate, export or start from."""
    from launcher import checkpoint_commands

    checkpoint_commands.average_checkpoints(run, out, last)


def given(options: Mapping[str, object]) -> list[str]:
    """The options that were given, as `key=value` words."""
    values = {key: value.value if isinstance(value, Enum) else value for key, value in options.items() if value is not None}
    return [f"{key}={value}" for key, value in values.items()]


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Tell an optional leading configuration file from the `key=value` words after it."""
    if words and "=" not in words[0]:
        return Path(words[0]), list(words[1:])
    return None, list(words)
