"""Typed configuration from YAML files and `key.sub=value` words; OmegaConf does not leave this file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shards.errors import ConfigError

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file that must hold a mapping.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as e:
        raise ConfigError(f"There is no configuration file {str(path)!r}. Give the path of a YAML file.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"The configuration file {str(path)!r} cannot be read: {e}.") from e
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"The configuration file {str(path)!r} is not valid YAML: {' '.join(str(e).split())}.") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration file {str(path)!r} must hold `key: value` lines, not a {type(content).__name__}.")
    return content


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=1` words into a nested mapping.

    Raises:
        ConfigError: a word without `=` or with an empty key.
    """
    found = OmegaConf.create({})
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not of the form key=value, such as train.steps=100.")
        try:
            OmegaConf.update(found, key, yaml.load(value, Loader=_Words), force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as e:
            raise ConfigError(f"The word {word!r} cannot be parsed: {_first_line(e)}.") from e
    return cast("dict[str, Any]", OmegaConf.to_container(found))


class _Loader(yaml.SafeLoader):
    """YAML in which 12:00:00, 0123 and 2026-11-01 are the texts that they are: YAML 1.1 has a number to the base of 60, one to the base of
    8 and a date for them."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (as the base class has it)
        first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("int", "timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Words(_Loader):
    """Of a command line, where 1e-4 is a number. In files it is a text, as in YAML 1.1, that a number's key makes a number of."""


_INTEGER = re.compile(r"[-+]?(?:0b[01]+|0x[0-9a-fA-F]+|0|[1-9][0-9_]*)\Z")
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Words.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def build(cls: type[T], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> T:
    """Merge layers over the defaults of a (nested) dataclass and check every key and type.

    Args:
        cls: a dataclass type, frozen or not, with a default for all but required (`"???"`) fields.
        layers: pairs of (where it comes from, for the error text; mapping), weakest first.

    Raises:
        ConfigError: an unknown key, a wrong type, a required key that is missing.
    """
    defaults = cast(DictConfig, OmegaConf.structured(cls))
    together: dict[str, Any] = {}
    for where, layer in layers:
        _refuse_truths(cls, layer, "", where)
        try:
            OmegaConf.merge(defaults, OmegaConf.create(_laid_over({}, layer, cls)))  # says what is wrong with this one
        except (OmegaConfBaseException, TypeError, ValueError) as e:
            raise ConfigError(f"{_explain(e)} (in {where}).") from e
        together = _laid_over(together, layer, cls)
    try:
        merged = cast(DictConfig, OmegaConf.merge(defaults, OmegaConf.create(together)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"`{missing[0]}` is required and not set. Add it to the configuration file or give {missing[0]}=... .")
        return cast(T, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, TypeError, ValueError) as e:
        raise ConfigError(f"{_explain(e)}.") from e


def _laid_over(below: Any, above: Any, kind: Any) -> Any:
    """Merge plain values: mappings key by key, but an empty one, or what is no mapping, replaces what it is laid over.

    Args:
        below: what there is.
        above: what goes over it.
        kind: the type of both; an empty mapping over a section changes nothing.
    """
    options = [kind, *get_args(kind)]
    section = next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)
    if not isinstance(above, Mapping) or (not above and section is None):
        return above
    numbered = any(get_origin(o) is dict and get_args(o)[0] is int for o in options)
    hints = get_type_hints(section) if section is not None else {}
    inner = next((get_args(o)[1] for o in options if get_origin(o) is dict), Any)
    found = dict(below) if isinstance(below, Mapping) else {}
    for name, value in above.items():
        key = int(name) if numbered and isinstance(name, str) and name.isdecimal() else name  # JSON has texts for keys
        found[key] = _laid_over(found.get(key), value, hints.get(name, Any) if section is not None else inner)
    return found


def _refuse_truths(cls: type, layer: Mapping[str, Any], prefix: str, where: str) -> None:
    """YAML reads yes, no, true and false as truth values, which would silently become the texts True and False in a list of texts."""
    hints = get_type_hints(cls)
    for name, value in layer.items():
        options = [hints.get(name), *get_args(hints.get(name))]
        inner = next((o for o in options if dataclasses.is_dataclass(o)), None)
        if isinstance(value, Mapping) and isinstance(inner, type):
            _refuse_truths(inner, value, f"{prefix}{name}.", where)
        if isinstance(value, list) and list[str] in options and any(isinstance(v, bool) for v in value):
            raise ConfigError(
                f"`{prefix}{name}` is a list of texts, and YAML reads yes, no, true and false as truth values; got {value} (in {where}). "
                "Put them into quotes: ['true', 'false']."
            )


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Load a configuration: the defaults of `cls` < the YAML file < `key.sub=value` words.

    Raises:
        ConfigError: as `read_yaml`, `parse_overrides` and `build`.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if path is not None:
        layers.append((str(path), read_yaml(Path(path))))
    layers.append(("the command line", parse_overrides(overrides)))
    return build(cls, layers)


def to_plain(config: Any) -> dict[str, Any]:
    """Turn a configuration dataclass into plain dicts, lists and scalars, ready for YAML or JSON."""
    return cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """Render a configuration dataclass as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k if isinstance(k, int) else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")


def _explain(error: Exception) -> str:
    """One sentence from OmegaConf's report: what it says, with the full key in front."""
    key = getattr(error, "full_key", None)
    message = _first_line(error)
    return f"`{key}`: {message}" if key and key != "None" else message


def need(condition: bool, message: str) -> None:
    """Raise ConfigError with a message unless a condition holds."""
    if not condition:
        raise ConfigError(message)
