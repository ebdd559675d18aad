"""Which samples are good enough: rules on size, captions and fields, judged one sample at a time and without reading its picture."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.condition import parse_condition
from shards.errors import ConfigError

_WORD = re.compile(r"\w+")
# Written without spaces between words: a denied word is looked for anywhere in the text.
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"})


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """Rules; null and empty ones are not asked. Rules on pictures judge samples that have one, rules on captions every caption there is."""

    require_image: bool = False
    """Drop samples without an image that has a readable header."""
    require_caption: bool = False
    """Drop samples without a caption."""
    min_side: int | None = None
    """Least shorter side in pixels."""
    max_side: int | None = None
    """Largest longer side in pixels."""
    min_pixels: int | None = None
    """Least width x height."""
    max_pixels: int | None = None
    """Largest width x height."""
    max_aspect: float | None = None
    """Largest longer side over shorter side, at least 1."""
    min_chars: int | None = None
    """Least length of a caption in characters."""
    max_chars: int | None = None
    """Largest length of a caption in characters."""
    min_words: int | None = None
    """Least number of words of a caption: runs of letters and digits."""
    max_words: int | None = None
    """Largest number of words of a caption."""
    scripts: list[str] = field(default_factory=list)
    """Scripts that captions are to be written in, by the first word of their letters' Unicode names: [LATIN], [CJK, HIRAGANA, KATAKANA]."""
    min_script_fraction: float = 0.9
    """Least fraction of a caption's letters in one of `scripts`; a caption without letters has 0."""
    deny: list[str] = field(default_factory=list)
    """Words or phrases that no caption may hold, as whole words, in any case."""
    deny_file: str | None = None
    """File of more of them, a line each, UTF-8."""
    where: list[str] = field(default_factory=list)
    """Conditions on KEY.json that must all hold: ["score>=0.5", "licence.name=CC-BY"]. A field that is missing meets none."""

    def check(self) -> None:
        """Check what types alone cannot say.

        Raises:
            ConfigError: a value out of range, an unknown script, a condition of another form, a file that cannot be read.
        """
        for name in ("min_side", "max_side", "min_pixels", "max_pixels", "max_aspect", "min_chars", "max_chars", "min_words", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` must be at least 1; got {value:g}.")
        for name in ("pixels", "side", "chars", "words"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ConfigError(f"`min_{name}`={low} is over `max_{name}`={high}: no sample would stay. Change one of them.")
        if not 0.0 < self.min_script_fraction <= 1.0:
            raise ConfigError(f"`min_script_fraction` must be over 0 and at most 1; got {self.min_script_fraction:g}.")
        for name in self.scripts:
            if name.upper() not in _known_scripts():
                raise ConfigError(
                    f"`scripts`: there is no script {name!r}. Unicode names letters of LATIN, CYRILLIC, ARABIC, CJK, HANGUL, ... ."
                )
        Judge(self)


class Judge:
    """Says of one sample whether the rules keep it. It depends on nothing but its arguments.

    Attributes:
        reads_text: whether any rule asks for captions or fields; without one the index alone is enough.

    Raises:
        ConfigError: a condition of another form, or a file that cannot be read.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._conditions = [parse_condition(text, "where") for text in config.where]
        self._denied = _Denied([*config.deny, *_lines(config.deny_file)])
        self._scripts = frozenset(name.upper() for name in config.scripts)
        limits = (config.min_chars, config.max_chars, config.min_words, config.max_words)
        self._judges_captions = bool(config.require_caption or self._denied or self._scripts or any(limit is not None for limit in limits))
        self.reads_text = self._judges_captions or bool(self._conditions)

    def __call__(self, width: int | None, height: int | None, captions: Sequence[str], fields: Mapping[str, Any]) -> str | None:
        """Judge a sample.

        Args:
            width: of its picture in pixels; None without one.
            height: likewise.
            captions: all of them.
            fields: its KEY.json.

        Returns:
            The configuration key of the first rule that drops it, or None to keep it.
        """
        return (
            self._of_picture(width, height)
            or (self._of_captions(captions) if self._judges_captions else None)
            or ("where" if not all(condition.holds(fields) for condition in self._conditions) else None)
        )

    def _of_picture(self, width: int | None, height: int | None) -> str | None:
        config = self._config
        if width is None or height is None:
            return "require_image" if config.require_image else None
        short, long = sorted((width, height))
        if config.max_aspect is not None and long > config.max_aspect * short:
            return "max_aspect"
        return (
            _outside("side", short, config.min_side, None)
            or _outside("side", long, None, config.max_side)
            or _outside("pixels", width * height, config.min_pixels, config.max_pixels)
        )

    def _of_captions(self, captions: Sequence[str]) -> str | None:
        if not captions:
            return "require_caption" if self._config.require_caption else None
        return next((reason for caption in captions if (reason := self._of_caption(caption))), None)

    def _of_caption(self, caption: str) -> str | None:
        config = self._config
        reason = _outside("chars", len(caption), config.min_chars, config.max_chars)
        if reason is None and (config.min_words is not None or config.max_words is not None):
            reason = _outside("words", len(_WORD.findall(caption)), config.min_words, config.max_words)
        if reason is None and self._scripts and script_fraction(caption, self._scripts) < config.min_script_fraction:
            reason = "scripts"
        if reason is None and self._denied.found_in(caption):
            reason = "deny"
        return reason


class _Denied:
    """A list of words and phrases; looking them up costs the text's length, not the list's."""

    def __init__(self, entries: Sequence[str]) -> None:
        folded = [unicodedata.normalize("NFKC", entry).casefold() for entry in entries]
        self._anywhere = [entry.strip() for entry in folded if any(script_of(char) in _UNSPACED for char in entry)]
        phrases = [tuple(_WORD.findall(entry)) for entry in folded if entry.strip() not in self._anywhere]
        self._phrases = frozenset(phrase for phrase in phrases if phrase)
        self._lengths = sorted({len(phrase) for phrase in self._phrases})

    def __bool__(self) -> bool:
        """Tell whether anything is denied."""
        return bool(self._phrases or self._anywhere)

    def found_in(self, text: str) -> bool:
        """Tell whether the text holds any of them."""
        if not self:
            return False
        folded = unicodedata.normalize("NFKC", text).casefold()
        words = _WORD.findall(folded)
        return any(tuple(words[start : start + length]) in self._phrases for length in self._lengths for start in range(len(words))) or any(
            entry in folded for entry in self._anywhere
        )


def script_fraction(text: str, scripts: frozenset[str]) -> float:
    """Return the fraction of a text's letters that are of some scripts; 0 where there are no letters."""
    found = [script_of(char) for char in unicodedata.normalize("NFKC", text)]
    letters = [script for script in found if script]
    return sum(script in scripts for script in letters) / len(letters) if letters else 0.0


@functools.lru_cache(maxsize=65536)
def script_of(char: str) -> str:
    """Return the script of a letter, the first word of its Unicode name; an empty text for anything else."""
    return unicodedata.name(char, "").split(" ", 1)[0] if char.isalpha() else ""


@functools.cache
def _known_scripts() -> frozenset[str]:
    return frozenset(script_of(chr(point)) for point in _letters())


def _letters() -> Iterator[int]:
    return (point for point in range(0x20000) if chr(point).isalpha())


def _outside(name: str, value: int, low: int | None, high: int | None) -> str | None:
    if low is not None and value < low:
        return f"min_{name}"
    return f"max_{name}" if high is not None and value > high else None


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"`deny_file`: {path!r} cannot be read as UTF-8 text: {e}. Give a file of words, a line each.") from e
