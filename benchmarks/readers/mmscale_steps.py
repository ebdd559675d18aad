"""Ours as training uses it: `StepLoader` over images alone, worker processes with one decode thread each; a thread for 0 workers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.readers import BATCH, Options, mmscale_threads
from benchmarks.readers.picture import SHORT_SIDE, SIZE
from mmscale.config import DataConfig, RunConfig
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader
from mmscale.data.starting import StartingFeed
from mmscale.data.tokenize import TextTokenizer
from mmscale.model_config import ModelConfig
from mmscale.objectives_config import ObjectiveConfig, ObjectivesConfig

SETTINGS = "StepLoader, images alone, worker processes of one decode thread each; without the next epoch's rows in the last batch"


def prepare(tars: Path, folder: Path) -> None:
    """Index the tars, and write the smallest tokenizer there is; no text is read here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    mmscale_threads.prepare(tars, folder)
    backend = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1}, unk_token="[SEP]"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")
    wrapped.save_pretrained(str(folder / "tokenizer"))
    (folder / "tokenizer.pickle").write_bytes(pickle.dumps(TextTokenizer(folder / "tokenizer")))  # as it goes to workers


class Reader:
    """One epoch."""

    def __init__(self, options: Options) -> None:
        config = RunConfig(
            run="",
            data=DataConfig(shards=str(options.folder), caption=None, text=None),
            model=ModelConfig(image_size=SIZE, patch_size=16),
            objectives=ObjectivesConfig(contrastive=ObjectiveConfig(weight=1.0)),
        )
        dataset = ShardDataset(options.folder, image_size=SIZE, short_side=SHORT_SIDE)
        self.seen, self.rows = options.state or 0, len(dataset)
        self.loader = StepLoader(
            dataset,
            Collator.from_config(config, pickle.loads((options.folder / "tokenizer.pickle").read_bytes())),
            global_batch=BATCH * options.size,
            micro_batch=BATCH,
            rank=options.rank,
            size=options.size,
            samples_seen=self.seen,
            steps=-(-self.rows // (BATCH * options.size)),
            workers=options.workers,
            threads=1,
            prefetch=2,
        )

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        with self.loader:
            for step in self.loader:
                self.seen = step.samples_seen_after
                inside = sum(position < self.rows for position in step.positions)
                yield step.keys[:inside], step.micro[0].pixels_NCHW[:inside].permute(0, 2, 3, 1)

    def settle(self) -> None:
        """Wait until the worker processes have taken over from the threads of the start."""
        if isinstance(self.loader.feed, StartingFeed):
            assert self.loader.feed.workers.pids

    def state(self) -> int:
        """Return the samples seen."""
        return self.seen
