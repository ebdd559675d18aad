"""megatron-energon: the tars, indexed by its own `energon prepare`, read as crude samples that a task encoder decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

from benchmarks.readers import BATCH, Options
from benchmarks.readers.picture import decode
from benchmarks.readers.tars import link

SETTINGS = (
    "CrudeWebdataset without its decoder, shuffle_buffer_size=1000, max_samples_per_sequence=100, repeat=False; resume by save_state_rank"
)


def prepare(tars: Path, folder: Path) -> None:
    """Index the tars by its own preparation."""
    link(tars, folder)
    names = sorted(path.name for path in folder.glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


@dataclass
class Picture(Sample):
    """A sample, decoded or not yet: the shuffle buffer holds encoded images."""

    jpg: bytes
    image: np.ndarray | None = None


@dataclass
class Pictures:
    """A batch."""

    keys: list[str]
    images: torch.Tensor


@stateless
def cook(sample: dict[str, Any]) -> Picture:
    """Take what is needed of a crude sample."""
    return Picture(**basic_sample_keys(sample), jpg=sample["jpg"])


class Encoder(DefaultTaskEncoder):
    """Decodes and stacks."""

    decoder = None
    cookers = [Cooker(cook)]  # noqa: RUF012  (its interface)

    @stateless
    def encode_sample(self, sample: Picture) -> Picture:
        """Decode, behind the shuffle buffer."""
        return Picture.derive_from(sample, jpg=b"", image=decode(sample.jpg))

    @stateless
    def batch(self, samples: list[Picture]) -> Pictures:
        """Stack decoded samples."""
        return Pictures([s.__key__ for s in samples], torch.from_numpy(np.stack([s.image for s in samples])))


class Reader:
    """One epoch."""

    def __init__(self, options: Options) -> None:
        dataset = get_train_dataset(
            options.folder,
            worker_config=WorkerConfig(rank=options.rank, world_size=options.size, num_workers=options.workers),
            batch_size=BATCH,
            shuffle_buffer_size=1000,
            max_samples_per_sequence=100,
            repeat=False,
            task_encoder=Encoder(),
        )
        self.loader = get_savable_loader(dataset)
        if options.state is not None:
            self.loader.restore_state_rank(options.state)

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        for batch in self.loader:
            yield batch.keys, batch.images

    def state(self) -> Any:
        """Return its state."""
        return self.loader.save_state_rank()
