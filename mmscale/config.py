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
from mmscale.objectives_config import ObjectivesConfig, TaskConfig
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
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; null for none."""
    timeout_s: float = 600.0
    """Longest wait in a collective before the run fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

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
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors, norms and embeddings get none."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions; parameters whose name matches one of them (re.search) are not trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 replicas, 1 sharded optimizer, 2 and gradients, 3 and parameters."""


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
class CheckpointConfig:
    """When to commit, and what to keep."""

    every: int = 0
    """Steps between checkpoints; 0 commits only the last step."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after a commit. 0 keeps all."""


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
    """Steps between evaluations; 0 for none."""
    shards: str | None = None
    """Folder of the evaluation data set."""
    samples: int = 1000
    """Samples evaluated, the first of that data set."""
    batch: int = 250
    """Samples in an evaluation batch."""


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
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)


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
    config.store.check()
    model.check()
    for key, words, count in (("directions", data.augment.directions, 4), ("colours", data.augment.colours, 3)):
        need(
            words is None or len({word.casefold() for word in words}) == len(words) == count,
            f"`data.augment.{key}` must be {count} different phrases or null; got {words}.",
        )
    mixture_sources(data)
    keep_schedules(data.keep, {"image", *model.modalities}, train.global_batch)
    need(data.order.lanes > 0, f"`data.order.lanes` must be at least 1; got {data.order.lanes}.")
    need(data.order.block is None or data.order.block > 0, f"`data.order.block` must be at least 1 or null; got {data.order.block}.")
    need(
        data.max_text_tokens <= model.max_text_tokens,
        f"`data.max_text_tokens` = {data.max_text_tokens} is more than model.max_text_tokens = {model.max_text_tokens}. "
        "Lower the one or raise the other.",
    )
    for key, value in (("train.steps", train.steps), ("train.global_batch", train.global_batch), ("log.every", config.log.every)):
        need(value > 0, f"`{key}` must be at least 1; got {value}.")
    need(train.micro_batch is None or train.micro_batch > 0, f"`train.micro_batch` must be at least 1; got {train.micro_batch}.")
    weights = [
        getattr(config.objectives, name).weight for name in ("contrastive", "matching", "masked_language", "captioning", "masked_image")
    ]
    need(
        config.task is not None or any(w > 0 for w in weights),
        "Nothing to train: every `objectives.*.weight` is 0 and no `task` is set. Give an objective a weight or name a task.",
    )
