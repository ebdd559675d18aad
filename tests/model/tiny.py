"""Tiny real models and hand-made batches for the tests of models and objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmscale.config import RunConfig
from mmscale.data.batch import IGNORE, Batch, TextStream
from mmscale.model import MMScaleConfig, MMScaleModel, mmscale_config
from mmscale.model_config import ImageTowerConfig, ModelConfig, TextTowerConfig
from mmscale.objectives import Objective, build_objectives
from mmscale.objectives_config import ObjectiveConfig, ObjectivesConfig, TaskConfig

VOCAB, CLASSES = 40, 3
BEGIN, END, MASK = 1, 2, 3


@dataclass(frozen=True)
class Row:
    """One sample: whether it has an image, the words of its caption and of its text, its label."""

    image: bool = True
    caption: tuple[int, ...] | None = (10, 11, 12)
    text: tuple[int, ...] | None = (10, 11, 12)
    label: int = IGNORE


def tiny_config(**changes: Any) -> MMScaleConfig:
    shape = {
        "hidden_size": 32,
        "num_heads": 2,
        "unimodal_layers": 2,
        "fusion_layers": 2,
        "image_size": 16,
        "patch_size": 8,
        "max_text_tokens": 24,
        "projection_size": 16,
    }
    towers = {"text": TextTowerConfig(**changes.pop("text", {})), "image": ImageTowerConfig(**changes.pop("image", {}))}
    return mmscale_config(
        ModelConfig(**{**shape, **towers, **changes}), VOCAB, {"pad": 0, "begin": BEGIN, "end": END, "mask": MASK}, {"label": CLASSES}
    )


def tiny_model(seed: int = 0, spread: float = 0.2, **changes: Any) -> MMScaleModel:
    """A model whose weights are spread widely enough that everything depends on everything."""
    torch.manual_seed(seed)
    model = MMScaleModel(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "contrastive_scale" not in name:
                parameter.add_(torch.randn_like(parameter) * spread)
        model.contrastive_scale.bias.fill_(-1.0 / model.contrastive_scale.GAIN)
    return model.train()


def all_objectives(group: int | None = None, target: str = "pixels", task: bool = True) -> list[Objective]:
    on = ObjectiveConfig(weight=1.0, group=group)
    config = RunConfig(
        run="unused",
        objectives=ObjectivesConfig(
            contrastive=on,
            matching=on,
            masked_language=on,
            captioning=on,
            masked_image=ObjectiveConfig(weight=1.0, target=target),  # type: ignore[arg-type]
        ),
        task=TaskConfig(name="classification") if task else None,
    )
    return build_objectives(config)


def random_rows(count: int, seed: int = 0, longest: int = 9) -> list[Row]:
    """Samples with images, captions and texts of random words and lengths."""
    g = torch.Generator().manual_seed(seed)

    def words() -> tuple[int, ...]:
        size = int(torch.randint(1, longest, (1,), generator=g))
        return tuple(torch.randint(4, VOCAB, (size,), generator=g).tolist())

    return [Row(caption=words(), text=words(), label=int(torch.randint(0, CLASSES, (1,), generator=g))) for _ in range(count)]


def make_batch(rows: Sequence[Row], first: int = 0, group: int | None = None, mask_images: bool = True, image_size: int = 16) -> Batch:
    """Collate samples of positions first, first + 1, ...; pixels, masks and noise depend on the position alone."""
    size = len(rows)
    patches = (image_size // 8) ** 2
    images = [i for i, row in enumerate(rows) if row.image]
    generators = {i: torch.Generator().manual_seed(1000 + first + i) for i in range(size)}
    pixels = [torch.randint(0, 256, (3, image_size, image_size), dtype=torch.uint8, generator=generators[i]) for i in images]
    masks = [torch.rand(patches, generator=generators[i]) < 0.5 for i in images]
    noise = [-torch.rand(group or size, generator=generators[i]).log().neg().log() for i in range(size)]
    mask = torch.stack(masks) if masks else torch.zeros(0, patches, dtype=torch.bool)
    return Batch(
        positions_M=torch.arange(first, first + size),
        weights_M=torch.ones(size),
        keys=[f"sample-{first + i}" for i in range(size)],
        pixels_NCHW=torch.stack(pixels) if pixels else torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8),
        image_rows_N=torch.tensor(images, dtype=torch.int64),
        patch_mask_NP=mask & mask_images,
        caption=causal_stream([row.caption for row in rows]),
        text=masked_stream([row.text for row in rows], first),
        gumbel_MG=torch.stack(noise) if noise else torch.zeros(0, group or 0),
        targets={"label": torch.tensor([row.label for row in rows], dtype=torch.int64)},
    )


def causal_stream(captions: Sequence[tuple[int, ...] | None]) -> TextStream:
    found = [(i, [BEGIN, *words, END]) for i, words in enumerate(captions) if words is not None]
    return _stream([(i, ids, [*ids[1:], IGNORE]) for i, ids in found])


def masked_stream(texts: Sequence[tuple[int, ...] | None], first: int = 0) -> TextStream:
    """Every third word, counted from the sample's position, is masked."""
    made = []
    for i, words in enumerate(texts):
        if words is None:
            continue
        ids, labels = [BEGIN, *words, END], [IGNORE] * (len(words) + 2)
        for j in range(1 + (first + i) % 2, len(words) + 1, 3):
            labels[j], ids[j] = ids[j], MASK
        made.append((i, ids, labels))
    return _stream(made)


def _stream(made: list[tuple[int, list[int], list[int]]]) -> TextStream:
    lengths = torch.tensor([0, *(len(ids) for _, ids, _ in made)])
    return TextStream(
        ids_T=torch.tensor([x for _, ids, _ in made for x in ids], dtype=torch.int64),
        cu_seqlens_S1=lengths.cumsum(0).int(),
        rows_S=torch.tensor([i for i, _, _ in made], dtype=torch.int64),
        labels_T=torch.tensor([x for _, _, labels in made for x in labels], dtype=torch.int64),
        fuse_S=torch.ones(len(made), dtype=torch.bool),
    )


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out
