"""A model as its configuration describes it, and a micro-batch of typical samples, without weights and without data.

The model lies on torch's meta device: its tensors have shapes and no numbers, so that a model of any size is built in seconds. What is
worked out from it - parameters, memory, operations - is the arithmetic that a run itself uses (`mmscale.memory`, `mmscale.flops`).

Letters: M samples, T tokens or patches, P patches of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.config import RunConfig
from mmscale.counts import Counts, count
from mmscale.data.batch import IGNORE, Batch, PatchStream, TextStream
from mmscale.data.plan import StreamPlan
from mmscale.engine import Trainee
from mmscale.lora import add_adapters
from mmscale.modalities.modality import build_modalities
from mmscale.model import MMScaleConfig, MMScaleModel, mmscale_config
from mmscale.model.sequences import Wanted
from mmscale.objectives import build_objectives
from mmscale.optim import freeze
from mmscale.tasks import kind_of_stage

SPECIAL = {"pad": 0, "begin": 1, "end": 2, "mask": 3}


def outline(config: RunConfig, vocabulary: int, labels: int = 0) -> Trainee:
    """Build the model with its objectives on the meta device, adapters and freezing included.

    Args:
        config: the stage.
        vocabulary: rows of the word table.
        labels: outputs of the label head, where the stage's task has one.

    Raises:
        ConfigError: adapters or frozen names that the model does not have.
    """
    kind = kind_of_stage(config)
    heads = {kind.head: labels} if kind is not None and kind.head is not None and labels else {}
    shape = mmscale_config(config.model, vocabulary, SPECIAL, heads, candidates=config.train.global_batch)
    with torch.device("meta"):
        model = MMScaleModel(shape)
        if config.lora.rank:
            add_adapters(model, config.lora)
    freeze(model, config.optimizer.freeze)
    return Trainee(model, build_objectives(config))


@dataclass(frozen=True, kw_only=True, slots=True)
class Typical:
    """Micro-batches in which every sample has an image, an item of every other modality at its longest, and texts of one length."""

    config: RunConfig
    shape: MMScaleConfig
    wanted: Wanted
    text_tokens: int
    """Of a text, those of its begin and end included."""

    @classmethod
    def of(cls, config: RunConfig, trainee: Trainee, text_tokens: int) -> Typical:
        """Those of a stage."""
        return cls(config=config, shape=trainee.model.config, wanted=Wanted.of(trainee.objectives), text_tokens=text_tokens)

    def counts(self, samples: int) -> Counts:
        """Count a micro-batch of so many samples."""
        return count(self.shape, self.batch(samples), self.wanted)

    def batch(self, samples: int) -> Batch:
        """A micro-batch with the right sizes; there is nothing in its pictures."""
        plan = StreamPlan.from_config(self.config, training=True, has_mask=True)
        modalities = build_modalities(self.config.model) if plan.image else {}
        kept = {name: max(part for _, part in schedule) for name, schedule in plan.keep.items()}
        images = samples if plan.image and "image" not in modalities else 0
        hidden = round(samples * plan.patch_mask_fraction)

        def mask(items: int, patches: int, name: str) -> Tensor:
            seen = max(1, round(patches * kept.get(name, 1.0)))
            hidden_NP = torch.zeros((items, seen), dtype=torch.bool)
            hidden_NP[:hidden, : round(plan.patch_mask * seen)] = True
            return hidden_NP

        captions, texts = samples * (plan.caption is not None), round(samples * plan.text_fraction) * (plan.text is not None)
        length = max(self.text_tokens, self.config.data.pad_captions)
        masked = round(plan.token_mask * max(0, self.text_tokens - 2))
        return Batch(
            positions_M=torch.arange(samples),
            weights_M=torch.ones(samples),
            keys=[""] * samples,
            pixels_NCHW=torch.zeros((images, 0, 0, 0), dtype=torch.uint8),
            image_rows_N=torch.arange(images),
            patch_mask_NP=mask(images, self.shape.patches, "image"),
            caption=_texts(captions, length, length - 1, captions, round(samples * plan.caption_fuse)),
            text=_texts(texts, self.text_tokens, masked, round(samples * plan.token_mask_fraction), texts),
            gumbel_MG=torch.zeros(samples, 0),
            streams={name: _patches(mask(samples, modality.max_patches, name)) for name, modality in modalities.items()},
        )


def _texts(samples: int, length: int, labels: int, labelled: int, fused: int) -> TextStream:
    """Texts of one length; ids differ from text to text, so that each is another text's negative."""
    labels_ML = torch.full((samples, length), IGNORE)
    labels_ML[:labelled, :labels] = 0
    rows = torch.arange(samples)
    ids_T = rows[:, None].expand(samples, length).reshape(-1)
    return TextStream(ids_T, _offsets(samples, length), rows, labels_ML.view(-1), rows < fused)


def _patches(hidden_NP: Tensor) -> PatchStream:
    """An item of every sample."""
    items, patches = hidden_NP.shape
    values_TC = torch.zeros(items * patches, 0)
    grids_S3 = torch.ones((items, 3), dtype=torch.int64)
    return PatchStream(values_TC, _offsets(items, patches), torch.arange(items), values_TC.long(), grids_S3, hidden_NP.view(-1))


def _offsets(items: int, length: int) -> Tensor:
    return (torch.arange(items + 1) * length).int()
