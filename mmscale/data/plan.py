"""What a stage's objectives and task ask of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmscale.config import RunConfig
from mmscale.data_config import Schedule, keep_schedules
from mmscale.tasks.kinds import kind_of_stage
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """Which parts a batch has, and for which part of the samples. Fractions: a sample takes part if its draw is below."""

    image: bool = True
    """Whether images go in."""
    caption: str | None = None
    """Field of the causal stream; None for an empty stream."""
    prompt: str | None = None
    """Field of what goes before the causal texts; None for nothing."""
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
    keep: dict[str, Schedule] = field(default_factory=dict)
    """Part of the patches kept, by modality; the others are seen whole."""

    @classmethod
    def from_config(cls, config: RunConfig, *, training: bool, has_mask: bool) -> StreamPlan:
        """Derive the plan.

        Args:
            config: the stage.
            training: False: every sample takes part, nothing is hidden.
            has_mask: whether the tokenizer has a mask token.

        Raises:
            ConfigError: masked language without a mask token, a task with nothing to predict from.
        """
        objectives, task = config.objectives, kind_of_stage(config)
        language, matching, pictures = objectives.masked_language, objectives.matching, objectives.masked_image
        masks_tokens = training and language.weight > 0 and config.data.text is not None
        if masks_tokens and not has_mask:
            raise ConfigError(
                "`objectives.masked_language` needs a mask token and the tokenizer has none. "
                "Choose a tokenizer with [MASK], or set its weight to 0."
            )
        needs_caption = objectives.contrastive.weight > 0 or objectives.captioning.weight > 0 or (task is not None and task.caption)
        needs_text = language.weight > 0 or matching.weight > 0 or (task is not None and task.text)
        if training and config.data.augment.word_mask:
            _check_word_mask(needs_text and config.data.text is not None, has_mask)
        has_text = (needs_text and config.data.text is not None) or (needs_caption and config.data.caption is not None)
        if task is not None and task.head is not None and not (config.data.image or has_text):
            raise ConfigError(
                f"`task.name={task.name}` has nothing to predict from: `data.image` is false and `data.text` is null. Give it one of them."
            )
        masks_patches = training and (pictures.weight > 0 or (task is not None and task.masks))
        return cls(
            image=config.data.image,
            caption=config.data.caption if needs_caption else None,
            prompt=config.data.prompt if needs_caption else None,
            caption_fuse=_caption_fuse(config, training),
            text=config.data.text if needs_text else None,
            text_fraction=_text_fraction(config, training),
            token_mask=language.mask if masks_tokens else 0.0,
            token_mask_fraction=language.fraction if masks_tokens else 0.0,
            patch_mask=pictures.mask if masks_patches else 0.0,
            patch_mask_fraction=pictures.fraction if masks_patches else 0.0,
            matching=matching.weight > 0,
            matching_group=matching.group,
            keep=keep_schedules(config.data.keep, {"image", *config.model.modalities}, config.train.global_batch) if training else {},
        )


def _check_word_mask(has_text: bool, has_mask: bool) -> None:
    if not has_text:
        raise ConfigError(
            "`data.augment.word_mask` hides words of `data.text`, which nothing in this stage reads. Name a field there for a task that "
            "reads a text, or set word_mask to 0."
        )
    if not has_mask:
        raise ConfigError(
            "`data.augment.word_mask` needs a mask token and the tokenizer has none. Choose a tokenizer with [MASK], or set it to 0."
        )


def _caption_fuse(config: RunConfig, training: bool) -> float:
    captioning = config.objectives.captioning
    kind = kind_of_stage(config)
    if kind is not None and kind.writes:
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
