"""Augmentation of sound: moved in time, louder or softer, and with stretches of its spectrogram hidden.

Shape letters: N samples, T frames, B mel bands.

Source: Park et al. 2019 (SpecAugment), section 2: masks of time and of frequency, here of the spectrogram's own mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmscale.augment_config import AugmentConfig

Floats = NDArray[np.float32]
MASKS = 2
"""Stretches hidden of either axis, as in SpecAugment's policies LD and SM."""
DRAWS = 2 + 4 * MASKS
"""Numbers a sound takes: where it begins, how loud it is, then the width and place of each mask of time, of each of frequency."""


def apply_to_wave(wave_N: Floats, config: AugmentConfig, draws: NDArray[np.float64]) -> Floats:
    """Move a sound around in time, and make it louder or softer.

    Args:
        wave_N: samples; what leaves at one end comes back at the other.
        config: which changes, and how strong.
        draws: (DRAWS,) numbers in (0, 1).
    """
    if config.roll > 0:
        wave_N = np.roll(wave_N, round((2 * draws[0] - 1) * config.roll * len(wave_N)))
    if config.gain > 0:
        wave_N = wave_N * np.float32(10 ** ((2 * draws[1] - 1) * config.gain / 20))
    return wave_N


def apply_to_spectrum(heard_TB: Floats, config: AugmentConfig, draws: NDArray[np.float64]) -> Floats:
    """Hide stretches of a log-mel spectrogram: what is hidden becomes the mean.

    Args:
        heard_TB: frames by bands.
        config: which changes, and how strong.
        draws: (DRAWS,) numbers in (0, 1).
    """
    if not (config.time_mask or config.frequency_mask):
        return heard_TB
    hidden_TB, mean = heard_TB.copy(), heard_TB.mean()
    times, bands = draws[2 : 2 + 2 * MASKS], draws[2 + 2 * MASKS :]
    for mask in range(MASKS):
        hidden_TB[_stretch(len(heard_TB), config.time_mask, *times[2 * mask : 2 * mask + 2])] = mean
        hidden_TB[:, _stretch(heard_TB.shape[1], config.frequency_mask, *bands[2 * mask : 2 * mask + 2])] = mean
    return hidden_TB


def _stretch(length: int, most: float, wide: float, place: float) -> slice:
    """A stretch of 0 to `most` of a length, all widths and all places alike."""
    width = int(wide * (int(most * length) + 1))
    first = int(place * (length - width + 1))
    return slice(first, first + width)
