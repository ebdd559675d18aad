"""Conditions on a field of KEY.json, such as `score>=0.5` or `licence.name=CC-BY`: a path, a comparison, a value, and nothing that runs."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import ConfigError

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|!=|==|=|>|<)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison of a field with a value."""

    path: tuple[str, ...]
    """Keys from the outermost mapping inwards."""
    comparison: str
    """One of >=, <=, !=, ==, =, >, <."""
    value: Any
    """What the field is compared with."""

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Tell whether a sample's fields meet it. A field that is missing, or is no such kind of value, meets nothing."""
        found: Any = fields
        for name in self.path:
            if not isinstance(found, Mapping) or name not in found:
                return False
            found = found[name]
        found = _as_number(found) if _is_number(self.value) else found
        comparable = (_is_number(found) and _is_number(self.value)) or type(found) is type(self.value)
        return comparable and _COMPARISONS[self.comparison](found, self.value)


def parse_condition(text: str, key: str) -> Condition:
    """Read a condition.

    Args:
        text: such as `score>=0.5`; dots lead into mappings. What is not JSON on the right side is a text.
        key: of the configuration, for the error.

    Raises:
        ConfigError: it has another form.
    """
    match = _FORM.fullmatch(text)
    if match is None or not match[3]:
        raise ConfigError(
            f"`{key}`: {text!r} is no condition. Write FIELD, one of >= <= != = > <, and a value, such as score>=0.5 or language=en."
        )
    try:
        value = json.loads(match[3])
    except ValueError:
        value = match[3]
    if match[2] not in ("=", "==", "!=") and not (_is_number(value) or isinstance(value, str)):
        raise ConfigError(f"`{key}`: {text!r} compares by size with {value!r}, which has none. Use = or != for it.")
    return Condition(tuple(match[1].split(".")), match[2], value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_number(value: Any) -> Any:
    """Read numbers that a table has kept as texts."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
