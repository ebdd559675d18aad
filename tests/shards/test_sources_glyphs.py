import numpy as np
from PIL import Image

from shards.config import GlyphsConfig
from shards.sources.glyphs import GlyphSource, family_and_style, grey_png, name_in_script, script_of
from shards.sources.record import Record
from tests.shards.pictures import decoded


def test_splits_are_whole_styles() -> None:
    train = GlyphSource(GlyphsConfig(split="train")).records()
    held_out = GlyphSource(GlyphsConfig(split="heldout")).records()
    assert len(train) > 40_000
    assert len(held_out) > 10_000
    assert len({record.key for record in train + held_out}) == len(train) + len(held_out)
    styles = {record.key.split("-")[1] for record in held_out}
    assert styles == {"boldoblique", "bolditalic"}
    assert styles.isdisjoint(record.key.split("-")[1] for record in train)
    assert len(GlyphSource(GlyphsConfig(split="all")).records()) == len(train) + len(held_out)


def test_every_and_limit() -> None:
    every = GlyphSource(GlyphsConfig(every=100)).records()
    assert GlyphSource(GlyphsConfig(every=100, limit=7)).records() == every[:7]


def test_a_glyph() -> None:
    source = GlyphSource(GlyphsConfig())
    record = next(record for record in source.records() if record.key == "dejavusans-bold-u0041")
    raw = source.load(record)
    assert raw.captions == ("LATIN CAPITAL LETTER A",)
    names = {"script": "LATIN", "name_in_script": "CAPITAL LETTER A"}
    assert raw.fields == {"codepoint": 65, "char": "A", "font": "DejaVuSans", "style": "Bold"} | names
    assert raw.image is not None
    pixels = decoded(raw.image)
    assert pixels.shape == (32, 32, 3)
    ink = np.flatnonzero((pixels[..., 0] < 128).any(axis=0))
    assert abs((ink[0] + ink[-1]) / 2 - 15.5) <= 1  # centred


def test_every_glyph_has_ink_inside_the_square() -> None:
    for size in (16, 32):
        source = GlyphSource(GlyphsConfig(split="all", size=size, every=150))
        for record in source.records():
            image = source.load(record).image
            assert image is not None
            pixels = decoded(image)
            assert pixels.shape == (size, size, 3), record.key
            assert pixels.min() < 200, record.key


def test_wide_glyph_is_drawn_smaller() -> None:
    source = GlyphSource(GlyphsConfig())
    image = source.load(Record("k", "w", ("DejaVuSans.ttf", 0x2A0C))).image
    assert image is not None
    assert (decoded(image)[:, [0, -1]] == 255).all()


def test_grey_png_is_what_pillow_reads() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8)
    assert np.array_equal(decoded(grey_png(pixels.tobytes(), 9))[..., 0], pixels)
    assert Image.fromarray(pixels).mode == "L"


def test_names() -> None:
    assert family_and_style("DejaVuSansMono-BoldOblique") == ("DejaVuSansMono", "BoldOblique")
    assert family_and_style("DejaVuSansDisplay") == ("DejaVuSansDisplay", "Regular")
    assert family_and_style("STIXGeneralBolIta") == ("STIXGeneral", "BoldItalic")
    assert script_of("GREEK SMALL LETTER ALPHA") == "GREEK"
    assert script_of("SNOWMAN") == "OTHER"
    assert name_in_script("GREEK SMALL LETTER ALPHA") == "SMALL LETTER ALPHA"
    assert name_in_script("MATHEMATICAL BOLD CAPITAL A") == "MATHEMATICAL BOLD CAPITAL A"
