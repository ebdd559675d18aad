"""What pictures of an evaluation are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.build import Builder
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.model.looking import attention_to_images
from mmscale.tasks.task import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """An evaluation that is over."""

    records: Sequence[Record]
    """What was predicted, in order of position."""
    dataset: ShardDataset
    """What the records' positions refer to; its pictures have their own size."""
    config: RunConfig
    out: Path
    """Folder of the pictures."""
    model: MMScaleModel
    tokenizer: TextTokenizer
    device: torch.device

    def draw_attention(self, records: Sequence[Record], *, text: str | None, written: bool = False) -> None:
        """Draw `attention.png`: what some right and some wrong records look at; of an evaluation without images there is none.

        Args:
            records: with `label`, `prediction` and `confidence`.
            text: field of the text that the model read; None for none.
            written: as for `attention_to_images`.
        """
        from mmscale.pictures import chosen_examples, draw_attention

        chosen = [record for both in chosen_examples(records, columns=3, rows=2) for record in both]
        maps = self.attention([record["position"] for record in chosen], written=written)
        shown, path = [record for record in chosen if record["position"] in maps], self.out / "attention.png"
        path.unlink(missing_ok=True)  # of an evaluation that saw images
        if shown:
            draw_attention(shown, maps, self.dataset, path, text=text)

    def attention(self, positions: Sequence[int], *, written: bool = False) -> dict[int, NDArray[np.float32]]:
        """What the token that answers looks at, by position: (height, width) in patches, see `attention_to_images`.

        Positions without an image are left out, and all of them where the model has no fusion layers.
        """
        config = self.config
        dataset = ShardDataset(config.data.shards, seed=0, image_size=config.model.image_size, store=config.store)
        builder = Builder(dataset, Collator.from_config(config, self.tokenizer, training=False, facts=self.model.config.facts))
        places, arena = dataset.places(positions), np.empty(builder.decoded_bytes(len(positions)), np.uint8)
        with ThreadPoolExecutor(1) as pool:
            batch = builder.submit(pool, 1, places, arena).result().batch.to(self.device)
        found = attention_to_images(self.model, batch, written=written)
        return {positions[row]: share.numpy() for row, share in found.items()}
