"""Image-text retrieval by the contrastive embeddings, re-ranked by matching where it is asked for: R@1, R@5 and R@10 both ways.

Shape letters: N records, T texts, Q queries, E embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmscale.data.batch import IGNORE, Batch, TextStream
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives.contrastive import Contrastive
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.fields import caption_field
from mmscale.tasks.gallery import DIRECTIONS, Gallery
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.rerank import rerank
from mmscale.tasks.task import Metrics, Record, Resampler, mean_of_resamples, record_of, texts_of

AT = (1, 5, 10)


class Retrieval:
    """Ranks all texts for each image and all images for each text.

    All captions of a sample are texts, as in COCO's and Flickr30k's protocol; a text is right for an image that has an equal caption.

    Args:
        caption: field of the texts.
        max_text_tokens: longest text in tokens.
        pad: tokens that texts are filled up to.
    """

    name = "retrieval"
    main_metric = "image_to_text_r1"

    def __init__(self, caption: str, max_text_tokens: int = 64, pad: int = 0) -> None:
        self.caption = caption
        self.max_text_tokens = max_text_tokens
        self.pad = pad

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Embed the samples that have an image and a text.

        A record has `caption` and `text` (E,), those of its first caption, and of others `captions` and `texts` (T, E).
        """
        images_NE = model.embed_images(batch).float().cpu().numpy()
        texts = [texts_of(fields, self.caption) for fields in batch.fields]
        flat = [text for found in texts for text in found]
        ids = [tokenizer.encode(text, self.max_text_tokens) for text in flat]
        filled = [found + [tokenizer.pad] * (self.pad - len(found)) for found in ids]
        embedded_TE = model.embed_captions(replace(batch, caption=_stream(filled, batch.positions_M.device))).float().cpu().numpy()
        image_of = {int(row): i for i, row in enumerate(batch.perception_rows_N)}
        records, end = [], 0
        for row, found in enumerate(texts):
            start, end = end, end + len(found)
            if not found or row not in image_of:
                continue
            record = record_of(batch, row, caption=found[0], image=images_NE[image_of[row]], text=embedded_TE[start])
            if len(found) > 1:
                record |= {"captions": found[1:], "texts": embedded_TE[start + 1 : end]}
            records.append(record)
        return records

    def score(self, records: Sequence[Record]) -> Metrics:
        """R@k both ways, all records' images and texts as candidates; of the contrastive order besides where re-ranking changed it."""
        gallery = Gallery.of(records)
        scores: dict[str, float | None] = {"candidates": float(len(records))}
        contrastive: dict[str, float | None] = {}
        for direction in DIRECTIONS:
            rank_Q = gallery.ranks(direction)
            if "image_to_text" in records[0]:
                contrastive |= {f"contrastive_{direction}_r{k}": float((rank_Q < k).mean()) for k in AT}
                rank_Q = gallery.reranked(direction, records, rank_Q)
            scores |= {f"{direction}_r{k}": float((rank_Q < k).mean()) for k in AT}
        return scores | contrastive

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """R@1 of image to text, of resampled queries among the same candidates."""
        gallery = Gallery.of(records)
        rank_N = gallery.ranks("image_to_text")
        if "image_to_text" in records[0]:
            rank_N = gallery.reranked("image_to_text", records, rank_N)
        return mean_of_resamples(rank_N < 1)


def _stream(ids: Sequence[Sequence[int]], device: torch.device) -> TextStream:
    """Texts alone, a row each."""
    flat = torch.tensor([token for found in ids for token in found], dtype=torch.int64, device=device)
    lengths = torch.tensor([0, *map(len, ids)], device=device)
    rows = torch.arange(len(ids), device=device)
    return TextStream(flat, lengths.cumsum(0).int(), rows, torch.full_like(flat, IGNORE), torch.zeros_like(rows, dtype=torch.bool))


def _draw(found: Evaluated) -> None:
    from mmscale.pictures import draw_retrieval

    draw_retrieval(found.records, found.dataset, found.out / "retrieval.png")


KIND = TaskKind(
    name="retrieval",
    build=lambda config: Retrieval(caption_field(config), config.data.max_text_tokens, config.data.pad_captions),
    objective=lambda task: Contrastive(weight=task.weight),
    caption=True,
    refine=rerank,
    draw=_draw,
)
