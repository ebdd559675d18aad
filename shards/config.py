"""What `mmscale shards write` is told: typed, frozen, one docstring a key."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from shards.errors import ConfigError
from shards.filter import FilterConfig

# `path` has no meaning for these: they make their own data.
SOURCES_WITHOUT_PATH = frozenset({"glyphs"})
# Their samples have questions, sentences or classes instead.
SOURCES_WITHOUT_CAPTIONS = frozenset({"vqa", "nlvr", "esc50"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """Which columns of a table (source=table) become what."""

    image: str | None = "image"
    """Column of image paths, of image bytes, or of {bytes, path} structs; null for a table without images."""
    audio: str | None = None
    """Column of audio, in the same forms; null for a table without."""
    video: str | None = None
    """Column of video, in the same forms; null for a table without."""
    caption: str | None = "caption"
    """Column of captions: a text, a list of texts, or several in one text (see caption_separator); null for a table without captions."""
    caption_separator: str | None = None
    """Text between two captions of one cell, such as "|"; null takes the whole cell as one caption."""
    key: str | None = None
    """Column of keys, which must be unique; null derives keys from image paths (the second row of an image gets `-2`) or row numbers."""
    fields: list[str] | None = None
    """Columns kept in KEY.json; null keeps every column but those above."""
    lists: list[str] = field(default_factory=list)
    """Columns of texts that become lists in KEY.json, such as the tags of a csv file."""
    list_separator: str = ";"
    """Text between two entries of such a cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """How a table is read (source=table)."""

    image_root: str | None = None
    """Folder that relative image paths start from; null is the folder of the table."""
    quoted: bool | None = None
    """Cells of csv and tsv may be in double quotes; null says yes for csv and no for tsv."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig:
    """What a folder's paths say (source=folder)."""

    label: str | None = None
    """Field that gets the name of the folder below `path` that a file lies in, as in ImageFolder: `path/cat/1.jpg` is of class cat."""
    pattern: str | None = None
    """Regular expression that the whole path below `path` must match, else the file is no sample; its named groups become fields, such as
    "(?P<label>[^/]+)/(?P<fold>[0-9])-.*"."""
    listed: str | None = None
    """Text file of the paths below `path` that are samples, a line each, without or with the extension, as published splits are; what
    follows after white space, such as the number of a class, is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationsConfig:
    """What belongs to the annotations that `path` names (source=coco, karpathy, vqa, nlvr, esc50)."""

    images: str | None = None
    """Folder that the names of images start from; null looks where the data set's own layout has it."""
    instances: str | None = None
    """coco: an instances_*.json, whose categories become the field `tags`; null for none."""
    answers: str | None = None
    """vqa: the json of annotations; null takes the one that is named after the questions. Test splits have none."""
    splits: list[str] = field(default_factory=list)
    """karpathy: the splits taken, such as [train, restval]; esc50: the folds, such as [1, 2, 3, 4]. Empty takes all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GlyphsConfig:
    """Characters drawn with the fonts that matplotlib ships (source=glyphs)."""

    split: Literal["train", "heldout", "all"] = "train"
    """Whole styles: `heldout` is the bold slanted style of each family, `train` is every other style."""
    size: int = 32
    """Side in pixels of the square pictures."""
    every: int = 1
    """Keep every n-th glyph only."""
    limit: int | None = None
    """Keep so many glyphs, from the front, after `every`; null for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """What is done to images and which are refused."""

    required: bool = True
    """Quarantine samples without an image, audio or video; false writes them as text-only samples."""
    short_side: int | None = None
    """Shrink to this short side in pixels, keeping the aspect ratio; smaller images stay as they are. null: no resizing."""
    sizes: list[int] = field(default_factory=list)
    """Several short sides at once, such as [256, 512]: the largest is KEY.jpg, the others KEY.256.jpg; excludes short_side and size."""
    size: int | None = None
    """Make every image a square of this side in pixels, see `square`; excludes short_side."""
    square: Literal["crop", "pad", "stretch"] = "crop"
    """How `size` is reached: crop the centre, pad with white, or stretch."""
    format: Literal["auto", "jpeg", "png", "webp"] = "auto"
    """Format of what is written; auto keeps jpeg, png and webp and turns every other format into png. An image in that
    format which needs no other change keeps its bytes."""
    quality: int = 90
    """Quality of re-encoded jpeg and webp, 1 to 100."""
    subsampling: Literal["420", "444"] = "420"
    """Chroma of re-encoded jpeg: at half the resolution, as nearly all photos have it, or at full."""
    max_pixels: int = 100_000_000
    """Refuse images of more pixels, judged by the header before anything is decoded."""
    max_bytes: int = 268_435_456
    """Refuse image files of more bytes, before they are read."""
    min_side: int = 1
    """Refuse images whose shorter side has fewer pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """What is done to audio and which is refused."""

    sample_rate: int | None = None
    """Resample to this rate in Hz; null keeps that of each recording."""
    channels: Literal["keep", "mono"] = "keep"
    """Mix all channels into one, or keep them."""
    format: Literal["auto", "flac", "wav"] = "auto"
    """Format of what is written, with 16 bits; auto keeps wav, keeps mp3 and ogg that need no other change, and turns all else into flac.
    Audio in that format which needs no other change keeps its bytes."""
    max_seconds: float | None = None
    """Longest recording; see too_long. null for no limit."""
    too_long: Literal["cut", "quarantine"] = "cut"
    """What becomes of a longer one: its beginning is written, or nothing."""
    max_bytes: int = 268_435_456
    """Refuse audio files of more bytes, before they are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """What is done to video and which is refused."""

    mode: Literal["keep", "frames"] = "keep"
    """Keep the file as it is if it can be read, or turn it into pictures KEY.000.jpg, KEY.001.jpg, ...; a gif becomes pictures anyway."""
    frames: int = 8
    """Pictures of a video, at even distances; fewer of one that has fewer."""
    fps: float | None = None
    """Pictures a second instead of a number of them; at most 1,000 in all."""
    short_side: int | None = None
    """Shrink pictures to this short side in pixels; null keeps their size."""
    quality: int = 90
    """Quality of the pictures as jpeg, 1 to 100."""
    max_seconds: float | None = None
    """Refuse longer videos; null for no limit."""
    max_bytes: int = 1_073_741_824
    """Refuse video files of more bytes, before they are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """What is done to captions and which are refused."""

    required: bool = True
    """Quarantine samples without a caption (not asked of a table whose columns.caption is null)."""
    max_chars: int = 8192
    """Longest caption in characters, after normalisation."""
    too_long: Literal["quarantine", "cut"] = "quarantine"
    """What becomes of a sample with a longer caption."""
    one_a_line: bool = False
    """Each line of a .txt (source=folder) is a caption; false takes the whole file as one."""
    fallback_encoding: str | None = None
    """Encoding of captions that are not UTF-8, such as latin-1; null quarantines them, as a wrong guess would go unnoticed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineConfig:
    """How many samples may be refused; past either limit the command fails after all good samples were written."""

    max_fraction: float = 0.05
    """Largest fraction of the source's samples."""
    max_count: int | None = None
    """Largest number of samples; null for no such limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The tokenizer trained on the written texts, saved in OUT/tokenizer."""

    kind: Literal["none", "wordpiece", "bpe"] = "none"
    """wordpiece as in BERT, byte-level bpe as in GPT-2 (decodes to exactly the text), or none."""
    vocab_size: int = 8192
    """Largest vocabulary, special tokens included."""
    lowercase: bool = False
    """Lower-case texts before they are cut into tokens."""
    fields: list[str] = field(default_factory=list)
    """Keys of KEY.json whose texts are trained on besides the captions, such as question."""
    max_texts: int = 1_000_000
    """Train on at most so many samples, evenly spread over the shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteConfig:
    """From raw pairs to shards."""

    source: Literal["glyphs", "folder", "table", "webdataset", "coco", "karpathy", "vqa", "nlvr", "esc50"] = "???"  # type: ignore[assignment]
    """Kind of the raw data: drawn glyphs, a folder of images with .txt/.json, a csv/tsv/jsonl/parquet table, tars of others, or the files
    of a published set: COCO, Karpathy's splits (Flickr30k), VQA v2, NLVR and NLVR2, ESC-50."""
    path: str | None = None
    """Where the raw data is: the folder; the table, a folder or a glob of tables; a tar, a folder, a glob or a{000..099}.tar of tars; the
    json of a published set."""
    out: str = "???"
    """Folder that receives the shards; created; must be empty or hold an unfinished or finished run of this same command."""
    rows_per_shard: int = 2048
    """Raw samples a shard is cut from; quarantined ones leave it smaller."""
    part: str | None = None
    """i/n writes the i-th of n parts (from 1): commands that share nothing but `out` write the others; all writes whole. null asks SLURM
    (array task, rank inside srun) and is the whole elsewhere."""
    processes: int | None = None
    """Writer processes; 1 works in this process, null takes the CPUs this process may use. Any number writes the same bytes."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    table: TableConfig = field(default_factory=TableConfig)
    folder: FolderConfig = field(default_factory=FolderConfig)
    annotations: AnnotationsConfig = field(default_factory=AnnotationsConfig)
    glyphs: GlyphsConfig = field(default_factory=GlyphsConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def check(self) -> None:
        """Check what types alone cannot say.

        Raises:
            ConfigError: a value out of range, or two keys that exclude each other.
        """
        if self.path is None and self.source not in SOURCES_WITHOUT_PATH:
            raise ConfigError(f"`path` is required for source={self.source}. Give path=... .")
        resizing = {"short_side": self.image.short_side, "sizes": self.image.sizes or None, "size": self.image.size}
        given = [f"`image.{name}`" for name, value in resizing.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other. Keep one of them.")
        if len(set(self.image.sizes)) < len(self.image.sizes):
            raise ConfigError(f"`image.sizes` must differ from each other; got {self.image.sizes}.")
        for name, quality in (("image", self.image.quality), ("video", self.video.quality)):
            if not 1 <= quality <= 100:
                raise ConfigError(f"`{name}.quality` must be 1 to 100; got {quality}.")
        seconds = {"audio.max_seconds": self.audio.max_seconds, "video.max_seconds": self.video.max_seconds, "video.fps": self.video.fps}
        for name, value in seconds.items():
            if value is not None and value <= 0:
                raise ConfigError(f"`{name}` must be above 0; got {value:g}.")
        if not 0.0 <= self.quarantine.max_fraction <= 1.0:
            raise ConfigError(f"`quarantine.max_fraction` must be 0 to 1; got {self.quarantine.max_fraction}.")
        for name, count in self._positive():
            if count is not None and count < 1:
                raise ConfigError(f"`{name}` must be at least 1; got {count}.")
        if self.columns.caption_separator == "":
            raise ConfigError(
                "`columns.caption_separator` must not be empty; null takes the whole cell as one caption. "
                "A lone | is YAML syntax: on a command line write \"columns.caption_separator='|'\"."
            )
        if self.columns.list_separator == "":
            raise ConfigError("`columns.list_separator` must not be empty.")
        self._check_encoding()
        self._check_pattern()
        self.filter.check()

    def process_count(self) -> int:
        """Writer processes to start."""
        return self.processes if self.processes is not None else len(os.sched_getaffinity(0))

    def caption_required(self) -> bool:
        """Whether a sample without a caption is quarantined."""
        without = self.source in SOURCES_WITHOUT_CAPTIONS or (self.source == "table" and self.columns.caption is None)
        return self.caption.required and not without

    def _positive(self) -> list[tuple[str, Any]]:
        return [
            ("rows_per_shard", self.rows_per_shard),
            ("processes", self.processes),
            ("glyphs.size", self.glyphs.size),
            ("glyphs.every", self.glyphs.every),
            ("glyphs.limit", self.glyphs.limit),
            ("image.short_side", self.image.short_side),
            ("image.size", self.image.size),
            *(("image.sizes", size) for size in self.image.sizes),
            ("audio.sample_rate", self.audio.sample_rate),
            ("audio.max_bytes", self.audio.max_bytes),
            ("video.frames", self.video.frames),
            ("video.short_side", self.video.short_side),
            ("video.max_bytes", self.video.max_bytes),
            ("image.max_pixels", self.image.max_pixels),
            ("image.max_bytes", self.image.max_bytes),
            ("image.min_side", self.image.min_side),
            ("caption.max_chars", self.caption.max_chars),
            ("tokenizer.vocab_size", self.tokenizer.vocab_size),
            ("tokenizer.max_texts", self.tokenizer.max_texts),
        ]

    def _check_pattern(self) -> None:
        try:
            re.compile(self.folder.pattern or "")
        except re.error as e:
            raise ConfigError(f"`folder.pattern` is no regular expression: {e}; got {self.folder.pattern!r}.") from e

    def _check_encoding(self) -> None:
        if self.caption.fallback_encoding is None:
            return
        try:
            "".encode(codecs.lookup(self.caption.fallback_encoding).name)
        except LookupError as e:
            name = self.caption.fallback_encoding
            raise ConfigError(f"`caption.fallback_encoding`: there is no encoding {name!r}. Use latin-1, cp1252, shift_jis, ... .") from e
