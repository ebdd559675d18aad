"""Image-text retrieval by the contrastive embeddings, re-ranked by matching where it is asked for: R@1, R@5 and R@10 both ways.

Shape letters: N records, Q queries, C candidates, E embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.dataset import ShardDataset
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives.contrastive import Contrastive
from mmscale.tasks.fields import caption_field
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.rerank import rerank, reranked
from mmscale.tasks.task import Metrics, Record, Resampler, mean_of_resamples, record_of, texts_of

AT = (1, 5, 10)
_QUERIES_AT_ONCE = 1024
"""Queries whose similarities to all candidates are held at once."""


class Retrieval:
    """Ranks all texts for each image and all images for each text; candidates with an equal caption are equally right.

    Args:
        caption: field of the text; of several captions of a sample the first one counts.
    """

    name = "retrieval"
    main_metric = "image_to_text_r1"

    def __init__(self, caption: str) -> None:
        self.caption = caption

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Embed the samples that have an image and a text."""
        images_NE, texts_SE = model.embed_images(batch).float().cpu(), model.embed_captions(batch).float().cpu()
        image_of = {int(row): i for i, row in enumerate(batch.perception_rows_N)}
        return [
            record_of(
                batch,
                row,
                caption=texts_of(batch.fields[row], self.caption)[0],
                image=images_NE[image_of[row]].numpy(),
                text=texts_SE[index].numpy(),
            )
            for index, row in enumerate(batch.caption.rows_S.tolist())
            if row in image_of
        ]

    def score(self, records: Sequence[Record]) -> Metrics:
        """R@k both ways over all records as candidates; of the contrastive order besides where it was changed by re-ranking."""
        images_NE, texts_NE = np.stack([r["image"] for r in records]), np.stack([r["text"] for r in records])
        _, group_N = np.unique([r["caption"] for r in records], return_inverse=True)
        scores: dict[str, float | None] = {"candidates": float(len(records))}
        contrastive: dict[str, float | None] = {}
        for direction, queries, candidates in (("image_to_text", images_NE, texts_NE), ("text_to_image", texts_NE, images_NE)):
            rank_N = ranks(queries, candidates, group_N)
            if direction in records[0]:
                contrastive |= {f"contrastive_{direction}_r{k}": float((rank_N < k).mean()) for k in AT}
                rank_N = reranked(records, direction, rank_N, group_N)
            scores |= {f"{direction}_r{k}": float((rank_N < k).mean()) for k in AT}
        return scores | contrastive

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """R@1 of image to text, of resampled queries among the same candidates."""
        images_NE, texts_NE = np.stack([r["image"] for r in records]), np.stack([r["text"] for r in records])
        _, group_N = np.unique([r["caption"] for r in records], return_inverse=True)
        rank_N = ranks(images_NE, texts_NE, group_N)
        if "image_to_text" in records[0]:
            rank_N = reranked(records, "image_to_text", rank_N, group_N)
        return mean_of_resamples(rank_N < 1)


def ranks(queries_NE: NDArray[np.float32], candidates_NE: NDArray[np.float32], group_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank, from 0, of the best right candidate of each query; a candidate is right whose group is the query's."""
    parts = []
    for start in range(0, len(queries_NE), _QUERIES_AT_ONCE):
        some = slice(start, start + _QUERIES_AT_ONCE)
        parts.append(first_right_rank(queries_NE[some] @ candidates_NE.T, group_N[some, None] == group_N))
    return np.concatenate(parts)


def first_right_rank(similarity_QC: NDArray[Any], right_QC: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rank, from 0, of each query's best right candidate; a wrong one that ties with it, or is NaN, ranks before it."""
    best_Q1 = np.where(right_QC, similarity_QC, -np.inf).max(axis=1, keepdims=True)
    before_QC: NDArray[np.bool_] = ~(similarity_QC < best_Q1) & ~right_QC
    rank_Q: NDArray[np.int64] = np.count_nonzero(before_QC, axis=1)
    return rank_Q


def _draw(records: Sequence[Record], dataset: ShardDataset, config: RunConfig, out: Path) -> None:
    from mmscale.pictures import draw_retrieval

    draw_retrieval(records, dataset, out / "retrieval.png")


KIND = TaskKind(
    name="retrieval",
    build=lambda config: Retrieval(caption_field(config)),
    objective=lambda task: Contrastive(weight=task.weight),
    caption=True,
    refine=rerank,
    draw=_draw,
)
