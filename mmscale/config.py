"""The configuration of a training stage: typed, frozen, one docstring a key. No torch here: the launcher reads it too.

A stage file is YAML with these keys; words `key.sub=value` of the command line go over it. `model` may be the name of a
part (`tiny` is `configs/model/tiny.yaml`), the path of a YAML file, or a mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards import configfile
from shards.errors import ConfigError
from shards.store.config import StoreConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Image augmentation at training time, keyed by (train.seed, position)."""

    shift: int = 0
    """Random translation, at most so many pixels each way; the border is repeated."""
    scale: float = 0.0
    """Random zoom by a factor in [1 - scale, 1 + scale]."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    brightness: float = 0.0
    """Largest relative change of brightness, 0.2 for +-20 %."""
    contrast: float = 0.0
    """Largest relative change of contrast, 0.2 for +-20 %."""
    channel_permutation: bool = False
    """Shuffle the three colour channels."""
    dihedral: bool = False
    """One of the eight flips and quarter turns of a square image."""
    directions: list[str] | None = None
    """Four phrases of the texts and labels, clockwise from above, such as [above, right of, below, left of]: they turn with the image
    (flip, dihedral), so that what is said of it stays true. null: texts stay as they are."""
    colours: list[str] | None = None
    """Three words of the texts and labels, for red, green and blue: they follow the channels (channel_permutation). null: as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, and which of their fields become which input."""

    shards: str = "???"
    """Folder or URL of a data set written or indexed by `mmscale shards`."""
    image: bool = True
    """Feed the image. false gives a text-only control."""
    caption: str | None = "caption"
    """Field that becomes the causal text (contrastive text, captioning target): `caption` or a key of the sample's json; null for none."""
    text: str | None = "caption"
    """Field that becomes the bidirectional text (masked language, matching, questions of a task); null for none."""
    label: str | None = None
    """Field that holds a task's target; null for none."""
    labels: list[str] | None = None
    """The label vocabulary in order; null takes the sorted distinct values of `data.label` over the training shards."""
    tokenizer: str | None = None
    """A transformers tokenizer folder; null takes `tokenizer/` inside the shards folder."""
    max_text_tokens: int = 64
    """Longest text in tokens, the two special tokens included; longer text is cut."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the multiway fusion Transformer."""

    hidden_size: int = 128
    """Width d of the residual stream."""
    num_heads: int = 4
    """Attention heads; must divide hidden_size."""
    unimodal_layers: int = 4
    """Lower layers, which attend within a modality."""
    fusion_layers: int = 2
    """Upper layers, which attend across modalities. 0 with only the contrastive objective is CLIP-like; unimodal 0 is ViLT-like."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers over hidden_size."""
    image_size: int = 32
    """Side in pixels of the square model input; images are resized to it."""
    patch_size: int = 8
    """Side in pixels of a patch; must divide image_size."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of red, green and blue in [0, 1] that pixels are centred by. For pictures on a plain ground the data set's own can be better."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of red, green and blue that pixels are then divided by."""
    max_text_tokens: int = 64
    """Rows of the text position table; at least data.max_text_tokens."""
    projection_size: int = 128
    """Width of the contrastive embedding."""
    qk_norm: bool = True
    """RMS-normalise queries and keys (Henry et al. 2020; ViT-22B)."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the feed-forward layers; BERT and ViT use gelu."""
    dropout: float = 0.0
    """Dropout after attention and feed-forward layers."""
    layer_norm_eps: float = 1e-6
    """Epsilon of layer normalisation; 1e-12 for BERT- and ViT-initialised models."""
    activation_checkpointing: bool = False
    """Recompute each block in backward: memory of one block against about a third more time."""
    init_text_from: str | None = None
    """A local BERT-shaped transformers folder whose weights start the text expert."""
    init_image_from: str | None = None
    """A local ViT-shaped transformers folder whose weights start the perception expert."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """One pretraining objective. Weight 0 turns it off."""

    weight: float = 0.0
    """Its factor in the total loss."""
    fraction: float = 1.0
    """Part of the samples, chosen by (train.seed, position), that take part. contrastive: always all."""
    mask: float = 0.15
    """masked_language: part of tokens masked. masked_image: part of patches masked."""
    group: int | None = None
    """contrastive, matching: negatives come from aligned groups of so many consecutive positions, which makes the loss independent of
    ranks and accumulation; null: contrastive uses the micro-batches of all ranks, matching the rank's own micro-batch."""
    target: Literal["pixels", "features"] = "pixels"
    """masked_image: predict per-patch normalised pixels (MAE) or the model's own detached unmasked features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectivesConfig:
    """The pretraining objectives of one forward pass."""

    contrastive: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    matching: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    masked_language: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    captioning: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    masked_image: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The task of a fine-tuning stage; it adds its head and loss to the objectives."""

    name: Literal["classification", "vqa", "retrieval", "captioning"] = "???"  # type: ignore[assignment]
    """Which of mmscale/tasks."""
    weight: float = 1.0
    """Factor of the task's loss in the total."""
    label_smoothing: float = 0.0
    """classification, vqa: label smoothing."""
    beams: int = 1
    """captioning: beam width at evaluation; 1 is greedy."""


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
    config = configfile.build(RunConfig, layers)
    _check(config)
    return config


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
    _need(
        model.hidden_size % model.num_heads == 0,
        f"`model.num_heads` must divide model.hidden_size = {model.hidden_size}; got {model.num_heads}.",
    )
    _need(
        model.image_size % model.patch_size == 0,
        f"`model.patch_size` must divide model.image_size = {model.image_size}; got {model.patch_size}.",
    )
    for key, words, count in (("directions", data.augment.directions, 4), ("colours", data.augment.colours, 3)):
        _need(
            words is None or len({word.casefold() for word in words}) == len(words) == count,
            f"`data.augment.{key}` must be {count} different phrases or null; got {words}.",
        )
    _need(min(model.image_std) > 0, f"`model.image_std` must be above 0; got {list(model.image_std)}.")
    _need(
        data.max_text_tokens <= model.max_text_tokens,
        f"`data.max_text_tokens` = {data.max_text_tokens} is more than model.max_text_tokens = {model.max_text_tokens}. "
        "Lower the one or raise the other.",
    )
    for key, value in (("train.steps", train.steps), ("train.global_batch", train.global_batch), ("log.every", config.log.every)):
        _need(value > 0, f"`{key}` must be at least 1; got {value}.")
    _need(train.micro_batch is None or train.micro_batch > 0, f"`train.micro_batch` must be at least 1; got {train.micro_batch}.")
    weights = [
        getattr(config.objectives, name).weight for name in ("contrastive", "matching", "masked_language", "captioning", "masked_image")
    ]
    _need(
        config.task is not None or any(w > 0 for w in weights),
        "Nothing to train: every `objectives.*.weight` is 0 and no `task` is set. Give an objective a weight or name a task.",
    )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
