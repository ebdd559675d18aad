"""What a stage's objectives and task ask of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmscale.config import RunConfig
from mmscale.data_config import Schedule, keep_schedules
from shards.errors import ConfigError

_LABEL_TASKS = ("classification", "vqa")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """Which parts a batch has, and for which part of the samples. Fractions: a sample takes part if its draw is below."""

    image: bool = True
    """Whether images go in."""
    caption: str | None = None
    """Field of the causal stream; None for an empty stream."""
    caption_fuse: float = 0.0
    """Fraction of captions that enter the fusion layers."""
    text: str | None = None
    """Field of the bidirectional stream; None for an empty stream."""
    text_fraction: float = 1.0
    """Fraction of samples whose text goes in."""
    token_mask: float = 0.0
    """Part of tokens hidden."""
    token_mask_fraction: float = 0.0
    """Fraction of samples whose tokens are hidden."""
    patch_mask: float = 0.0
    """Part of patches hidden."""
    patch_mask_fraction: float = 0.0
    """Fraction of images whose patches are hidden."""
    matching: bool = False
    """Whether Gumbel noise is drawn."""
    matching_group: int | None = None
    """Its width; None for the micro-batch."""
    label: str | None = None
    """Field of the label target; None for no target."""
    keep: dict[str, Schedule] = field(default_factory=dict)
    """Part of the patches kept, by modality; the others are seen whole."""

    @classmethod
    def from_config(cls, config: RunConfig, *, training: bool, has_mask: bool, has_labels: bool) -> StreamPlan:
        """Derive the plan.

        Args:
            config: the stage.
            training: False: every sample takes part, nothing is hidden.
            has_mask: whether the tokenizer has a mask token.
            has_labels: whether the label vocabulary is known.

        Raises:
            ConfigError: masked language without a mask token, a label task without a label.
        """
        objectives, task = config.objectives, config.task.name if config.task else None
        language, matching, pictures = objectives.masked_language, objectives.matching, objectives.masked_image
        masks_tokens = training and language.weight > 0 and config.data.text is not None
        if masks_tokens and not has_mask:
            raise ConfigError(
                "`objectives.masked_language` needs a mask token and the tokenizer has none. "
                "Choose a tokenizer with [MASK], or set its weight to 0."
            )
        with_label = task in _LABEL_TASKS
        if with_label and config.data.label is None:
            raise ConfigError(f"`task.name={task}` needs `data.label`: the key of the samples' json that holds the label.")
        if with_label and not has_labels:
            raise ConfigError(
                f"`task.name={task}` needs the label vocabulary. List `data.labels`, or start from a checkpoint that has one."
            )
        needs_caption = objectives.contrastive.weight > 0 or objectives.captioning.weight > 0 or task in ("retrieval", "captioning")
        needs_text = language.weight > 0 or matching.weight > 0 or with_label
        masks_patches = training and pictures.weight > 0
        return cls(
            image=config.data.image,
            caption=config.data.caption if needs_caption else None,
            caption_fuse=_caption_fuse(config, training),
            text=config.data.text if needs_text else None,
            text_fraction=_text_fraction(config, training),
            token_mask=language.mask if masks_tokens else 0.0,
            token_mask_fraction=language.fraction if masks_tokens else 0.0,
            patch_mask=pictures.mask if masks_patches else 0.0,
            patch_mask_fraction=pictures.fraction if masks_patches else 0.0,
            matching=matching.weight > 0,
            matching_group=matching.group,
            label=config.data.label if with_label else None,
            keep=keep_schedules(config.data.keep, {"image", *config.model.modalities}, config.train.global_batch) if training else {},
        )


def _caption_fuse(config: RunConfig, training: bool) -> float:
    captioning = config.objectives.captioning
    if config.task is not None and config.task.name == "captioning":
        return 1.0
    if captioning.weight <= 0:
        return 0.0
    return captioning.fraction if training else 1.0


def _text_fraction(config: RunConfig, training: bool) -> float:
    """The larger fraction of the objectives that use the text; all samples for a task and in evaluation."""
    if config.task is not None or not training:
        return 1.0
    used = [o.fraction for o in (config.objectives.masked_language, config.objectives.matching) if o.weight > 0]
    return max(used, default=1.0)
