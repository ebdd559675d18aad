"""Glyph pairs: every named character of the fonts that matplotlib ships, drawn as an image, captioned with its Unicode name.

DejaVu and STIXGeneral have true Unicode character maps; matplotlib's other fonts (cm*, LastResort) have not. Needs no download.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from shards.config import GlyphsConfig
from shards.errors import SourceError
from shards.sources.record import RawSample, Record

HELD_OUT_STYLES = frozenset({"BoldOblique", "BoldItalic"})
SCRIPTS = frozenset(
    {
        "LATIN",
        "GREEK",
        "CYRILLIC",
        "ARMENIAN",
        "HEBREW",
        "ARABIC",
        "NKO",
        "LAO",
        "GEORGIAN",
        "CANADIAN",
        "OGHAM",
        "RUNIC",
        "TIFINAGH",
        "LISU",
        "BRAILLE",
        "COPTIC",
    }
)
"""First words of character names that name a script; every other character is of script OTHER."""

# Share of the picture's side that an em takes; taller or wider characters are drawn smaller.
_EM = 0.72
_STIX_STYLES = {"": "Regular", "Bol": "Bold", "Italic": "Italic", "BolIta": "BoldItalic"}


class GlyphSource:
    """Draws characters."""

    def __init__(self, config: GlyphsConfig) -> None:
        self._config = config
        self._folder = font_folder()
        self._fonts: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}

    def records(self) -> list[Record]:
        """List the glyphs font by font, by code point."""
        listed = [record for font in self._font_files() for record in _glyphs_of(font)]
        return listed[:: self._config.every][: self._config.limit]

    def load(self, record: Record) -> RawSample:
        """Draw one glyph in black on white."""
        file, code = record.locator
        char = chr(code)
        family, style = family_and_style(Path(file).stem)
        name = unicodedata.name(char)
        fields = {"codepoint": code, "char": char, "font": family, "style": style}
        fields |= {"script": script_of(name), "name_in_script": name_in_script(name)}
        return RawSample(image=self._draw(file, char), captions=(name,), fields=fields)

    def _font_files(self) -> list[Path]:
        files = [*self._folder.glob("DejaVu*.ttf"), *self._folder.glob("STIXGeneral*.ttf")]
        if not files:
            raise SourceError(
                f"matplotlib's font folder {str(self._folder)!r} holds no DejaVu or STIXGeneral font. Install matplotlib anew."
            )
        return sorted(file for file in files if self._config.split in ("all", split_of(family_and_style(file.stem)[1])))

    def _draw(self, file: str, char: str) -> bytes:
        """Draw a character on its baseline in the middle of the square, smaller if it would not fit."""
        side = self._config.size
        points = max(1, round(side * _EM))
        mask, (left, top) = self._mask(file, char, points)
        largest = max(mask.size)
        if largest > side - 2:
            points = max(1, points * (side - 2) // largest)
            mask, (left, top) = self._mask(file, char, points)
        width, height = mask.size
        ascent, descent = self._font(file, points).getmetrics()
        top = min(max(top + (side - ascent - descent) // 2, 0), max(side - height, 0))
        left = max((side - width) // 2, 0)
        picture = Image.new("L", (side, side), 255)
        picture.paste(0, (left, top, left + width, top + height), mask)
        return grey_png(picture.tobytes(), side)

    def _mask(self, file: str, char: str, points: int) -> tuple[Image.Image, tuple[int, int]]:
        """Return the ink of a character (mode L) and the offset of its top left corner from the line's."""
        core, offset = self._font(file, points).getmask2(char, mode="L")
        ink = Image.frombytes("L", core.size, bytes(core))
        return ink, (int(offset[0]), int(offset[1]))

    def _font(self, file: str, points: int) -> ImageFont.FreeTypeFont:
        if (file, points) not in self._fonts:
            # The basic layout: one character is drawn as the font's map says, wherever libraqm is or is not installed.
            path = str(self._folder / file)
            self._fonts[file, points] = ImageFont.truetype(path, points, layout_engine=ImageFont.Layout.BASIC)
        return self._fonts[file, points]


def font_folder() -> Path:
    """Find matplotlib's fonts without importing it, which costs more than drawing a thousand glyphs.

    Raises:
        SourceError: matplotlib is not installed.
    """
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise SourceError("source=glyphs draws with the fonts inside matplotlib, which is not installed. Run `pip install matplotlib`.")
    return Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


def grey_png(pixels: bytes, side: int) -> bytes:
    """Encode a square 8-bit grey picture: Pillow's encoder takes ten times as long for one as small as a glyph.

    Source: PNG specification, third edition, W3C.
    """
    rows = b"".join(b"\0" + pixels[start : start + side] for start in range(0, side * side, side))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    coded = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


def family_and_style(stem: str) -> tuple[str, str]:
    """Split a font's file name: `DejaVuSansMono-BoldOblique` is ("DejaVuSansMono", "BoldOblique")."""
    stix = re.fullmatch(r"STIXGeneral(\w*)", stem)
    if stix:
        return "STIXGeneral", _STIX_STYLES.get(stix[1], stix[1])
    family, _, style = stem.partition("-")
    return family, style or "Regular"


def split_of(style: str) -> str:
    """The split that a whole style belongs to: `train` or `heldout`."""
    return "heldout" if style in HELD_OUT_STYLES else "train"


def script_of(name: str) -> str:
    """The script that a character's name begins with, or OTHER."""
    first = name.split()[0]
    return first if first in SCRIPTS else "OTHER"


def name_in_script(name: str) -> str:
    """A character's name without the script that it begins with: `SMALL LETTER ALPHA` of `GREEK SMALL LETTER ALPHA`."""
    first, _, rest = name.partition(" ")
    return rest if first in SCRIPTS and rest else name


def _glyphs_of(file: Path) -> Iterator[Record]:
    """List the named characters that a font has ink for."""
    family, style = family_and_style(file.stem)
    prefix = f"{family}-{style}".lower()
    with TTFont(file, lazy=True) as font:
        locations = font["loca"].locations
        for code, glyph in sorted(font.getBestCmap().items()):
            number = font.getGlyphID(glyph)
            if number != 0 and locations[number] != locations[number + 1] and unicodedata.name(chr(code), ""):
                key = f"{prefix}-u{code:04x}"
                yield Record(key, f"{file.name}#U+{code:04X}", (file.name, code))
