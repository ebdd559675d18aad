"""Sound is moved, made louder and masked as its position says, and by nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from mmscale.augment_config import AugmentConfig
from mmscale.data.augment import Augmentation, draws_for
from mmscale.modalities.audio import Audio
from mmscale.modalities.modality import Change
from shards.sample import Sample
from tests.shards.recordings import tone

AUDIO = Audio(mels=16, patch=8, max_seconds=0.4)
WAVE = np.random.default_rng(0).normal(size=1000).astype(np.float32)
SPECTRUM = np.random.default_rng(1).normal(size=(100, 40)).astype(np.float32)


def change(position: int, seed: int = 0, **keys) -> Augmentation:
    return Augmentation(AugmentConfig(**keys), draws_for(seed, np.array([position]))[0])


def patches(position: int, **keys) -> np.ndarray:
    out = np.empty((AUDIO.max_patches, AUDIO.values), np.float32)
    AUDIO.read(Sample("k", {"wav": tone(0.4)}), out, change(position, **keys) if keys else Change())
    return out


def test_the_result_belongs_to_seed_and_position() -> None:
    keys = {"roll": 0.5, "gain": 6.0, "time_mask": 0.3, "frequency_mask": 0.3}
    first = [patches(p, **keys) for p in range(8)]
    assert all(np.array_equal(a, patches(p, **keys)) for p, a in reversed(list(enumerate(first))))
    assert len({a.tobytes() for a in first}) == 8
    assert not np.array_equal(change(3, **keys).wave(WAVE), change(3, seed=1, **keys).wave(WAVE))


def test_off_is_off() -> None:
    plain = patches(0)
    assert np.array_equal(patches(5, brightness=0.5, shift=2), plain)
    for key, value in {"roll": 0.5, "gain": 6.0, "time_mask": 0.9, "frequency_mask": 0.9}.items():
        assert any(not np.array_equal(patches(p, **{key: value}), plain) for p in range(3)), key


def test_roll_moves_in_a_circle_and_not_too_far() -> None:
    ramp = np.arange(1000, dtype=np.float32)
    moves = []
    for position in range(300):
        rolled = change(position, roll=0.1).wave(ramp)
        move = int(np.argmin(rolled))
        assert np.array_equal(rolled, np.roll(ramp, move))
        moves.append(move if move < 500 else move - 1000)
    assert min(moves) in range(-100, -95)
    assert max(moves) in range(96, 101)
    assert abs(np.mean(moves)) < 12


def test_gain_is_in_decibels_and_shifts_a_spectrogram() -> None:
    factors = np.array([change(p, gain=6.0).wave(np.ones(1, np.float32))[0] for p in range(300)])
    decibels = 20 * np.log10(factors)
    assert -6 <= decibels.min() < -5.8
    assert 5.8 < decibels.max() <= 6
    louder = patches(7, gain=6.0) - patches(0)
    np.testing.assert_allclose(louder, 20 * np.log10(factors[7]) / 10 / 4, atol=1e-4)  # log-mel is log10 of power over four


@pytest.mark.parametrize(("key", "axis"), [("time_mask", 0), ("frequency_mask", 1)])
def test_masks_hide_two_stretches_at_most_so_wide(key: str, axis: int) -> None:
    longest, seen = 0, set()
    for position in range(300):
        masked = change(position, **{key: 0.2}).spectrum(SPECTRUM)
        hidden = (masked == SPECTRUM.mean()).all(1 - axis)
        assert np.array_equal(np.compress(~hidden, masked, axis), np.compress(~hidden, SPECTRUM, axis))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden, [0]])))
        assert len(edges) <= 4
        widths = edges[1::2] - edges[::2]
        assert hidden.sum() <= 2 * 0.2 * SPECTRUM.shape[axis]
        longest = max(longest, *(int(w) for w in widths), 0)
        seen |= set(np.flatnonzero(hidden).tolist())
    assert longest >= 0.2 * SPECTRUM.shape[axis]
    assert seen == set(range(SPECTRUM.shape[axis]))


def test_turning_one_change_on_leaves_the_others_as_they_were() -> None:
    alone = change(9, time_mask=0.3).spectrum(SPECTRUM) == SPECTRUM.mean()
    both = change(9, time_mask=0.3, frequency_mask=0.3, roll=0.5).spectrum(SPECTRUM) == SPECTRUM.mean()
    assert np.array_equal(both.all(1), alone.all(1))
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    assert np.array_equal(change(9, shift=3, flip=0.5)(picture), change(9, shift=3, flip=0.5, roll=0.5, gain=3.0)(picture))
