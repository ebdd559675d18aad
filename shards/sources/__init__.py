"""The kinds of raw data that shards are written from, one file each."""

from __future__ import annotations

from shards.config import WriteConfig
from shards.sources.folder import FolderSource
from shards.sources.glyphs import GlyphSource
from shards.sources.record import Source
from shards.sources.table import TableSource
from shards.sources.webdataset import WebDatasetSource


def make_source(config: WriteConfig) -> Source:
    """Make the source that a configuration names.

    Raises:
        SourceError: nothing is at `path`.
    """
    if config.source == "glyphs":
        return GlyphSource(config.glyphs)
    if config.source == "folder":
        return FolderSource(config)
    if config.source == "table":
        return TableSource(config)
    return WebDatasetSource(config)
