"""Re-ranking: the candidates that contrastive embeddings rank first are ordered anew by the matching head, which sees both together.

Source: Li et al. 2021 (ALBEF), section 4: the k nearest by embeddings, then their matching scores.

Shape letters: N records, T texts, Q queries, K candidates a query, P pairs, R pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.example import Example
from mmscale.model import MMScaleModel
from mmscale.model.match import match_pairs
from mmscale.tasks.gallery import DIRECTIONS, Gallery, Numbers
from mmscale.tasks.task import Record
from mmscale.tasks.together import Together


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a second look at all records takes."""

    model: MMScaleModel
    config: RunConfig
    dataset: ShardDataset
    collator: Collator
    """Of the first look."""
    batch: int
    """Samples in a batch."""
    device: torch.device
    together: Together


def rerank(look: Look, records: list[Record]) -> list[Record]:
    """Add to each record its queries' K first candidates and their matching logits (all ranks call).

    `image_to_text` is (2, K): texts, numbered over all records, and logits; `text_to_image` (T, 2, K) of its T captions: images and logits.
    Which pairs share a batch depends on the records and the batch size alone, so that ranks change no bit.

    Args:
        look: the model and the data.
        records: of retrieval, on rank 0 all of them in order of position.
    """
    k, together = (look.config.task.rerank if look.config.task else 0), look.together
    if not k:
        return records
    gallery = Gallery.of(records) if together.rank == 0 else None
    told = None
    if gallery is not None:
        firsts = {direction: gallery.first(direction, k) for direction in DIRECTIONS}
        told = firsts, np.array([r["position"] for r in records]), gallery.captions
    told = together.tell(told)
    assert told is not None
    firsts, positions_N, captions = told
    images, texts = len(positions_N), len(captions)
    coded = {  # image * T + text
        "image_to_text": np.arange(images)[:, None] * texts + firsts["image_to_text"],
        "text_to_image": firsts["text_to_image"] * texts + np.arange(texts)[:, None],
    }
    pair_P = np.unique(np.concatenate([code_QK.ravel() for code_QK in coded.values()]))
    logit_P = _score(look, positions_N, captions, pair_P, max(1, look.batch // (2 * k)))
    if gallery is not None:
        for direction, code_QK in coded.items():
            logit_QK = logit_P[np.searchsorted(pair_P, code_QK)]
            added_Q2K = np.stack([firsts[direction].astype(np.float64), logit_QK.astype(np.float64)], axis=1)
            for number, record in enumerate(records):
                own = slice(gallery.bounds[number], gallery.bounds[number + 1]) if direction == "text_to_image" else number
                record[direction] = added_Q2K[own]
    return records


def _score(look: Look, positions_N: Numbers, captions: Sequence[str], pair_P: Numbers, images: int) -> NDArray[np.float32]:
    """Matching logits of pairs, on rank 0; ranks take turns by so many images, all of them equally often, as ZeRO 3 needs."""
    texts, together = len(captions), look.together
    bounds = np.searchsorted(pair_P, np.arange(0, len(positions_N) + images, images) * texts)
    chunks = [slice(a, b) for a, b in pairwise(bounds.tolist())]
    plan = replace(look.collator.plan, caption=None, prompt=None, text="caption", text_fraction=1.0)
    collator = replace(look.collator, plan=plan)
    own = []
    for turn in range(-(-len(chunks) // together.size)):
        number = turn * together.size + together.rank
        some_P = pair_P[chunks[number]] if number < len(chunks) else pair_P[:0]
        image, image_R = np.unique(some_P // texts, return_inverse=True)
        text, text_R = np.unique(some_P % texts, return_inverse=True)
        examples = list(_shown(look.dataset, collator, positions_N[image]))
        examples += [Example(0, "", captions=[captions[t]]) for t in text.tolist()]
        rows = (torch.from_numpy(r).to(look.device) for r in (image_R, text_R + len(image)))
        own.append((number, match_pairs(look.model, collator(examples).to(look.device), *rows).float().cpu().numpy()))
    gathered = sorted(together.gather(own), key=lambda part: part[0])
    return np.concatenate([logits for _, logits in gathered]) if gathered else np.empty(0, np.float32)


def _shown(dataset: ShardDataset, collator: Collator, positions: Numbers) -> Iterator[Example]:
    """Read what samples show, without their texts."""
    for place in dataset.places(positions):
        modalities = {name: (m, np.empty((m.max_patches, m.values), m.dtype)) for name, m in collator.modalities.items()}
        found = dataset.decode(place, dataset.fetch(place), image=collator.takes_squares, modalities=modalities)
        yield replace(found, captions=[], fields={})
