"""The fields that a stage names for its task."""

from __future__ import annotations

from mmscale.config import RunConfig
from shards.errors import ConfigError


def caption_field(config: RunConfig) -> str:
    """Field of the task's text.

    Raises:
        ConfigError: it is not named.
    """
    return _named(config.data.caption, "caption", "text")


def target_field(config: RunConfig) -> str:
    """Field of the task's target.

    Raises:
        ConfigError: it is not named.
    """
    return _named(config.data.label, "label", "target")


def prompt_field(config: RunConfig) -> str:
    """Field of what the task's text starts with.

    Raises:
        ConfigError: it is not named.
    """
    return _named(config.data.prompt, "prompt", "question")


def _named(field: str | None, key: str, what: str) -> str:
    if field is None:
        raise ConfigError(f"`data.{key}` must name the json field that holds the {what} of the task; it is null.")
    return field
