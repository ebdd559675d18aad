"""What a modality is: the settings and the way from a part of a sample to patches. The model side is the same for all.

Shape letters: P patches of an item, C numbers in a patch.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards import configfile
from shards.configfile import need
from shards.errors import ConfigError
from shards.sample import Sample

Grid = tuple[int, int, int]
"""Patches of an item along time, height and width; a modality without an axis has 1 there."""

_TAKEN = (
    "apply bfloat16 buffers children clear compile cpu cuda double eval float forward half "
    "ipu items keys modules mtia parameters pop to train training type update values xpu"
)
TAKEN = frozenset(_TAKEN.split())
"""Attributes of torch's ModuleDict, which holds what belongs to a modality by its name; of several words nobody takes one."""
KINDS = {
    "image": "mmscale.modalities.image:NativeImage",
    "audio": "mmscale.modalities.audio:Audio",
    "video": "mmscale.modalities.video:Video",
}
"""Kinds that need no path; any other `kind` is `package.module:Class`."""
FIRST = ("image", "video", "audio")
"""Order of a sample's items: the first one that it has stands for the sample in contrastive learning."""
PERCEPTION = "perception"
"""The expert that modalities share unless they name another one."""

T = TypeVar("T")


class Change:
    """What augmentation does to the parts of the sample at one position. This one leaves them as they are."""

    def __call__(self, picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Change a (height, width, 3) picture, or each frame of a clip alike."""
        return picture_HWC

    def wave(self, wave_N: NDArray[np.float32]) -> NDArray[np.float32]:
        """Change the samples (N,) of a sound."""
        return wave_N

    def spectrum(self, heard_TB: NDArray[np.float32]) -> NDArray[np.float32]:
        """Change its log-mel spectrogram, frames by bands."""
        return heard_TB


@dataclass(frozen=True, slots=True)
class Plane:
    """How the values of a patch lie, and the channels of its stem."""

    height: int
    """A multiple of 8."""
    width: int
    """A multiple of 4."""
    channels: int

    @property
    def values(self) -> int:
        """Numbers that come out."""
        return 2 * self.channels * (self.height // 8) * (self.width // 4)

    @property
    def _layers(self) -> list[tuple[int, int, int]]:
        """Of each convolution: inputs times taps, channels out, places out."""
        c, area = self.channels, self.height * self.width
        return [(15, c, area // 4), (9 * c, 2 * c, area // 16), (18 * c, 2 * c, area // 32)]

    @property
    def products(self) -> int:
        """Multiplications of a patch."""
        return sum(taps * out * places for taps, out, places in self._layers)

    @property
    def kept(self) -> int:
        """Numbers of a patch that backward needs: each convolution's result and its norm's, and what comes out."""
        return sum(2 * out * places for _, out, places in self._layers) + self.values


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One entry of `model.modalities`. A key that is null takes the `model` key of the same name."""

    kind: str = "???"
    """image, audio, video, or `package.module:Class` of a class of one's own; the entry's name where it is left out."""
    expert: str = PERCEPTION
    """Whose weights its tokens go through: `perception` is shared, another name is an expert of its own."""

    @property
    def values(self) -> int:
        """C, numbers in a patch."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """`uint8` for RGB, laid out (colour, ...), which the model standardises; `float32` for numbers that it takes as they are."""
        return "float32"

    @property
    def grid(self) -> Grid:
        """Cells of the learned position table; at least every grid that `read` returns, unless positions are interpolated."""
        raise NotImplementedError

    @property
    def max_patches(self) -> int:
        """Most patches of an item, for which memory is held."""
        return math.prod(self.grid)

    @property
    def stem_plane(self) -> Plane | None:
        """How a patch lies for the convolutions before its embedding; None for a linear embedding alone."""
        return None

    @property
    def interpolated(self) -> bool:
        """Whether items of other heights and widths than the position table's stretch it to theirs."""
        return False

    def check(self, where: str) -> None:
        """Raise ConfigError for settings that cannot work; `where` is the entry's key."""

    def mix(self, one_PC: NDArray[Any], two_PC: NDArray[Any], share: float) -> NDArray[Any]:
        """Lay the patches of two items over one another (mixup).

        Args:
            one_PC: patches of an item, of `dtype`.
            two_PC: as many of another one.
            share: of the first, from 0 to 1.

        Returns:
            Patches of any type of floats; bytes are rounded by who calls.
        """
        mixed_PC: NDArray[Any] = np.float32(share) * one_PC + np.float32(1 - share) * two_PC
        return mixed_PC

    def read(self, sample: Sample, out_PC: NDArray[Any], change: Change) -> Grid | None:
        """Turn what a sample has of this modality into patches. Threads call this at once.

        Args:
            sample: a sample.
            out_PC: (max_patches, values) of `dtype`; the first patches are written, in the order (time, height, width).
            change: the position's augmentation: call it with pictures, its `wave` and `spectrum` with sound.

        Returns:
            The item's grid, or None where the sample has no such part.

        Raises:
            SampleError: the part does not decode; the sample becomes a row of weight 0.
        """
        raise NotImplementedError


def build_modalities(model: Any) -> dict[str, Modality]:
    """Build the entries of `model.modalities`, in the order of a sample's items.

    Args:
        model: the `model` section of a stage file, or a model's configuration.

    Raises:
        ConfigError: an unknown kind or key, or settings that cannot work.
    """
    entries: Mapping[str, Any] = model.modalities or {}
    names = sorted(entries, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return {name: _build(name, entries[name], model) for name in names}


def experts_of(modalities: Mapping[str, Modality]) -> list[str]:
    """The perception experts: the shared one first, then those that modalities name, in their order."""
    return list(dict.fromkeys([PERCEPTION, *(m.expert for m in modalities.values())]))


def all_keys_of(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `model.modalities` with the defaults of the keys that it leaves out; as it is where its class cannot be had."""
    kind = str(entry.get("kind", name))
    try:
        fields = dataclasses.fields(_class_of(kind, name))
    except ConfigError:
        return dict(entry)
    defaults = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields}
    return {**defaults, **entry, "kind": kind}


def _build(name: str, entry: Any, model: Any) -> Modality:
    where = f"model.modalities.{name}"
    need(isinstance(entry, Mapping), f"`{where}` must be a mapping such as {{kind: audio}}, or the name of a part; got {entry!r}.")
    need(
        name.isidentifier() and name != "text" and name not in TAKEN,
        f"`{where}`: the name must be a word of letters and digits other than `text` and than what torch's modules have, such as `items`.",
    )
    kind = str(entry.get("kind", name))
    need((name == "image") == (kind == "image"), f"`{where}.kind`: `image` is the kind of the entry `image` and of no other; got {kind}.")
    loaded = configfile.build(_class_of(kind, where), [(where, {**entry, "kind": kind})])
    inherited = {
        f.name: getattr(model, f.name) for f in dataclasses.fields(loaded) if getattr(loaded, f.name) is None and hasattr(model, f.name)
    }
    built: Modality = dataclasses.replace(loaded, **inherited)
    need(
        built.expert.isidentifier() and built.expert != "text" and built.expert not in TAKEN,
        f"`{where}.expert` must be `perception` or a word of its own, and not `text`; got {built.expert!r}.",
    )
    built.check(where)
    return built


def _class_of(kind: str, where: str) -> type[Modality]:
    module, colon, name = KINDS.get(kind, kind).partition(":")
    if not colon:
        raise ConfigError(f"`{where}.kind` must be {', '.join(KINDS)} or `package.module:Class`; got {kind!r}.")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"`{where}.kind`: {kind!r} cannot be imported: {e}. Name an importable module and a class in it.") from e
    if not (isinstance(found, type) and issubclass(found, Modality)):
        raise ConfigError(f"`{where}.kind`: {kind!r} is no subclass of mmscale.modalities.modality.Modality.")
    missing = [name for name in ("values", "grid", "read") if getattr(found, name) is getattr(Modality, name)]
    if missing:
        raise ConfigError(f"`{where}.kind`: {kind!r} does not define {', '.join(missing)}. docs/modalities.md shows one.")
    return found
