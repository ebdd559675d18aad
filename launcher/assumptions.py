"""What a forecast takes for granted: the cluster on paper, and what is not known of data, storage and failures; each with its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmscale.config import CONFIGS
from shards import configfile
from shards.configfile import need
from shards.errors import ConfigError

MOST_GPUS = 16_384
GIVEN = "given"
LLAMA_3 = (16_384, 54 * 24 / 466)
"""GPUs and hours between failures, of a cluster that failed more rarely: 466 interruptions in 54 days (Grattafiori et al. 2024, 3.3.4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareConfig:
    """A GPU in its node: `configs/hardware/*.yaml`."""

    name: str = "???"
    memory_gb: float = "???"  # type: ignore[assignment]
    """Device memory in 10^9 bytes."""
    peak_teraflops: float = "???"  # type: ignore[assignment]
    """Dense bf16."""
    intra_node_gb_s: float = "???"  # type: ignore[assignment]
    """10^9 bytes a second that a GPU sends to others in its node."""
    inter_node_gb_s: float = "???"  # type: ignore[assignment]
    """10^9 bytes a second that a GPU sends to other nodes."""
    usable_memory: float = 0.92
    """Part of the device memory that a run may take by the estimate."""
    mfu: Any = "???"
    """[lower, upper] model FLOPs utilisation; or hidden_size -> [lower, upper], of which that of the largest width not above the model's
    counts."""
    mfu_stage_3: Any = "???"
    """The same under ZeRO 3."""
    sources: dict[str, str] = field(default_factory=dict)
    """Key -> where its number is from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """What is not known of the data. Null: from the manifest of `data.shards` where there is one, else the default that is printed."""

    bytes: float | None = None
    """Of a sample in the shards."""
    text_tokens: float | None = None
    """Mean tokens of a text, those of its begin and end included."""
    vocabulary: int | None = None
    """Entries of the tokenizer."""
    labels: int = 1000
    """Outputs of the label head where the task has one and data.labels does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """The file system that checkpoints go to."""

    write_gb_s_node: float = 1.0
    """10^9 bytes a second that a node writes while all write."""
    fixed_s: float = 1.0
    """Seconds of a save whatever its size: agreeing, fsync, rename."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureConfig:
    """How often a job is interrupted: the mean time between two, of a job of so many GPUs. It scales with 1 / GPUs."""

    gpus: int = 1024
    hours: float = 7.9
    restart_minutes: float = 10.0
    """From a failure to the first new step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """All of it."""

    hardware: HardwareConfig
    sample: SampleConfig = field(default_factory=SampleConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    failures: FailureConfig = field(default_factory=FailureConfig)
    given: frozenset[str] = frozenset()
    """Keys that the user has set."""

    def source(self, key: str) -> str:
        """Where a number is from."""
        if key in self.given:
            return GIVEN
        section, _, name = key.partition(".")
        return self.hardware.sources.get(name) or SOURCES.get(key, "not said") if section == "hardware" else SOURCES[key]


SOURCES = {
    "hardware.usable_memory": "assumed: the rest is for CUDA, NCCL, fragmentation, and texts longer than the mean",
    "sample.labels": "assumed",
    "storage.write_gb_s_node": "assumed, as Llama 3, section 3.3.1: 2 TB/s for 2,048 nodes; measure yours: benchmarks/checkpoint.py",
    "storage.fixed_s": "assumed",
    "failures.hours": "Kokolis et al. 2024, Meta's RSC clusters: 7.9 h for jobs of 1,024 GPUs",
    "failures.restart_minutes": "assumed",
}


def load_assumptions(gpu: str, words: Sequence[str] = ()) -> Assumptions:
    """Load the hardware part of a GPU and the words that go over it and the rest.

    Args:
        gpu: a part's name (`h100`, in any case) or the path of a YAML file.
        words: such as `hardware.mfu=[0.3,0.4]`, `failures.hours=20`.

    Raises:
        ConfigError: an unknown GPU or key, a number that cannot be.
    """
    part = _hardware_file(gpu)
    over = configfile.parse_overrides(words)
    sections: dict[str, Any] = {"sample": SampleConfig, "storage": StorageConfig, "failures": FailureConfig}
    if unknown := sorted(set(over) - {"hardware", *sections}):
        known = ", ".join(f"{name}." for name in ("hardware", *sections))
        raise ConfigError(f"`--set {unknown[0]}` names no assumption: they begin with {known} such as hardware.mfu or failures.hours.")
    for name, value in over.items():
        need(isinstance(value, dict), f"`--set {name}={value}` needs a key below it, such as failures.hours=20.")
    layers: list[tuple[str, dict[str, Any]]] = [(str(part), configfile.read_yaml(part)), ("--set hardware", over.get("hardware", {}))]
    found = Assumptions(
        hardware=configfile.build(HardwareConfig, layers),
        given=frozenset(f"{section}.{key}" for section, keys in over.items() for key in keys),
        **{name: configfile.build(cls, [(f"--set {name}", over.get(name, {}))]) for name, cls in sections.items()},
    )
    _check(found)
    return found


def mfu_range(found: Any, hidden_size: int, key: str) -> tuple[float, float]:
    """The lower and upper utilisation for a model of this width.

    Raises:
        ConfigError: it is no range, or there is none for so narrow a model.
    """
    if isinstance(found, dict) and found and all(str(width).isdecimal() for width in found):
        widths = sorted(int(width) for width in found)
        below = [width for width in widths if width <= hidden_size]
        found = {int(width): value for width, value in found.items()}[(below or widths)[-1 if below else 0]]
    fits = isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(x, (int, float)) for x in found)
    need(
        fits and 0 < found[0] <= found[1] <= 1,
        f"`hardware.{key}` must be a lower and an upper fraction such as [0.22,0.27], or a mapping from hidden_size to such; got {found}.",
    )
    return float(found[0]), float(found[1])


def _hardware_file(gpu: str) -> Path:
    if gpu.endswith((".yaml", ".yml")):
        return Path(gpu)
    folder = CONFIGS / "hardware"
    path = folder / f"{gpu.casefold()}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(f"`--gpu {gpu}` names no known GPU: they are {known}. Use one of them, or the path of a YAML file like theirs.")
    return path


def _check(found: Assumptions) -> None:
    hardware, sample = found.hardware, found.sample
    numbers = {f"hardware.{k}": getattr(hardware, k) for k in ("memory_gb", "peak_teraflops", "intra_node_gb_s", "inter_node_gb_s")}
    numbers |= {f"sample.{k}": getattr(sample, k) for k in ("bytes", "text_tokens", "vocabulary", "labels")}
    numbers |= {"storage.write_gb_s_node": found.storage.write_gb_s_node}
    numbers |= {"failures.gpus": found.failures.gpus, "failures.hours": found.failures.hours}
    for key, value in numbers.items():
        need(value is None or value > 0, f"`{key}` must be more than 0; got {value}.")
    need(0 < hardware.usable_memory <= 1, f"`hardware.usable_memory` must be above 0 and at most 1; got {hardware.usable_memory}.")
    need(found.storage.fixed_s >= 0, f"`storage.fixed_s` must not be negative; got {found.storage.fixed_s}.")
    need(found.failures.restart_minutes >= 0, f"`failures.restart_minutes` must not be negative; got {found.failures.restart_minutes}.")
    for key in ("mfu", "mfu_stage_3"):
        mfu_range(getattr(hardware, key), 1 << 30, key)
