"""The images and texts of a retrieval: which belong together, and how they rank one another.

Shape letters: N images, T texts, Q queries, C candidates, K first candidates, E embedding size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.tasks.task import Record

DIRECTIONS = ("image_to_text", "text_to_image")
Numbers = NDArray[np.int64]
_QUERIES_AT_ONCE = 1024
"""Queries whose similarities to all candidates are held at once."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Images, one a record, and texts, all captions of all records."""

    images_NE: NDArray[np.float32]
    texts_TE: NDArray[np.float32]
    captions: list[str]
    """Of each text."""
    bounds: Numbers
    """Texts up to the end of each record, from 0."""

    @classmethod
    def of(cls, records: Sequence[Record]) -> Gallery:
        """Put together what retrieval has embedded."""
        captions = [[r["caption"], *r.get("captions", ())] for r in records]
        texts = [[r["text"][None], *([r["texts"]] if "texts" in r else [])] for r in records]
        bounds = np.cumsum([0, *map(len, captions)])
        flat = np.concatenate([text for found in texts for text in found])
        named = [caption for found in captions for caption in found]
        first: dict[str, int] = {}
        # equal texts have one embedding: else the rounding of their batches would say which comes first
        same = np.array([first.setdefault(caption, number) for number, caption in enumerate(named)])
        return cls(np.stack([r["image"] for r in records]), flat[same], named, bounds)

    def ranks(self, direction: str) -> Numbers:
        """Rank, from 0, of the best right candidate of each query, by the embeddings."""
        right, parts = self.right(direction), []
        for start, similarity_QC in self._similarities(direction):
            right_QC = np.zeros(similarity_QC.shape, dtype=bool)
            for row, candidates in enumerate(right[start : start + len(similarity_QC)]):
                right_QC[row, candidates] = True
            parts.append(first_right_rank(similarity_QC, right_QC))
        return np.concatenate(parts)

    def first(self, direction: str, k: int) -> Numbers:
        """The K candidates of each query that the embeddings rank first, (Q, K)."""
        parts = [np.argsort(-similarity_QC, axis=1, kind="stable")[:, :k] for _, similarity_QC in self._similarities(direction)]
        return np.concatenate(parts)

    def right(self, direction: str) -> list[Numbers]:
        """Right candidates of each query: texts that equal one of the image's captions; images that have an equal caption."""
        texts_of, images_of = defaultdict(list), defaultdict(set)
        owner_T = np.repeat(np.arange(len(self.images_NE)), np.diff(self.bounds)).tolist()
        for text, (caption, image) in enumerate(zip(self.captions, owner_T, strict=True)):
            texts_of[caption].append(text)
            images_of[caption].add(image)
        if direction == "text_to_image":
            return [np.array(sorted(images_of[caption])) for caption in self.captions]
        own = [self.captions[start:end] for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)]
        return [np.array(sorted({text for caption in found for text in texts_of[caption]})) for found in own]

    def reranked(self, direction: str, records: Sequence[Record], rank_Q: Numbers) -> Numbers:
        """Ranks, from 0, after re-ranking; of a query without a right candidate among the first K the rank stays, behind them.

        Args:
            direction: one of `DIRECTIONS`.
            records: with what `rerank` has added.
            rank_Q: ranks by the embeddings.
        """
        found = [r[direction] if r[direction].ndim == 3 else r[direction][None] for r in records]
        first_QK, logit_QK = np.concatenate(found).transpose(1, 0, 2)
        right_QK = np.stack([np.isin(first, right) for first, right in zip(first_QK, self.right(direction), strict=True)])
        before_Q = first_right_rank(logit_QK, right_QK)
        return np.where(right_QK.any(1), before_Q, np.maximum(rank_Q, first_QK.shape[1]))

    def _similarities(self, direction: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Numbers of first queries, and the similarities of a block of queries to all candidates."""
        to_text = direction == "image_to_text"
        queries, candidates = (self.images_NE, self.texts_TE) if to_text else (self.texts_TE, self.images_NE)
        # equal columns of one product can differ in their last bit: equal texts are compared once
        distinct_UE, column_T = np.unique(self.texts_TE, axis=0, return_inverse=True) if to_text else (candidates, slice(None))
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            yield start, (queries[start : start + _QUERIES_AT_ONCE] @ distinct_UE.T)[:, column_T]


def first_right_rank(similarity_QC: NDArray[Any], right_QC: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rank, from 0, of each query's best right candidate; a wrong one that ties with it, or is NaN, ranks before it."""
    best_Q1 = np.where(right_QC, similarity_QC, -np.inf).max(axis=1, keepdims=True)
    before_QC: NDArray[np.bool_] = ~(similarity_QC < best_Q1) & ~right_QC
    rank_Q: NDArray[np.int64] = np.count_nonzero(before_QC, axis=1)
    return rank_Q
