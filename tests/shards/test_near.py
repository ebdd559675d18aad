import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from shards.errors import ConfigError
from shards.perceptual import THUMBNAIL_BYTES, TOLERANCE, look_of
from shards.versions import near
from shards.versions.near import EXACT, Features, find_duplicates
from tests.shards.pictures import encoded

THUMBNAILS = (bytes(THUMBNAIL_BYTES), bytes([TOLERANCE]) * THUMBNAIL_BYTES, bytes([TOLERANCE + 1]) + bytes(THUMBNAIL_BYTES - 1))
"""The first looks like the second and unlike the third; the second looks like the third."""


@st.composite
def rows(draw):
    """Draw samples that lie close together: (exact or None, structure or None, thumbnail, label)."""
    structures = st.one_of(st.none(), st.lists(st.integers(0, 63), max_size=4).map(lambda bits: sum({1 << bit for bit in bits})))
    row = st.tuples(st.one_of(st.none(), st.integers(0, 12)), structures, st.integers(0, 2), st.integers(0, 1))
    return draw(st.lists(row, max_size=40))


def features(drawn):
    """Put drawn samples into columns; a sample without a picture has no look."""
    looks = [exact is not None and structure is not None for exact, structure, _, _ in drawn]
    return Features(
        exact_n2=np.array([[exact or 0, 7] for exact, *_ in drawn], dtype=np.uint64).reshape(-1, 2),
        has_picture_n=np.array([exact is not None for exact, *_ in drawn], dtype=np.bool_),
        structure_n=np.array([structure or 0 for _, structure, _, _ in drawn], dtype=np.uint64),
        thumbnail_n=pa.chunked_array([pa.array([THUMBNAILS[t] for _, _, t, _ in drawn], pa.binary(THUMBNAIL_BYTES))]),
        thumbnail_digest_n=np.array([t for _, _, t, _ in drawn], dtype=np.uint64),
        has_look_n=np.array(looks, dtype=np.bool_),
        label_n=np.array([label for *_, label in drawn], dtype=np.uint64),
    )


def by_the_book(drawn, bits, references):
    """Judge sample after sample against all before it."""
    of, distance = [], []
    for number, (exact, structure, thumbnail, label) in enumerate(drawn):
        found = (-1, EXACT)
        if number >= references and exact is not None:
            equal = [e for e in range(number) if drawn[e][0] == exact and drawn[e][3] == label]
            alike = [
                ((drawn[e][1] ^ structure).bit_count(), e)
                for e in range(number)
                if bits is not None and structure is not None and of[e] < 0 and None not in drawn[e][:2]
                if drawn[e][3] == label and (drawn[e][1] ^ structure).bit_count() <= bits and {drawn[e][2], thumbnail} != {0, 2}
            ]
            if equal:
                first = equal[0]
                found = (first, EXACT) if of[first] < 0 else (of[first], distance[first])
            elif alike:
                found = min(alike)[::-1]
        of.append(found[0])
        distance.append(found[1])
    return of, distance


@settings(max_examples=400)
@given(rows(), st.one_of(st.none(), st.integers(0, 12)), st.integers(0, 10))
def test_the_same_as_comparing_each_with_all_before_it(drawn, bits, references):
    references = min(references, len(drawn))
    of_n, distance_n = find_duplicates(features(drawn), bits, references)
    assert (of_n.tolist(), distance_n.tolist()) == by_the_book(drawn, bits, references)


def test_every_close_pair_is_found_among_many():
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**64, 3000, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(bit) for bit in generator.choice(64, count, replace=False)) for count in generator.integers(0, 7, 1000)], np.uint64
    )
    words[1000:2000] = words[:1000] ^ flips
    for bits in (0, 3, 6):
        i, j, distance = near._near_pairs(words, np.zeros(3000, np.uint64), bits)
        between = np.bitwise_count(words[:, None] ^ words[None, :])
        expected = {(a, b) for a, b in np.argwhere(between <= bits).tolist() if a < b}
        assert set(zip(i.tolist(), j.tolist(), strict=True)) == expected
        assert distance.tolist() == between[i, j].tolist()


def test_no_chain_joins_what_is_far_apart():
    drawn = [(number, (1 << number) - 1, 0, 0) for number in range(6)]  # each is one bit from the next
    of_n, _ = find_duplicates(features(drawn), 1, 0)
    assert of_n.tolist() == [-1, 0, -1, 2, -1, 4]


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(near, "_MOST_PAIRS", 100)
    words = np.array([1 << a | 1 << b for a, b in itertools.combinations(range(10), 2)], dtype=np.uint64)
    with pytest.raises(ConfigError, match=r"`near`=4 makes more than 100 pairs of pictures alike\. Give a smaller number"):
        near._near_pairs(words, np.zeros(len(words), np.uint64), 4)


def drawing(number, side=160):
    """Draw some shapes that depend on a number."""
    generator = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, radius = (int(value) for value in generator.integers((0, 0, 15), (side, side, 60)))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(int(v) for v in generator.integers(0, 255, 3)))
    return image


def alike(one, other, bits=3):
    drawn = [look_of(data) for data in (one, other)]
    values = [np.frombuffer(look.thumbnail, np.uint8).astype(int) for look in drawn]
    return (drawn[0].structure ^ drawn[1].structure).bit_count() <= bits and np.abs(values[0] - values[1]).max() <= TOLERANCE


def test_resized_and_reencoded_pictures_look_the_same_and_others_do_not():
    pictures = [drawing(number) for number in range(20)]
    originals = [encoded(picture, "PNG") for picture in pictures]
    changed = [
        (original, variant)
        for picture, original in zip(pictures, originals, strict=True)
        for variant in (
            encoded(picture, quality=40),
            encoded(picture.resize((90, 90)), quality=80),
            encoded(picture.resize((400, 400)), "WEBP"),
        )
    ]
    assert sum(alike(*pair) for pair in changed) >= 0.95 * len(changed)
    assert not any(alike(a, b) for a, b in itertools.combinations(originals, 2))


def test_colour_tells_pictures_apart():
    red, blue = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(red).ellipse((10, 10, 54, 54), fill=(200, 0, 0))
    ImageDraw.Draw(blue).ellipse((10, 10, 54, 54), fill=(0, 60, 200))
    assert not alike(encoded(red, "PNG"), encoded(blue, "PNG"), bits=64)


def test_pictures_without_a_look():
    assert look_of(b"no picture") is None
    assert look_of(encoded(drawing(0))[:200]) is None
    assert look_of(encoded(Image.new("RGB", (50, 50), "tan"), "PNG")) is None


def test_stored_turned_or_transparent_pictures_are_seen_as_they_are_shown():
    picture = drawing(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert look_of(encoded(picture, "PNG")) == look_of(encoded(picture.rotate(90), "PNG", exif=exif))
    clear = picture.convert("RGBA")
    clear.putalpha(Image.eval(picture.convert("L"), lambda value: 255 if value < 255 else 0))
    assert look_of(encoded(clear, "PNG")) == look_of(encoded(picture, "PNG"))
