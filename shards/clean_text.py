"""Captions: encoding, normalisation, length."""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import Any

from shards.config import CaptionConfig
from shards.errors import SampleError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def decode_text(key: str, value: str | bytes, config: CaptionConfig) -> str:
    """Decode a text that may not be UTF-8.

    Args:
        key: the sample, for the error.
        value: bytes of a file; or a text, in which undecodable bytes are lone surrogates (`errors="surrogateescape"`).
        config: names the fallback encoding.

    Raises:
        SampleError: `bad_encoding`.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            data = _undecoded(key, value)
        else:
            return value
    else:
        data = value
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        return _fallback(key, data, config, e)


def clean_text(key: str, value: str | bytes, config: CaptionConfig) -> str:
    """Decode a caption, compose it to NFC and make every run of white space and control characters one space.

    Raises:
        SampleError: `bad_encoding` or `caption_too_long`.
    """
    text = unicodedata.normalize("NFC", decode_text(key, value, config))
    text = " ".join(_CONTROL.sub(" ", text).split())
    if len(text) <= config.max_chars:
        return text
    if config.too_long == "cut":
        return text[: config.max_chars].rstrip()
    raise SampleError(key, "caption_too_long", f"The caption has {len(text)} characters; caption.max_chars is {config.max_chars}.")


def decode_field(key: str, value: Any, config: CaptionConfig) -> Any:
    """Decode every text inside a field; other values stay as they are.

    Raises:
        SampleError: `bad_encoding`.
    """
    if isinstance(value, str):
        return decode_text(key, value, config)
    if isinstance(value, dict):
        return {decode_text(key, str(name), config): decode_field(key, inner, config) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [decode_field(key, inner, config) for inner in value]
    return value


def _undecoded(key: str, text: str) -> bytes:
    """The bytes a text was read from."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as e:
        raise SampleError(key, "bad_encoding", f"The text holds half a surrogate pair at character {e.start}.") from e


def _fallback(key: str, data: bytes, config: CaptionConfig, cause: UnicodeDecodeError) -> str:
    if config.fallback_encoding is None:
        detail = f"The text is not UTF-8 at byte {cause.start}; caption.fallback_encoding=latin-1 would read it as such."
        raise SampleError(key, "bad_encoding", detail) from cause
    try:
        return data.decode(config.fallback_encoding)
    except UnicodeDecodeError as e:
        detail = f"The text is neither UTF-8 nor {config.fallback_encoding}, at byte {e.start}."
        raise SampleError(key, "bad_encoding", detail) from e
