"""Re-ranking: the candidates that contrastive embeddings rank first are ordered anew by the matching head, which sees both together.

Source: Li et al. 2021 (ALBEF), section 4: the k nearest by embeddings, then their matching scores.

Shape letters: N records, K candidates a query, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.collate import Collator
from mmscale.data.dataset import Place, ShardDataset
from mmscale.data.example import Example
from mmscale.model import MMScaleModel
from mmscale.model.match import match_pairs
from mmscale.tasks.task import Record
from mmscale.tasks.together import Together

Places = NDArray[np.int64]
"""Numbers of records."""
_QUERIES_AT_ONCE = 1024
"""Queries whose similarities to all candidates are held at once."""
DIRECTIONS = ("image_to_text", "text_to_image")


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
    """Add to each record the K first candidates and their matching logits, as `image_to_text` and `text_to_image` (all ranks call).

    Which pairs share a batch depends on the records and the batch size alone, so that ranks change no bit.

    Args:
        look: the model and the data.
        records: of retrieval, on rank 0 all of them in order of position.
    """
    k, together = (look.config.task.rerank if look.config.task else 0), look.together
    if not k:
        return records
    found = (_first(records, k), [r["position"] for r in records]) if together.rank == 0 else None
    told = together.tell(found)
    assert told is not None
    firsts, positions = told
    count = len(positions)
    query_N1 = np.arange(count)[:, None]
    coded = [query_N1 * count + firsts[0], firsts[1] * count + query_N1]  # image * N + text
    pair_P = np.unique(np.concatenate([c.ravel() for c in coded]))
    logit_P = _score(look, np.array(positions), pair_P, max(1, look.batch // (2 * k)))
    if together.rank == 0:
        for direction, first_NK, code_NK in zip(DIRECTIONS, firsts, coded, strict=True):
            logit_NK = logit_P[np.searchsorted(pair_P, code_NK)]
            for record, first_K, logit_K in zip(records, first_NK, logit_NK, strict=True):
                record[direction] = np.stack([first_K.astype(np.float64), logit_K.astype(np.float64)])
    return records


def reranked(records: Sequence[Record], direction: str, rank_N: Places, group_N: Places) -> Places:
    """Ranks, from 0, of each query's best right candidate after re-ranking; a right one beyond the first K keeps its rank.

    Args:
        records: with the candidates of the direction.
        direction: one of `DIRECTIONS`.
        rank_N: ranks by the embeddings.
        group_N: a candidate is right whose group is the query's.
    """
    first_NK, logit_NK = (np.stack([r[direction][i] for r in records]) for i in range(2))
    right_NK = group_N[first_NK.astype(np.int64)] == group_N[:, None]
    best_N1 = np.where(right_NK, logit_NK, -np.inf).max(1, keepdims=True)
    before_N = np.count_nonzero(~(logit_NK < best_N1) & ~right_NK, axis=1)
    return np.where(right_NK.any(1), before_N, np.maximum(rank_N, first_NK.shape[1]))


def _first(records: Sequence[Record], k: int) -> list[Places]:
    """The candidates of each direction that its embeddings rank first, (N, K)."""
    images_NE, texts_NE = np.stack([r["image"] for r in records]), np.stack([r["text"] for r in records])
    k = min(k, len(records))
    found = []
    for queries_NE, candidates_NE in ((images_NE, texts_NE), (texts_NE, images_NE)):
        parts = [
            np.argsort(-(queries_NE[start : start + _QUERIES_AT_ONCE] @ candidates_NE.T), axis=1, kind="stable")[:, :k]
            for start in range(0, len(queries_NE), _QUERIES_AT_ONCE)
        ]
        found.append(np.concatenate(parts))
    return found


def _score(look: Look, positions_N: Places, pair_P: Places, images: int) -> NDArray[np.float32]:
    """Matching logits of pairs, on rank 0; ranks take turns by so many images, all of them equally often, as ZeRO 3 needs."""
    count, together = len(positions_N), look.together
    bounds = np.searchsorted(pair_P, np.arange(0, count + images, images) * count)
    chunks = [slice(a, b) for a, b in pairwise(bounds.tolist())]
    rounds = -(-len(chunks) // together.size)
    plan = replace(look.collator.plan, caption=None, prompt=None, text=look.collator.plan.caption, text_fraction=1.0)
    collator = replace(look.collator, plan=plan)
    own = []
    for turn in range(rounds):
        number = turn * together.size + together.rank
        some_P = pair_P[chunks[number]] if number < len(chunks) else pair_P[:0]
        image_P, text_P = some_P // count, some_P % count
        shown = np.unique(np.concatenate([image_P, text_P]))
        rows = {place: row for row, place in enumerate(shown.tolist())}
        batch = _batch(look.dataset, collator, positions_N[shown], np.isin(shown, image_P)).to(look.device)
        pairs = ([rows[place] for place in places.tolist()] for places in (image_P, text_P))
        images_R, texts_R = (torch.tensor(found, dtype=torch.int64, device=look.device) for found in pairs)
        own.append((number, match_pairs(look.model, batch, images_R, texts_R).float().cpu().numpy()))
    gathered = sorted(together.gather(own), key=lambda part: part[0])
    return np.concatenate([logits for _, logits in gathered]) if gathered else np.empty(0, np.float32)


def _batch(dataset: ShardDataset, collator: Collator, positions: Places, shows: NDArray[np.bool_]) -> Batch:
    """Read samples; what they show is decoded of some of them only, the texts of all."""
    places = dataset.places(positions)
    return collator(list(_examples(dataset, collator, places, shows.tolist())))


def _examples(dataset: ShardDataset, collator: Collator, places: Sequence[Place], shows: Sequence[bool]) -> Iterator[Example]:
    for place, shown in zip(places, shows, strict=True):
        modalities = {
            name: (modality, np.empty((modality.max_patches, modality.values), modality.dtype))
            for name, modality in (collator.modalities.items() if shown else ())
        }
        yield dataset.decode(place, dataset.fetch(place), image=shown and collator.takes_squares, modalities=modalities)
