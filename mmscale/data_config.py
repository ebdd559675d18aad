"""The `data` section of a stage file: which shards, in which order, and which of their fields become which input. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mmscale.augment_config import AugmentConfig
from shards import configfile
from shards.errors import ConfigError
from shards.order import LANES

Schedule = tuple[tuple[int, float], ...]
"""(first position, value) pairs, ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One data set of a mixture."""

    path: str = "???"
    """Its folder or URL."""
    name: str | None = None
    """Goes before its samples' keys, `NAME/KEY`; null takes the last part of the path."""
    weight: float | None = None
    """Its share of the samples, on any scale. null: by `epochs`, or by `data.temperature` where no source has either."""
    epochs: float | None = None
    """How often it is seen while another source with `epochs: 1` is seen once; instead of `weight`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """How far a data set of more than 65,536 rows is shuffled: lanes x block rows are in use at a time, over all ranks."""

    lanes: int = LANES
    """Places of the data set that a step takes its samples from; fewer need less cache, more mix better. At least as many as nodes."""
    block: int | None = None
    """Rows that are shuffled among each other in a lane, a few shards' worth; null is a 64th of a lane, 8,192 to 131,072."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, and which of their fields become which input."""

    shards: Any = "???"
    """Folder or URL of a data set written or indexed by `mmscale shards`; or a mixture: a list of `SourceConfig`, such as
    [{path: data/a, weight: 3}, {path: data/b, weight: 1}]."""
    temperature: float = 1.0
    """A mixture without weights: sources are drawn by rows ** (1 / temperature). 1 is by size, a large one evenly."""
    weights_from: dict[int, list[float]] = field(default_factory=dict)
    """A mixture: step -> weights of the sources from that step on. What lies ahead of a run may be changed when it is continued."""
    order: OrderConfig = field(default_factory=OrderConfig)
    image: bool = True
    """Feed the image, and what the model's other modalities take. false gives a text-only control."""
    caption: str | None = "caption"
    """Field that becomes the causal text (contrastive text, captioning target): `caption` or a key of the sample's json; null for none."""
    text: str | None = "caption"
    """Field that becomes the bidirectional text (masked language, matching, questions of a task); null for none."""
    prompt: str | None = None
    """Field whose text goes before the causal text and is read but not learned, such as the question of task.name=answering; it takes at
    most half of max_text_tokens. null for none."""
    label: str | None = None
    """Field that holds a task's target; null for none."""
    labels: list[str] | None = None
    """The label vocabulary in order; null takes the sorted distinct values of `data.label` over the training shards."""
    tokenizer: str | None = None
    """A transformers tokenizer folder; null takes `tokenizer/` inside the shards folder."""
    max_text_tokens: int = 64
    """Longest text in tokens, the two special tokens included; longer text is cut."""
    begin: bool = True
    """Texts start with the tokenizer's begin token. false for SigLIP's text towers, which were trained without."""
    pad_captions: int = 0
    """Fill captions up to so many tokens with the tokenizer's pad token, which counts as text, as SigLIP's were to 64; 0 for not."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    keep: dict[str, Any] = field(default_factory=dict)
    """Part of an item's patches that the model sees in training, by modality: {image: 0.5} (Li et al. 2023, FLIP). Which ones is chosen by
    (train.seed, position). A mapping {step: part} gives the part from each step on. A modality that is not named is seen whole."""


def reads_no_words(data: DataConfig) -> bool:
    """Whether no text is read, so that no tokenizer is needed."""
    return data.caption is None and data.text is None and data.prompt is None


def missing_tokenizer(data: DataConfig, folder: Path) -> str:
    """What is said of a tokenizer folder that is not there, and of how to make one that has the words that the stage reads."""
    fields = [f for f in dict.fromkeys((data.caption, data.text, data.prompt)) if f not in (None, "caption")]
    own = f" tokenizer.fields=[{','.join(fields)}]" if fields else ""
    return (
        f"There is no tokenizer folder {str(folder)!r}. Repeat the `mmscale shards write` command of the shards with "
        f"tokenizer.kind=wordpiece{own} (what is written stays), or give `data.tokenizer` the folder of a transformers tokenizer."
    )


def keep_schedules(keep: Mapping[str, Any], modalities: Collection[str], global_batch: int) -> dict[str, Schedule]:
    """Read `data.keep` as a function of the position alone, so that a resumed run drops what the undisturbed one does.

    Args:
        keep: `data.keep`.
        modalities: names that it may have.
        global_batch: positions of a step.

    Returns:
        By modality (first position, part) pairs, ascending, from position 0 on.

    Raises:
        ConfigError: an unknown modality, a part outside (0, 1], a negative step.
    """
    schedules = {}
    for name, given in keep.items():
        if name not in modalities:
            raise ConfigError(f"`data.keep.{name}` names no modality of the model; it has {', '.join(sorted(modalities))}.")
        by_step: dict[Any, Any] = {0: given}
        if isinstance(given, Mapping):  # the keys of a mapping that went through JSON are texts
            by_step = {0: 1.0} | {int(s) if isinstance(s, str) and s.isdecimal() else s: part for s, part in given.items()}
        for step, part in by_step.items():
            if not (isinstance(part, (int, float)) and not isinstance(part, bool) and 0 < part <= 1):
                raise ConfigError(f"`data.keep.{name}` must be above 0 and at most 1, or a mapping from steps to such parts; got {given}.")
            if not (isinstance(step, int) and step >= 0):
                raise ConfigError(f"`data.keep.{name}`: a step must be a whole number from 0 on; got {step!r}.")
        schedules[name] = tuple((step * global_batch, float(by_step[step])) for step in sorted(by_step))
    return schedules


def training_places(data: DataConfig) -> list[str]:
    """Folder or URL of every data set that is trained on."""
    sources = mixture_sources(data)
    return [source.path for source in sources] if sources else [str(data.shards)]


def mixture_sources(data: DataConfig) -> list[SourceConfig] | None:
    """Read `data.shards` as a mixture; None where it is one data set.

    Raises:
        ConfigError: an entry that is no source, two of one name, weights for some only, or settings of mixtures without one.
    """
    if not isinstance(data.shards, list):
        if data.weights_from or data.temperature != 1.0:
            raise ConfigError("`data.weights_from` and `data.temperature` need a mixture. Make `data.shards` a list of {path, weight}.")
        return None
    if not data.shards:
        raise ConfigError("`data.shards` is an empty list. Name at least one data set, such as {path: data/a, weight: 1}.")
    sources = [_source(number, entry) for number, entry in enumerate(data.shards)]
    names = [source_name(source) for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"`data.shards`: the sources' names must differ; got {', '.join(names)}. Give one of them another `name`.")
    for what, given in (("weight", [s.weight for s in sources]), ("epochs", [s.epochs for s in sources])):
        if any(g is None for g in given) and any(g is not None for g in given):
            raise ConfigError(f"`data.shards`: either all sources have `{what}` or none; got {given}.")
    if sources[0].weight is not None and sources[0].epochs is not None:
        raise ConfigError("`data.shards`: a source has either `weight` or `epochs`. Remove one of them.")
    return sources


def source_name(source: SourceConfig) -> str:
    """What goes before the keys of a source."""
    return source.name or PurePosixPath(source.path).name


def _source(number: int, entry: Any) -> SourceConfig:
    where = f"data.shards[{number}]"
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"`{where}` must be a folder or a mapping such as {{path: data/a, weight: 1}}; got {entry!r}.")
    return configfile.build(SourceConfig, [(where, entry)])
