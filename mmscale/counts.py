"""What one micro-batch puts into the model, in plain numbers: what its operations and its memory follow from.

Counted with numpy on the batch as the loader built it, before it goes to a device: a fraction of a millisecond a batch.

Shape letters: S sequences, M samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch, TextStream
from mmscale.model.attention import SHORTEST_BUCKET
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.pairs import row_hash
from mmscale.model.sequences import Wanted

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Tokens that go through a stack of layers, and how they attend."""

    image_tokens: int
    text_tokens: int
    seen: int
    """Query-key pairs that see each other."""
    sequences: int
    """Sequences that are padded or packed; images of the lower stack, all alike, are not among them."""
    slots: int
    """Tokens of those sequences once padded to the longest of their bucket."""
    masks: int
    """Entries of the padded groups' masks."""
    prefix: int
    """Tokens of leading parts that see each other both ways."""
    rest: int
    """Tokens that see what is before them."""
    keys: int
    """Tokens of the sequences that have a rest."""

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Sizes of one forward of one micro-batch. The text drawn as a hard negative is not known: it counts as the sample's own."""

    wanted: Wanted
    samples: int
    images: int
    hidden_images: int
    """Images with hidden patches, which the lower stack takes once more."""
    captions: int
    lower: Stack
    upper: Stack
    words: int
    """Rows of the language head."""
    pooled: int
    """Text rows of the matching and task heads."""
    patches: int
    """Rows of the masked-image heads."""
    alone: int
    """Image rows of the task heads."""

    @property
    def read_images(self) -> int:
        """Image rows that go on after the last layer's attention."""
        return self.patches + self.alone

    @property
    def read_texts(self) -> int:
        """Text rows that do."""
        return self.words + self.pooled


def count(config: MMScaleConfig, batch: Batch, wanted: Wanted) -> Counts:
    """Count a micro-batch that lies in the host's memory."""
    images, length = len(batch.image_rows_N), config.image_tokens
    hidden = int(batch.patch_mask_NP.any(1).sum()) if wanted.masked_image else 0
    caption_S, text_S = _lengths(batch.caption), _lengths(batch.text)
    lead_M = np.zeros(batch.size, np.int64)
    lead_M[_array(batch.image_rows_N)] = length
    text_M = np.zeros(batch.size, np.int64)
    text_M[_array(batch.text.rows_S)] = text_S
    fuse = [_array(stream.fuse_S).astype(bool) & on for stream, on in ((batch.caption, wanted.captioning), (batch.text, wanted.fused))]
    anchors = _anchors(batch, wanted.matching_group) if wanted.matching else np.zeros(0, np.int64)
    alone = int(((lead_M > 0) & (text_M == 0)).sum()) if wanted.classify else 0
    whole = np.full(hidden + alone, length, np.int64)
    lead_S = [lead_M[_array(s.rows_S)[f]] for s, f in zip((batch.caption, batch.text), fuse, strict=True)] + [lead_M[anchors], whole]
    words_S = [caption_S[fuse[0]], text_S[fuse[1]], text_M[anchors], np.zeros_like(whole)]
    causal = [np.full(len(lead), index == 0) for index, lead in enumerate(lead_S)]
    words = _labels(batch.caption, fuse[0]) + (_labels(batch.text, fuse[1]) if wanted.masked_language else 0)
    pooled = wanted.matching or wanted.classify
    texts = np.concatenate([caption_S, text_S])
    causal_S = (np.arange(len(texts)) < len(caption_S)) & (config.text_tower.captions == "causal")
    lower = _stack(np.zeros_like(texts), texts, causal_S, packed_images=(images + hidden, length))
    return Counts(
        wanted=wanted,
        samples=batch.size,
        images=images,
        hidden_images=hidden,
        captions=len(caption_S),
        lower=lower,
        upper=_stack(np.concatenate(lead_S), np.concatenate(words_S), np.concatenate(causal)),
        words=words,
        pooled=(len(words_S[1]) + len(words_S[2])) if pooled else 0,
        patches=int(batch.patch_mask_NP.sum()) if wanted.masked_image else 0,
        alone=alone * (1 if config.image_tower.leading_tokens else config.patches),
    )


def _stack(lead_S: Ints, text_S: Ints, causal_S: npt.NDArray[np.bool_], packed_images: tuple[int, int] = (0, 0)) -> Stack:
    whole_S = lead_S + text_S
    prefix_S = np.where(causal_S, lead_S, whole_S)
    rest_S = whole_S - prefix_S
    seen = prefix_S**2 + rest_S * prefix_S + rest_S * (rest_S + 1) // 2
    images, length = packed_images
    slots, masks = _padding(whole_S, prefix_S)
    return Stack(
        image_tokens=int(lead_S.sum()) + images * length,
        text_tokens=int(text_S.sum()),
        seen=int(seen.sum()) + images * length**2,
        sequences=len(whole_S),
        slots=slots,
        masks=masks,
        prefix=int(prefix_S.sum()),
        rest=int(rest_S.sum()),
        keys=int(whole_S[rest_S > 0].sum()),
    )


def _padding(whole_S: Ints, prefix_S: Ints) -> tuple[int, int]:
    """Slots and mask entries of `attention.padded_plan`."""
    if not len(whole_S):
        return 0, 0
    buckets_S = np.floor(np.log2(np.maximum(whole_S, SHORTEST_BUCKET) - 1)).astype(np.int64)
    slots = masks = 0
    for bucket in np.unique(buckets_S):
        chosen = buckets_S == bucket
        longest, number = int(whole_S[chosen].max()), int(chosen.sum())
        slots += number * longest
        plain = bool((whole_S[chosen] == longest).all() and (prefix_S[chosen] >= longest).all())
        masks += 0 if plain else number * longest**2
    return slots, masks


def _anchors(batch: Batch, group: int | None) -> Ints:
    """Samples that get a hard negative, as `pairs.negative_candidates(...).any(1)` names them, without the matrix."""
    images, texts = np.zeros(batch.size, bool), np.zeros(batch.size, bool)
    images[_array(batch.image_rows_N)] = True
    texts[_array(batch.text.rows_S)] = True
    pairs = np.flatnonzero(images & texts)
    if group is None and np.unique(_hashed_lengths(batch)[pairs]).size > 1:
        return pairs  # texts of different lengths are different texts: the hash, which takes longer, need not be asked
    places = np.zeros_like(pairs) if group is None else _array(batch.positions_M)[pairs] // group
    kinds = np.unique(np.stack([places, _array(row_hash(batch))[pairs]]), axis=1)[0]
    found, times = np.unique(kinds, return_counts=True)
    anchors: Ints = pairs[np.isin(places, found[times > 1])]
    return anchors


def _hashed_lengths(batch: Batch) -> Ints:
    """Tokens of the text of each sample that `pairs.row_hash` hashes."""
    lengths_M = np.zeros(batch.size, np.int64)
    for stream in (batch.text, batch.caption):
        lengths_M[_array(stream.rows_S)] = _lengths(stream)
    return lengths_M


def _lengths(stream: TextStream) -> Ints:
    lengths: Ints = np.diff(_array(stream.cu_seqlens_S1).astype(np.int64))
    return lengths


def _labels(stream: TextStream, chosen: npt.NDArray[np.bool_]) -> int:
    """Labels in the chosen sequences."""
    sums = np.concatenate([[0], np.cumsum(_array(stream.labels_T) != IGNORE)])[_array(stream.cu_seqlens_S1)]
    return int(np.diff(sums)[chosen].sum())


def _array(tensor: Tensor) -> Any:
    return tensor.numpy()
