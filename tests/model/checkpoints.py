"""Tiny checkpoints of every family, made and saved here with transformers, and models that make room for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from mmscale.model import MMScaleModel
from mmscale.model.pretrained import LoadReport, load_towers, model_section
from mmscale.model_config import ModelConfig
from tests.model.tiny import VOCAB, tiny_model

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2}
WORDS = {"vocab_size": VOCAB, "max_position_embeddings": 24}
PIXELS = {"image_size": 16, "patch_size": 8}
NARROW = {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 64, "num_hidden_layers": 3}
"""CLIP's text towers are narrower than its image towers; here also deeper."""


def save(model: Any, folder: Path) -> Path:
    """Spread a model's weights so that everything depends on everything, and save it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def bert(folder: Path, **changes: Any) -> Path:
    return save(BertModel(BertConfig(**{**SHAPE, **WORDS, **changes})), folder)


def roberta(folder: Path, **changes: Any) -> Path:
    return save(
        RobertaModel(
            RobertaConfig(**{**SHAPE, **WORDS, "max_position_embeddings": 25, "pad_token_id": 0, "type_vocab_size": 1, **changes})
        ),
        folder,
    )


def distilbert(folder: Path, **changes: Any) -> Path:
    shape = {"dim": 32, "n_heads": 2, "hidden_dim": 96, "n_layers": 2}
    return save(DistilBertModel(DistilBertConfig(**{**shape, **WORDS, **changes})), folder)


def vit(folder: Path, **changes: Any) -> Path:
    return save(ViTModel(ViTConfig(**{**SHAPE, **PIXELS, **changes})), folder)


def deit(folder: Path, **changes: Any) -> Path:
    return save(DeiTModel(DeiTConfig(**{**SHAPE, **PIXELS, **changes})), folder)


def clip(folder: Path, text: dict[str, Any] = NARROW, **changes: Any) -> Path:
    words = {**text, **WORDS, "eos_token_id": VOCAB - 1, "bos_token_id": 1, "pad_token_id": 0}  # an end of 2 is read otherwise
    return save(CLIPModel(CLIPConfig(text_config=words, vision_config={**SHAPE, **PIXELS, **changes}, projection_dim=20)), folder)


def siglip(folder: Path, **changes: Any) -> Path:
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return save(SiglipModel(SiglipConfig(text_config={**SHAPE, **WORDS, **ids}, vision_config={**SHAPE, **PIXELS, **changes})), folder)


def siglip2(folder: Path, **changes: Any) -> Path:
    """The NaFlex layout."""
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**SHAPE, "patch_size": 8, "num_patches": 4, **changes}
    return save(Siglip2Model(Siglip2Config(text_config={**SHAPE, **WORDS, **ids}, vision_config=vision)), folder)


TEXT: dict[str, Callable[..., Path]] = {
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
}
IMAGE: dict[str, Callable[..., Path]] = {"vit": vit, "deit": deit, "clip": clip, "siglip": siglip, "siglip2": siglip2}


def section(*folders: Path, **changes: Any) -> dict[str, Any]:
    """The nested `model` section of these checkpoints, without the init keys, with changes of its dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in (model_section([str(f) for f in folders]) | changes).items():
        head, _, tail = key.partition(".")
        if not head.startswith("init_"):
            nested |= {head: {**nested.get(head, {}), tail: value} if tail else value}
    return nested


def started(text: Path | None = None, image: Path | None = None, **changes: Any) -> tuple[MMScaleModel, list[LoadReport]]:
    """A model of the checkpoints' own section, started from them, in evaluation mode."""
    folders = list(dict.fromkeys(f for f in (text, image) if f is not None))
    model = tiny_model(**section(*folders, **changes))
    names = {"init_text_from": text and str(text), "init_image_from": image and str(image)}
    return model.eval(), load_towers(model, ModelConfig(**names))


def original(folder: Path) -> Any:
    """The checkpoint as transformers loads it."""
    return transformers.AutoModel.from_pretrained(folder).eval()
