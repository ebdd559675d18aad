"""What is known of the data before it is read: the manifest's figures where there is one, else assumptions; each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.assumptions import GIVEN, Assumptions
from launcher.estimate import known_vocabulary
from mmscale.config import RunConfig
from mmscale.data_config import mixture_sources
from shards.manifest import MANIFEST_NAME, Manifest, read_manifest

SAMPLE_BYTES = 25_000
SHORTEST_TEXT = 4
"""Tokens of the shortest text of benchmarks/gpu.py."""
CHARACTERS_A_TOKEN = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """Figures of the samples."""

    sample_bytes: float
    text_tokens: int
    """Mean of a text, those of its begin and end included."""
    vocabulary: int | None
    """Entries of the tokenizer; None where it is not known."""
    samples: int | None
    """In the data set; None where it is not known."""
    sources: dict[str, str]
    """Figure -> where it is from."""


def data_facts(config: RunConfig, assumptions: Assumptions) -> DataFacts:
    """Take what was given, else what the manifests of `data.shards` say, else what is assumed.

    Raises:
        ConfigError, ShardError: `data.shards` is no data set, or its manifest is damaged.
    """
    sources = mixture_sources(config.data)
    places = [Path(source.path) for source in sources] if sources else [Path(str(config.data.shards))]
    manifests = [read_manifest(place, check_files=False) for place in places if (place / MANIFEST_NAME).is_file()]
    manifests = manifests if len(manifests) == len(places) else []
    rows = sum(manifest.rows for manifest in manifests)
    sample, said = assumptions.sample, {}
    if sample.bytes is not None:
        a_sample, said["sample.bytes"] = float(sample.bytes), GIVEN
    elif rows:
        a_sample, said["sample.bytes"] = sum(manifest.bytes for manifest in manifests) / rows, f"manifest of {', '.join(map(str, places))}"
    else:
        a_sample, said["sample.bytes"] = SAMPLE_BYTES, "LAION-400M (Schuhmann et al. 2021): 10 TB of 256-pixel shards for 400 M pairs"
    longest, characters = config.data.max_text_tokens, _characters(manifests)
    if sample.text_tokens is not None:
        tokens, said["sample.text_tokens"] = sample.text_tokens, GIVEN
    elif characters is not None:
        tokens = characters / CHARACTERS_A_TOKEN + 2
        said["sample.text_tokens"] = f"manifest: captions of {characters:.0f} characters, assumed {CHARACTERS_A_TOKEN:g} to a token, and 2"
    else:
        tokens = (SHORTEST_TEXT + longest) / 2
        said["sample.text_tokens"] = f"assumed: evenly {SHORTEST_TEXT} to data.max_text_tokens = {longest}, as benchmarks/gpu.py has them"
    vocabulary = sample.vocabulary or known_vocabulary(config)
    said["sample.vocabulary"] = GIVEN if sample.vocabulary else "the data set's tokenizer" if vocabulary else "assumed: BERT's"
    return DataFacts(
        sample_bytes=a_sample,
        text_tokens=max(1, min(longest, round(tokens))),
        vocabulary=vocabulary,
        samples=rows or None,
        sources=said,
    )


def _characters(manifests: list[Manifest]) -> float | None:
    """Mean length of a caption."""
    shards = [(shard.caption_count, shard.caption_length_mean) for manifest in manifests for shard in manifest.shards]
    captions = sum(count for count, mean in shards if mean is not None)
    return sum(count * mean for count, mean in shards if mean is not None) / captions if captions else None
