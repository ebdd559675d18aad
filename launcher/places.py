"""What a launch on this machine would stumble over in its ranks' first seconds, looked at before there are ranks."""

from __future__ import annotations

from pathlib import Path

from mmscale.checkpoint.find import start_of
from mmscale.config import RunConfig
from mmscale.data_config import missing_tokenizer, reads_no_words, training_places
from shards.errors import ConfigError
from shards.manifest import read_manifest
from shards.store.place import is_url


def check_places(config: RunConfig) -> None:
    """Look for the data sets, what the run starts from, and a tokenizer; what lies behind a URL is left to the ranks.

    Raises:
        MmscaleError: the error that every rank would end with.
    """
    places = training_places(config.data)
    watched = [config.evaluate.shards] if config.evaluate.every and config.evaluate.shards is not None else []
    for place in [*places, *watched]:
        if not is_url(place):
            read_manifest(place, check_files=False)
    if config.init_from is not None:
        start_of(config.init_from)
    if (folder := lacking_tokenizer(config)) is not None:
        raise ConfigError(missing_tokenizer(config.data, folder))


def lacking_tokenizer(config: RunConfig) -> Path | None:
    """Where the ranks will look for a tokenizer in vain: the named folder, else that of the first data set, unless the stage starts from a
    checkpoint, which has one, or reads no words."""
    if config.data.tokenizer is not None:
        folder = Path(config.data.tokenizer)
    else:
        place = training_places(config.data)[0]
        if config.init_from is not None or reads_no_words(config.data) or is_url(place):
            return None
        folder = Path(place) / "tokenizer"
    return None if folder.is_dir() else folder
