import itertools

import numpy as np
import pytest

from mmscale.augment_config import AugmentConfig
from mmscale.data.augment import augment, draws_for, follows, is_active, rewrite

EVERYTHING = AugmentConfig(shift=3, scale=0.2, flip=0.5, brightness=0.3, contrast=0.3, channel_permutation=True, dihedral=True)


def image(side: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_the_result_belongs_to_seed_and_position():
    first = [augment(image(), EVERYTHING, 1, p) for p in range(20)]
    again = [augment(image(), EVERYTHING, 1, p) for p in reversed(range(20))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(augment(image(), EVERYTHING, 2, 0), first[0])
    assert len({a.tobytes() for a in first}) == 20
    assert all(a.shape == (24, 24, 3) and a.dtype == np.uint8 and a.flags.c_contiguous for a in first)


def test_no_augmentation_changes_nothing():
    assert not is_active(AugmentConfig())
    assert is_active(EVERYTHING)
    assert np.array_equal(augment(image(), AugmentConfig(), 0, 5), image())


def test_shift_moves_whole_pixels_and_repeats_the_border():
    source = image()
    seen = set()
    for position in range(200):
        moved = augment(source, AugmentConfig(shift=2), 0, position)
        matches = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if np.array_equal(moved, np.pad(source, ((2, 2), (2, 2), (0, 0)), mode="edge")[2 - dy : 26 - dy, 2 - dx : 26 - dx])
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 25


def test_flip_takes_its_share():
    flipped = sum(np.array_equal(augment(image(), AugmentConfig(flip=0.25), 0, p), image()[:, ::-1]) for p in range(1000))
    assert 200 < flipped < 300


def test_dihedral_gives_the_eight_symmetries_and_channels_the_six_orders():
    assert len({augment(image(), AugmentConfig(dihedral=True), 0, p).tobytes() for p in range(200)}) == 8
    orders = {augment(image(), AugmentConfig(channel_permutation=True), 0, p).tobytes() for p in range(200)}
    assert len(orders) == 6


def test_zoom_keeps_the_middle_in_the_middle():
    dot = np.zeros((31, 31, 3), np.uint8)
    dot[12:19, 12:19] = 255
    for position in range(50):
        zoomed = augment(dot, AugmentConfig(scale=0.3), 0, position).astype(float).sum(-1)
        assert zoomed.sum(1) @ np.arange(31) / zoomed.sum() == pytest.approx(15, abs=0.1)
    areas = [augment(dot, AugmentConfig(scale=0.3), 0, p).sum() / dot.sum() for p in range(200)]
    assert 0.45 < min(areas) < 0.6
    assert 1.5 < max(areas) < 1.75


def test_brightness_and_contrast_stay_in_their_range():
    grey = np.full((8, 8, 3), 100, np.uint8)
    values = [int(augment(grey, AugmentConfig(brightness=0.2), 0, p)[0, 0, 0]) for p in range(300)]
    assert min(values) in (80, 81)
    assert max(values) in (119, 120)
    ramp = np.repeat(np.arange(50, 150, dtype=np.uint8)[:, None], 3, axis=1)[:, None].repeat(100, axis=1)
    spread = [augment(ramp, AugmentConfig(contrast=0.5), 0, p).std() / ramp.std() for p in range(300)]
    assert 0.49 < min(spread) < 0.52
    assert 1.48 < max(spread) < 1.51


def test_turning_one_change_on_leaves_the_others_as_they_were():
    plain = augment(image(), AugmentConfig(shift=2), 0, 9)
    coloured = augment(image(), AugmentConfig(shift=2, channel_permutation=True), 0, 9)
    assert sorted(plain.reshape(-1, 3).sum(1)) == sorted(coloured.reshape(-1, 3).sum(1))
    assert np.array_equal(plain.sum(-1), coloured.sum(-1))


DIRECTIONS, COLOURS = ["above", "right of", "below", "left of"], ["red", "green", "blue"]
PLACES = [(2, 12), (12, 21), (21, 12), (12, 2)]
"""Row and column of a dot above, right of, below and left of the middle."""


def dot(direction: int, colour: int) -> np.ndarray:
    drawn = np.zeros((24, 24, 3), np.uint8)
    row, column = PLACES[direction]
    drawn[row - 2 : row + 2, column - 2 : column + 2, colour] = 255
    return drawn


def seen(drawn: np.ndarray) -> tuple[int, int]:
    """Direction and colour of the dot in an image."""
    brightest = [drawn[row - 1 : row + 1, column - 1 : column + 1].sum(dtype=int) for row, column in PLACES]
    return int(np.argmax(brightest)), int(np.argmax(drawn.sum((0, 1), dtype=int)))


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(flip=0.5, directions=DIRECTIONS),
        AugmentConfig(dihedral=True, directions=DIRECTIONS),
        AugmentConfig(flip=0.5, dihedral=True, directions=DIRECTIONS, channel_permutation=True, colours=COLOURS),
    ],
)
def test_what_the_text_says_stays_true_of_the_image(config: AugmentConfig):
    said = set()
    for position in range(300):
        direction, colour = position % 4, position % 3
        changed = augment(dot(direction, colour), config, 0, position)
        where, what = seen(changed)
        text = rewrite(
            f"Is a {COLOURS[colour]} dot {DIRECTIONS[direction].upper()} it? rightly belowground", config, draws_for(0, np.array([position]))[0]
        )
        assert text.removesuffix(" it? rightly belowground").casefold() == f"is a {COLOURS[what]} dot {DIRECTIONS[where]}"
        said.add((direction, where, what))
    assert len(said) == (48 if config.colours else 16 * 3 if config.dihedral else 6 * 3)


def test_texts_follow_only_what_happens_to_the_image():
    assert not follows(AugmentConfig(directions=DIRECTIONS, channel_permutation=True))
    assert follows(AugmentConfig(directions=DIRECTIONS, flip=0.5))
    assert not follows(AugmentConfig(colours=COLOURS, dihedral=True))
    text, draws = "red above blue", draws_for(0, np.arange(50))
    assert {rewrite(text, AugmentConfig(directions=DIRECTIONS, channel_permutation=True), d) for d in draws} == {text}
    assert {rewrite(text, AugmentConfig(colours=COLOURS, dihedral=True), d) for d in draws} == {text}


@pytest.mark.parametrize(
    ("colours", "text", "expected"),
    [
        (["kırmızı", "yeşil", "mavi"], "KIRMIZI daire, kirmizi kare", "{0} daire, {0} kare"),
        (["weiß", "grün", "blau"], "Ein weiß und ein Weiß, weißer", "Ein {0} und ein {0}, weißer"),
        (["लाल", "हरा", "नीला"], "वर्ग नीला है", "वर्ग {2} है"),
        (["नीचे", "हरा", "नीला"], "वर्ग नीचे है", "वर्ग {0} है"),
        (["bright red", "red", "blue"], "a bright red, a red, infrared", "a {0}, a {1}, infrared"),
    ],
)
def test_words_are_found_in_other_scripts(colours, text, expected):
    config = AugmentConfig(colours=colours, channel_permutation=True)
    found = {rewrite(text, config, draws) for draws in draws_for(0, np.arange(200))}
    assert found == {expected.format(*order) for order in itertools.permutations(colours)}
