"""What one micro-batch puts into the model, in plain numbers: what its operations and its memory follow from.

Counted with numpy on the batch as the loader built it, before it goes to a device: a fraction of a millisecond a batch.

Shape letters: S sequences, M samples, T tokens or patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch, PatchStream, TextStream
from mmscale.modalities.modality import Modality, build_modalities, experts_of
from mmscale.model.attention import SHORTEST_BUCKET
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.pairs import row_hash
from mmscale.model.sequences import Wanted

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Tokens that go through a stack of layers, and how they attend."""

    perceived: int
    """Tokens of images and of items of other modalities."""
    text_tokens: int
    seen: int
    """Query-key pairs that see each other."""
    dense: bool = False
    """All sequences are of one length, square images alone: they are neither padded nor packed, and what follows is 0."""
    sequences: int = 0
    """Sequences that are padded or packed."""
    slots: int = 0
    """Tokens of those sequences once padded to the longest of their bucket."""
    masks: int = 0
    """Entries of the padded groups' masks."""
    prefix: int = 0
    """Tokens of leading parts that see each other both ways."""
    rest: int = 0
    """Tokens that see what is before them."""
    keys: int = 0
    """Tokens of the sequences that have a rest."""

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.perceived + self.text_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Sizes of one forward of one micro-batch.

    What is drawn as a hard negative is not known: its text counts as the sample's own, what is seen with it likewise.
    """

    wanted: Wanted
    samples: int
    perceiving: int
    """Samples that have an image or an item of another modality."""
    items: int
    """Their tokens, those of masked copies not among them."""
    captions: int
    values: int
    """Numbers that patch embeddings multiply: those of all patches, and each patch's weights of a table that is stretched to its grid."""
    perception: list[Stack]
    """The lower stack of each perception expert; items with hidden patches are in it once more."""
    texts: Stack
    """The lower stack of captions and texts."""
    upper: Stack
    words: int
    """Rows of the language head."""
    pooled: int
    """Text rows of the matching and task heads."""
    patches: int
    """Rows of the masked-image heads."""
    predicted: int
    """Numbers that they predict: values of patches, or features."""
    alone: int
    """Perception rows of the task heads."""
    stems: tuple[int, int] = (0, 0)
    """Numbers that the convolutions before patch embeddings keep, and their multiplications."""
    all_words: int = 0
    """Text rows that task heads pool."""
    all_items: int = 0
    """Perception rows that they pool."""

    @property
    def read_items(self) -> int:
        """Perception rows that go on after the last layer's attention."""
        return self.patches + self.alone + self.all_items

    @property
    def read_texts(self) -> int:
        """Text rows that do."""
        return self.words + self.pooled + self.all_words

    @property
    def perceived(self) -> int:
        """Tokens of the perception experts' lower stacks."""
        return sum(stack.perceived for stack in self.perception)


@dataclass(frozen=True, slots=True)
class _Items:
    """The items of one modality."""

    expert: int
    rows_S: Ints
    lengths_S: Ints
    copies_S: Ints
    """Lengths of those that come once more, with hidden patches."""
    hidden: int
    """Hidden patches."""
    values: int
    """Numbers in a patch."""
    multiplied: int
    """Numbers that the patch embedding multiplies."""
    stem: tuple[int, int] = (0, 0)
    """Numbers that the convolutions before it keep, and their multiplications."""


def count(config: MMScaleConfig, batch: Batch, wanted: Wanted, modalities: Mapping[str, Modality] | None = None) -> Counts:
    """Count a micro-batch that lies in the host's memory.

    Args:
        config: the model's shape.
        batch: the micro-batch.
        wanted: what the forward serves.
        modalities: the model's; None builds them from its configuration.
    """
    modalities = build_modalities(config) if modalities is None else modalities
    items = _items(config, batch, wanted.masked_image, modalities)
    caption_S, text_S = _lengths(batch.caption), _lengths(batch.text)
    lead_M, text_M = np.zeros(batch.size, np.int64), np.zeros(batch.size, np.int64)
    for part in items:
        lead_M[part.rows_S] += part.lengths_S
    text_M[_array(batch.text.rows_S)] = text_S
    fuse = [_array(stream.fuse_S).astype(bool) & on for stream, on in ((batch.caption, wanted.captioning), (batch.text, wanted.fused))]
    anchors = _anchors(batch, wanted.matching_group) if wanted.matching else np.zeros(0, np.int64)
    alone_S = lead_M[(lead_M > 0) & (text_M == 0)] if wanted.classify else lead_M[:0]
    whole = np.concatenate([*(part.copies_S for part in items), alone_S])
    lead_S = [lead_M[_array(s.rows_S)[f]] for s, f in zip((batch.caption, batch.text), fuse, strict=True)] + [lead_M[anchors], whole]
    words_S = [caption_S[fuse[0]], text_S[fuse[1]], text_M[anchors], np.zeros_like(whole)]
    causal = [np.full(len(lead), index == 0) for index, lead in enumerate(lead_S)]
    words = _labels(batch.caption, fuse[0]) + (_labels(batch.text, fuse[1]) if wanted.masked_language else 0)
    pooled = wanted.matching or wanted.classify
    concat = wanted.classify and config.head_pooling == "concat"
    texts = np.concatenate([caption_S, text_S])
    causal_S = (np.arange(len(texts)) < len(caption_S)) & (config.text_tower.captions == "causal")
    return Counts(
        wanted=wanted,
        samples=batch.size,
        perceiving=int((lead_M > 0).sum()),
        items=int(lead_M.sum()),
        captions=len(caption_S),
        values=sum(part.multiplied for part in items),
        perception=_perception(items, len(experts_of(modalities)), dense=not modalities),
        texts=_stack(np.zeros_like(texts), texts, causal_S),
        upper=_stack(np.concatenate(lead_S), np.concatenate(words_S), np.concatenate(causal)),
        words=words,
        pooled=(len(words_S[1]) + len(words_S[2])) if pooled else 0,
        patches=sum(part.hidden for part in items),
        predicted=sum(part.hidden * (config.hidden_size if wanted.features else part.values) for part in items),
        alone=len(alone_S) if config.image_tower.leading_tokens else int(alone_S.sum()),
        stems=(sum(part.stem[0] for part in items), sum(part.stem[1] for part in items)),
        all_words=int(words_S[1].sum()) if concat else 0,
        all_items=int(alone_S.sum()) if concat else 0,
    )


def _items(config: MMScaleConfig, batch: Batch, masked: bool, modalities: Mapping[str, Modality]) -> list[_Items]:
    """The items of each modality; square images first, unless the model takes images of any shape."""
    experts, found = experts_of(modalities), []
    if "image" not in modalities:
        n, kept = batch.patch_mask_NP.shape
        length, mask_NP = kept + config.image_tower.leading_tokens, _array(batch.patch_mask_NP)
        copies = int(mask_NP.any(1).sum()) if masked else 0
        hidden, lengths_S = int(mask_NP.sum()) if masked else 0, np.full(n, length)
        rows = _array(batch.image_rows_N)
        found.append(_Items(0, rows, lengths_S, np.full(copies, length), hidden, config.patch_values, n * kept * config.patch_values))
    for name, modality in modalities.items():
        if (stream := batch.streams.get(name)) is None:
            continue
        cells = modality.grid[1] ** 2 if modality.interpolated and config.positions == "learned" else 0
        lengths_S, hidden_S = _lengths(stream) + 1, _within(stream.mask_T, stream.cu_seqlens_S1) * masked
        plane = modality.stem_plane
        stem = (0, 0) if plane is None else (len(stream.mask_T) * plane.kept, len(stream.mask_T) * plane.products)
        multiplied = len(stream.mask_T) * ((modality.values if plane is None else plane.values) + cells)
        expert, rows = experts.index(modality.expert), _array(stream.rows_S)
        found.append(_Items(expert, rows, lengths_S, lengths_S[hidden_S > 0], int(hidden_S.sum()), modality.values, multiplied, stem))
    return found


def _perception(items: Sequence[_Items], experts: int, dense: bool) -> list[Stack]:
    """The lower stack of each expert."""
    found = []
    for expert in range(experts):
        lengths_S = np.concatenate([np.zeros(0, np.int64), *(x for i in items if i.expert == expert for x in (i.lengths_S, i.copies_S))])
        if dense:
            found.append(Stack(perceived=int(lengths_S.sum()), text_tokens=0, seen=int((lengths_S**2).sum()), dense=True))
        else:
            found.append(_stack(lengths_S, np.zeros_like(lengths_S), np.zeros(len(lengths_S), bool)))
    return found


def _stack(lead_S: Ints, text_S: Ints, causal_S: npt.NDArray[np.bool_]) -> Stack:
    whole_S = lead_S + text_S
    prefix_S = np.where(causal_S, lead_S, whole_S)
    rest_S = whole_S - prefix_S
    seen = prefix_S**2 + rest_S * prefix_S + rest_S * (rest_S + 1) // 2
    slots, masks = _padding(whole_S, prefix_S)
    return Stack(
        perceived=int(lead_S.sum()),
        text_tokens=int(text_S.sum()),
        seen=int(seen.sum()),
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
    seen, texts = np.zeros(batch.size, bool), np.zeros(batch.size, bool)
    seen[_array(batch.perception_rows_N)] = True
    texts[_array(batch.text.rows_S)] = True
    pairs = np.flatnonzero(seen & texts)
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


def _lengths(stream: TextStream | PatchStream) -> Ints:
    lengths: Ints = np.diff(_array(stream.cu_seqlens_S1).astype(np.int64))
    return lengths


def _labels(stream: TextStream, chosen: npt.NDArray[np.bool_]) -> int:
    """Labels in the chosen sequences."""
    return int(_within(stream.labels_T != IGNORE, stream.cu_seqlens_S1)[chosen].sum())


def _within(marked_T: Tensor, cu_seqlens_S1: Tensor) -> Ints:
    """Marked ones in each sequence."""
    marked: Ints = np.diff(np.concatenate([[0], np.cumsum(_array(marked_T))])[_array(cu_seqlens_S1)])
    return marked


def _array(tensor: Tensor) -> Any:
    return tensor.numpy()
