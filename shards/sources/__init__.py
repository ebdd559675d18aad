"""The kinds of raw data that shards are written from, one file each."""

from __future__ import annotations

from collections.abc import Callable

from shards.config import WriteConfig
from shards.sources.coco import CocoSource
from shards.sources.esc50 import Esc50Source
from shards.sources.folder import FolderSource
from shards.sources.glyphs import GlyphSource
from shards.sources.karpathy import KarpathySource
from shards.sources.nlvr import NlvrSource
from shards.sources.record import Source
from shards.sources.table import TableSource
from shards.sources.vqa import VqaSource
from shards.sources.webdataset import WebDatasetSource


def make_source(config: WriteConfig) -> Source:
    """Make the source that a configuration names.

    Raises:
        SourceError: nothing is at `path`.
    """
    if config.source == "glyphs":
        return GlyphSource(config.glyphs)
    kinds: dict[str, Callable[[WriteConfig], Source]] = {
        "folder": FolderSource,
        "table": TableSource,
        "webdataset": WebDatasetSource,
        "coco": CocoSource,
        "karpathy": KarpathySource,
        "vqa": VqaSource,
        "nlvr": NlvrSource,
        "esc50": Esc50Source,
    }
    return kinds[config.source](config)
