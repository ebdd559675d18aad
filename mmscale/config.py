"""The configuration of a training stage: typed, frozen, one docstring a key. No torch here: the launcher reads it too.

A stage file is YAML with these keys; words `key.sub=value` of the command line go over it. `model` may be the name of a
part (`tiny` is `configs/model/tiny.yaml`), the path of a YAML file, or a mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmscale.data_config import DataConfig, keep_schedules, mixture_sources
from mmscale.model_config import ModelConfig
from mmscale.objectives_config import OBJECTIVES, TASKS, ObjectivesConfig, TaskConfig, unknown_task
from mmscale.ranges import check_ranges
from mmscale.recovery_config import CheckpointConfig, GuardConfig, WatchdogConfig
from shards import configfile
from shards.configfile import need
from shards.errors import ConfigError
from shards.store.config import StoreConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Steps, batch and numerics."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch: int = 256
    """Samples an optimizer step, over all ranks and accumulation."""
    micro_batch: int | None = None
    """Samples a rank takes through the model at once; null: global_batch / ranks, no accumulation."""
    seed: int = 0
    """Seed of order, augmentation, masking, initialisation and dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device computes it natively, else fp32."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    compile: bool = False
    """Compile the dense parts of the layers with torch.compile: faster steps after a minute or so. For ZeRO 0, 1 and 2; on a CPU it needs a
    C++ compiler."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; null for none."""
    timeout_s: float = 1800.0
    """Longest wait in a collective before the run fails; what `watchdog` says comes first, and says more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and cosine decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices inside the layers move along their orthogonalised momentum, all else by AdamW, at one learning rate. For ZeRO
    0, 1 and 2."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.05
    """Last learning rate over the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Decay rate of Muon's momentum."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and of what is learned beside patches (positions, [CLS], mask token); vectors, norms and the
    tables of text get none."""
    layer_decay: float = 1.0
    """Factor on the learning rate with every layer further down from the heads, such as 0.75 in fine-tuning; 1 is one rate for all."""
    head_lr_ratio: float = 1.0
    """Factor on the learning rate of what stands on the layers: projections and heads."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions; parameters whose name matches one of them (re.search) are not trained."""

    def fits(self, stage: int) -> bool:
        """Whether a stage of ZeRO leaves it what it steps by: Muon takes whole matrices."""
        return self.name == "adamw" or stage < 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2022) by peft: all else is frozen but the task heads. Checkpoints' model/ has them merged."""

    rank: int = 0
    """Rank of the adapters; 0 for none."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before an adapter."""
    targets: str = r"\w+_layers\..*\.(qkv|out|up|down)"
    """Regular expression; linear layers whose whole name matches it get an adapter."""
    train: list[str] = field(default_factory=list)
    """Regular expressions; parameters whose name matches one of them (re.search) are trained as well, such as new layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 replicas, 1 sharded optimizer, 2 and gradients, 3 and parameters."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: masters and moments lie in the host's memory, and its cores take the optimizer's step. Needs stage 1, 2 or 3."""
    reduce_bucket: int = 500_000_000
    """Gradients that stages 1 to 3 reduce together at most, in numbers; their buffer takes as many on the device."""
    prefetch_bucket: int = 50_000_000
    """Stage 3: weights, in numbers, that are gathered ahead of their use; 0 gathers when a layer is reached."""
    persistence_threshold: int = 100_000
    """Stage 3: parameters below so many numbers are kept whole on every rank: gathering them costs more than it saves."""

    def check(self) -> None:
        """Raise ConfigError for what DeepSpeed would refuse, or silently not do."""
        need(
            self.offload_optimizer == "none" or self.stage > 0,
            "`zero.offload_optimizer=cpu` needs a sharded optimizer; got zero.stage = 0. "
            "Use zero.stage=1, 2 or 3, or offload_optimizer=none.",
        )
        need(self.reduce_bucket > 0, f"`zero.reduce_bucket` must be at least 1; got {self.reduce_bucket}.")
        for key in ("prefetch_bucket", "persistence_threshold"):
            need(getattr(self, key) >= 0, f"`zero.{key}` must not be negative; got {getattr(self, key)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How samples reach a rank."""

    workers: int = 0
    """Worker processes a rank; 0 decodes in threads of the rank's own process."""
    threads: int = 1
    """Decode threads in a worker (or in the rank when workers is 0)."""
    prefetch: int = 4
    """Micro-batches held ready (a worker, when there are workers)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Console, metrics.jsonl and TensorBoard."""

    every: int = 10
    """Steps between logged lines."""
    tensorboard: bool = True
    """Write TensorBoard events to tensorboard/ in the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation during training, on other shards."""

    every: int = 0
    """Steps between evaluations, and one after the last step; 0 for none."""
    shards: str | None = None
    """Folder of the evaluation data set."""
    samples: int = 1000
    """Samples evaluated, the first of that data set."""
    batch: int = 250
    """Samples in an evaluation batch."""
    patience: int = 0
    """Early stopping: evaluations in a row that may give no higher `checkpoint.best`; then the run ends, finished. 0 for never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """Proof of what was read."""

    samples: bool = False
    """Write audit/rank-N.jsonl, a line a sample: step, position, key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineConfig:
    """Budget of samples that do not decode."""

    max_fraction: float = 0.001
    """Largest part of the samples seen that may be bad."""
    max_count: int = 10
    """Bad samples always allowed, however few samples were seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A training stage."""

    run: str = "???"
    """The run folder. Running again with the same folder goes on from its newest checkpoint."""
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init_from: str | None = None
    """A checkpoint, or a run folder (its newest checkpoint), whose weights start this run."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    task: TaskConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def drops_out(self) -> bool:
        """Whether a forward in training draws what it leaves out: in the model's layers, or before adapters."""
        return self.model.dropout > 0 or (self.lora.rank > 0 and self.lora.dropout > 0)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a stage file and the words that override it, and check what can be checked without ranks or data.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing key, a combination that cannot work.
    """
    named = [w.removeprefix("model=") for w in overrides if w.startswith("model=")]
    words = [w for w in overrides if not w.startswith("model=")]
    file = configfile.read_yaml(Path(path))
    layers: list[tuple[str, dict[str, Any]]] = []
    if isinstance(file.get("model"), str):
        named.insert(0, file.pop("model"))
    if named:  # the last one counts; single keys of the file or the command line go over it
        part = find_part("model", named[-1])
        layers.append((str(part), {"model": configfile.read_yaml(part)}))
    layers += [(str(path), file), ("the command line", configfile.parse_overrides(words))]
    for _, layer in layers:
        _read_modality_parts(layer)
    config = configfile.build(RunConfig, layers)
    _check(config)
    return config


def _read_modality_parts(layer: dict[str, Any]) -> None:
    """Put the keys of a part in the place of its name, `model.modalities.audio: audio`."""
    model = layer.get("model")
    modalities = model.get("modalities") if isinstance(model, dict) else None
    if isinstance(modalities, dict):
        named = {name: entry for name, entry in modalities.items() if isinstance(entry, str)}
        modalities.update({name: configfile.read_yaml(find_part("modality", entry)) for name, entry in named.items()})


def find_part(kind: str, name: str) -> Path:
    """Find the YAML file of a configuration part by its name (`tiny`) or path (`parts/mine.yaml`).

    Raises:
        ConfigError: there is neither.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    folder = CONFIGS / kind
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise ConfigError(f"`{kind}={name}` names no part: known parts are {known}. Use one of them or the path of a .yaml file.")
    return folder / f"{name}.yaml"


def _check(config: RunConfig) -> None:
    model, train, data = config.model, config.train, config.data
    for section in ("train", "optimizer", "lora", "evaluate", "log"):
        check_ranges(section, getattr(config, section))
    config.store.check()
    model.check()
    config.objectives.check()
    config.zero.check()
    _check_task(config)
    _check_compile(config)
    _check_augment(config)
    mixture_sources(data)
    need(
        0 <= data.pad_captions <= data.max_text_tokens,
        f"`data.pad_captions` must be at most data.max_text_tokens = {data.max_text_tokens}, or 0 for none; got {data.pad_captions}.",
    )
    _check_captions(config)
    _check_fusion(config)
    keep_schedules(data.keep, {"image", *model.modalities}, train.global_batch)
    need(data.order.lanes > 0, f"`data.order.lanes` must be at least 1; got {data.order.lanes}.")
    need(data.order.block is None or data.order.block > 0, f"`data.order.block` must be at least 1 or null; got {data.order.block}.")
    need(
        data.max_text_tokens <= model.max_text_tokens,
        f"`data.max_text_tokens` = {data.max_text_tokens} is more than model.max_text_tokens = {model.max_text_tokens}. "
        "Lower the one or raise the other.",
    )
    config.checkpoint.check()
    config.guard.check()
    config.watchdog.check()
    optimizer = config.optimizer
    need(
        optimizer.fits(config.zero.stage) and (optimizer.name == "adamw" or config.zero.offload_optimizer == "none"),
        f"`optimizer.name=muon` needs whole matrices at hand, which zero.stage = {config.zero.stage} with zero.offload_optimizer = "
        f"{config.zero.offload_optimizer} does not give. Use zero.stage=0, 1 or 2 without offload, or optimizer.name=adamw.",
    )
    saving = config.checkpoint
    need(
        saving.best is None or config.evaluate.every > 0,
        f"`checkpoint.best` = {saving.best} is a metric of evaluations, and `evaluate.every` is 0. Set `evaluate.every`.",
    )
    patience = config.evaluate.patience
    need(patience >= 0, f"`evaluate.patience` must be at least 1, or 0 for never; got {patience}.")
    need(
        patience == 0 or saving.best is not None,
        f"`evaluate.patience` = {patience} counts evaluations without a higher `checkpoint.best`, which is null. Name a metric there.",
    )
    weights = [getattr(config.objectives, name).weight for name in OBJECTIVES]
    need(
        config.task is not None or any(w > 0 for w in weights),
        "Nothing to train: every `objectives.*.weight` is 0 and no `task` is set. Give an objective a weight or name a task.",
    )


def _check_augment(config: RunConfig) -> None:
    augment, objectives = config.data.augment, config.objectives
    augment.check()
    augment.check_sound(config.model.modalities)
    augment.check_word_mask(objectives.masked_language.weight > 0)
    others = [name for name in OBJECTIVES if getattr(objectives, name).weight > 0]
    augment.check_mixes(None if config.task is None else config.task.name, config.data.text, others)


def _check_captions(config: RunConfig) -> None:
    """Captions that the model is to write start with a token, end with a word, and are read from left to right."""
    written = config.objectives.captioning.weight > 0 or (config.task is not None and config.task.name in ("captioning", "answering"))
    for wrong, key in (
        (config.model.text.captions == "bidirectional", "model.text.captions=causal"),
        (not config.data.begin, "data.begin=true"),
        (config.data.pad_captions > 0, "data.pad_captions=0"),
    ):
        need(
            not (written and wrong),
            f"The captioning objective predicts each token from those before it, which needs {key}. Set it, or "
            "objectives.captioning.weight=0 and another task.",
        )


def _check_fusion(config: RunConfig) -> None:
    """What is to be said of a picture and a text together is computed where they see each other."""
    if config.model.fusion_layers or not config.data.image:
        return
    wanted = [f"objectives.{name}" for name in ("matching", "captioning") if getattr(config.objectives, name).weight > 0]
    task = config.task.name if config.task is not None and config.task.name in TASKS else ""
    if task in ("captioning", "answering") or (task not in ("", "retrieval", "anomaly") and config.data.text is not None):
        wanted.append(f"task.name={task}")
    need(
        not wanted,
        f"`model.fusion_layers` is 0, so that no text sees an image, which {wanted[0] if wanted else ''} is there for. Set "
        "model.fusion_layers to 1 or more, or, where samples have no images, data.image=false.",
    )


def _check_task(config: RunConfig) -> None:
    """A module of the user's own is looked for when it is loaded, as it may take torch."""
    if config.task is not None:
        config.task.check()
    if config.task is not None and config.task.name not in TASKS and "." not in config.task.name:
        raise ConfigError(unknown_task("task.name", config.task.name))


def _check_compile(config: RunConfig) -> None:
    if not config.train.compile:
        return
    need(
        config.zero.stage < 3,
        "`train.compile` does not go with zero.stage = 3, which gathers weights in hooks around every layer that no graph may span. "
        "Use zero.stage=2, or train.compile=false.",
    )
    need(
        config.model.activation_checkpointing != "selective",
        "`train.compile` decides by itself which cheap operations backward computes again, so model.activation_checkpointing = selective "
        "does not go with it. Use none or full.",
    )
