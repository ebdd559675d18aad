"""Augmentation of pictures, and where that of sound starts: a pure function of (seed, position), the same on any rank, worker and resume.

Images are changed, and words that name directions or colours in them can follow: a picture that is mirrored swaps its left and right
(as do the texts of Kamath et al. 2021, MDETR).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmscale.augment_config import AugmentConfig
from mmscale.data.augment_sound import DRAWS as SOUND_DRAWS
from mmscale.data.augment_sound import apply_to_spectrum, apply_to_wave
from mmscale.data.keyed import Purpose, uniform
from mmscale.modalities.modality import Change

PICTURE_DRAWS = 8
DRAWS = PICTURE_DRAWS + SOUND_DRAWS
"""Numbers a sample takes; each kind of change has its own place, so that turning one on leaves the others as they were."""

_SHIFT_X, _SHIFT_Y, _SCALE, _FLIP, _BRIGHTNESS, _CONTRAST, _CHANNELS, _DIHEDRAL = range(PICTURE_DRAWS)
_PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def draws_for(seed: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw what `apply` needs: (M, DRAWS) numbers in (0, 1)."""
    return uniform(seed, positions, Purpose.AUGMENT, DRAWS)


@dataclass(frozen=True, slots=True)
class Augmentation(Change):
    """The changes of one position."""

    config: AugmentConfig
    draws: NDArray[np.float64]
    """(DRAWS,) numbers in (0, 1)."""

    def __call__(self, picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Augment a picture of any shape."""
        return apply(picture_HWC, self.config, self.draws)

    def wave(self, wave_N: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move a sound in time and change its loudness."""
        return apply_to_wave(wave_N, self.config, self.draws[PICTURE_DRAWS:])

    def spectrum(self, heard_TB: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hide stretches of a spectrogram."""
        return apply_to_spectrum(heard_TB, self.config, self.draws[PICTURE_DRAWS:])


def is_active(config: AugmentConfig) -> bool:
    """Whether the configuration changes any picture or sound by itself."""
    return replace(config, word_mask=0.0, mixup=0.0, cutmix=0.0) != AugmentConfig()


def augment(image: NDArray[np.uint8], config: AugmentConfig, seed: int, position: int) -> NDArray[np.uint8]:
    """Augment the image of one position.

    Args:
        image: (S, S, 3) uint8.
        config: which changes, and how strong.
        seed: the run's seed.
        position: the sample's global position.

    Returns:
        A new (S, S, 3) uint8.
    """
    return apply(image, config, draws_for(seed, np.array([position]))[0])


def apply(image: NDArray[np.uint8], config: AugmentConfig, draws: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Augment an image by numbers already drawn: move and zoom, mirror and turn, then colour.

    Args:
        image: (H, W, 3) uint8; a quarter turn (`dihedral`) of one that is not square exchanges its sides.
        config: which changes, and how strong.
        draws: (DRAWS,) numbers in (0, 1).
    """
    changed = _move(image, config, draws)
    if config.flip > 0 and draws[_FLIP] < config.flip:
        changed = changed[:, ::-1]
    if config.dihedral:
        turn = int(draws[_DIHEDRAL] * 8)
        changed = np.rot90(changed[:, ::-1] if turn >= 4 else changed, turn % 4)
    if config.channel_permutation:
        changed = changed[..., _PERMUTATIONS[int(draws[_CHANNELS] * 6)]]
    return np.array(_recolour(changed, config, draws), order="C")


def rewrite(text: str, config: AugmentConfig, draws: NDArray[np.float64]) -> str:
    """Let the words that `config.directions` and `config.colours` name follow an image that `apply` changes by the same draws.

    Args:
        text: what is said of the image; phrases are found as whole words, in any case, and each is replaced once.
        config: as of `apply`.
        draws: (DRAWS,) numbers in (0, 1).
    """
    phrases = _followed(config, draws)
    if not phrases:
        return text
    pattern, order = _pattern(tuple(phrases))
    return pattern.sub(lambda found: phrases[order[(found.lastindex or 1) - 1]], text)


def follows(config: AugmentConfig) -> bool:
    """Whether the configuration changes any text."""
    return bool((config.directions and (config.flip or config.dihedral)) or (config.colours and config.channel_permutation))


def _followed(config: AugmentConfig, draws: NDArray[np.float64]) -> dict[str, str]:
    """Phrase -> the phrase that is true of the changed image."""
    phrases: dict[str, str] = {}
    if config.directions:
        turn = int(draws[_DIHEDRAL] * 8) if config.dihedral else 0
        mirrored = (config.flip > 0 and draws[_FLIP] < config.flip) != (turn >= 4)
        for place, phrase in enumerate(config.directions):  # a mirror swaps right and left, a turn goes against the clock
            phrases[phrase] = config.directions[((-place if mirrored else place) - turn) % 4]
    if config.colours and config.channel_permutation:
        for new, old in enumerate(_PERMUTATIONS[int(draws[_CHANNELS] * 6)]):
            phrases[config.colours[old]] = config.colours[new]
    return phrases


@lru_cache(maxsize=16)
def _pattern(phrases: tuple[str, ...]) -> tuple[re.Pattern[str], list[str]]:
    """What finds a phrase as whole words, in any case, and the phrase that each of its groups stands for.

    A word ends where no letter or digit follows: `\\b` would see an end inside of words with vowel signs, such as those of Hindi.
    """
    longest_first = sorted(phrases, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(f'({re.escape(phrase)})' for phrase in longest_first)})(?!\w)", re.IGNORECASE), longest_first


def _move(image: NDArray[np.uint8], config: AugmentConfig, draws: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Shift and zoom; what comes in from outside repeats the border."""
    height, width = image.shape[:2]
    shift_x, shift_y = (int(draws[i] * (2 * config.shift + 1)) - config.shift for i in (_SHIFT_X, _SHIFT_Y))
    zoom = 1 + config.scale * _signed(draws[_SCALE])
    margin = max(0, int(np.ceil(max(height, width) * (1 / zoom - 1) / 2))) + 1 if config.scale > 0 else 0
    if not (margin or shift_x or shift_y):
        return image
    rows = np.clip(np.arange(-margin, height + margin) - shift_y, 0, height - 1)
    columns = np.clip(np.arange(-margin, width + margin) - shift_x, 0, width - 1)
    moved: NDArray[np.uint8] = image[rows][:, columns]
    if not margin:
        return moved
    centre = (margin + width / 2, margin + height / 2)
    half = (width / zoom / 2, height / zoom / 2)
    box = (centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1])
    return np.asarray(Image.fromarray(moved).resize((width, height), Image.Resampling.BILINEAR, box=box))


def _recolour(image: NDArray[np.uint8], config: AugmentConfig, draws: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Brightness scales values, contrast spreads them about the image's mean; both are one look-up table."""
    if not (config.brightness or config.contrast):
        return image
    brighter = 1 + config.brightness * _signed(draws[_BRIGHTNESS])
    stronger = 1 + config.contrast * _signed(draws[_CONTRAST])
    mean = image.mean() if config.contrast else 0.0
    table = ((np.arange(256) - mean) * stronger + mean) * brighter
    recoloured: NDArray[np.uint8] = np.empty(image.shape, np.uint8)
    np.take(np.rint(table).clip(0, 255).astype(np.uint8), image, out=recoloured, mode="clip")
    return recoloured


def _signed(draw: float) -> float:
    return float(2 * draw - 1)
