"""The `data.augment` section of a stage file: what training changes in samples. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shards.configfile import need

SOUND = ("roll", "gain", "time_mask", "frequency_mask")
"""Keys that change sound."""
MIXES = ("mixup", "cutmix")
"""Keys that make one sample of two."""
MIXED_TASKS = ("classification", "tagging")
"""Tasks whose targets can be mixed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation at training time, keyed by (train.seed, position): of pictures, sound, texts, and of samples laid over one another."""

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
    roll: float = 0.0
    """Sound: moved in time by at most such a part of its length each way, in a circle; 0.5 is to any place."""
    gain: float = 0.0
    """Sound: largest change of loudness in decibels, 6 for +-6 dB."""
    time_mask: float = 0.0
    """Sound: two stretches of the spectrogram, each at most such a part of its time, become its mean (Park et al. 2019, SpecAugment)."""
    frequency_mask: float = 0.0
    """Sound: the same of its mel bands."""
    word_mask: float = 0.0
    """Text: part of the tokens of `data.text` that a [MASK] stands for, so that a task does not lean on single words."""
    mixup: float = 0.0
    """Classification and tagging of pictures, clips and sound: alpha of the Beta distribution by which two samples are laid over one
    another, and their labels with them (Zhang et al. 2018), such as 0.4; 0 for not. Pairs are neighbouring positions, 2i and 2i + 1."""
    cutmix: float = 0.0
    """The same of a box of one sample in the other's place, labels by area (Yun et al. 2019), such as 1; 0 for not. With both, half of
    the samples are mixed by the one and half by the other."""

    @property
    def mixes(self) -> str | None:
        """The key by which samples are mixed, the first of two; None where they are not."""
        return next((key for key in MIXES if getattr(self, key)), None)

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        for key, words, count in (("directions", self.directions, 4), ("colours", self.colours, 3)):
            need(
                words is None or len({word.casefold() for word in words}) == len(words) == count,
                f"`data.augment.{key}` must be {count} different phrases or null; got {words}.",
            )
        for key, most in (("roll", 0.5), ("time_mask", 1.0), ("frequency_mask", 1.0), ("word_mask", 1.0), ("flip", 1.0)):
            value = getattr(self, key)
            need(0 <= value <= most, f"`data.augment.{key}` is a part, from 0 to {most:g}; got {value:g}.")
        need(0 <= self.scale < 1, f"`data.augment.scale` must be at least 0 and below 1; got {self.scale:g}.")
        for key in ("gain", "shift", "brightness", "contrast", *MIXES):
            value = getattr(self, key)
            need(value >= 0, f"`data.augment.{key}` must be above 0, or 0 for none; got {value:g}.")

    def check_sound(self, modalities: Collection[str]) -> None:
        """Raise ConfigError for changes of sound in a model that hears none; `modalities` are its own."""
        asked = [key for key in SOUND if getattr(self, key)]
        need(
            not asked or bool(set(modalities) - {"image", "video"}),
            f"`data.augment.{asked[0] if asked else ''}` changes sound, and the model hears none. Give it ears with "
            "model.modalities.audio=audio, or leave the key out.",
        )

    def check_word_mask(self, is_masked: bool) -> None:
        """Raise ConfigError for words that masked language, if it is trained, hides already."""
        need(
            not (self.word_mask and is_masked),
            "`data.augment.word_mask` and `objectives.masked_language` both hide words of `data.text`, the one to be done without and the "
            "other to be guessed. Use one of them in a stage.",
        )

    def check_mixes(self, task: str | None, text: str | None, others: Sequence[str]) -> None:
        """Raise ConfigError for samples that cannot be mixed.

        Args:
            task: `task.name`.
            text: `data.text`.
            others: objectives besides the task's.
        """
        key = self.mixes
        if key is None:
            return
        need(
            task is not None and (task in MIXED_TASKS or "." in task),
            f"`data.augment.{key}` mixes labels, and task.name = {task} has none to mix. It goes with {' and '.join(MIXED_TASKS)}.",
        )
        need(
            not others,
            f"`data.augment.{key}` makes one sample of two, and objectives.{others[0] if others else ''} learns from single ones. "
            f"Set its weight to 0, or {key}=0.",
        )
        need(
            text is None,
            f"`data.augment.{key}` mixes pictures and sound; texts cannot be mixed, and data.text = {text} is read. Set data.text=null, "
            f"or {key}=0.",
        )
