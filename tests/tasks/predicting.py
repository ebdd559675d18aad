"""What the tests of tasks share: tiny shards, a tiny model over their tokenizer, and predictions for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmscale.config import RunConfig
from mmscale.data.targets import Facts
from mmscale.data.tokenize import TextTokenizer
from mmscale.evaluate import predict_records
from mmscale.model import MMScaleModel, mmscale_config
from mmscale.model_config import ModelConfig
from mmscale.tasks import Record, build_task, head_sizes
from shards import configfile
from tests.data.tiny import tokenizer_folder

MODEL = {
    "hidden_size": 32,
    "num_heads": 2,
    "unimodal_layers": 1,
    "fusion_layers": 1,
    "image_size": 16,
    "patch_size": 8,
    "max_text_tokens": 12,
    "projection_size": 16,
}


def stage(shards: Path, **layers: Any) -> RunConfig:
    """A stage without objectives; `layers` say the task."""
    data = {"shards": str(shards), "max_text_tokens": 12} | layers.pop("data", {})
    return configfile.build(RunConfig, [("test", {"run": "unused", "data": data, "model": MODEL} | layers)])


def random_model(tokenizer: TextTokenizer, config: RunConfig, facts: Facts | None = None, seed: int = 0) -> MMScaleModel:
    """Weights spread widely enough that predictions differ."""
    torch.manual_seed(seed)
    special = {"pad": tokenizer.pad, "begin": tokenizer.begin, "end": tokenizer.end, "mask": tokenizer.mask}
    shape = mmscale_config(ModelConfig(**MODEL), tokenizer.vocab_size, special, head_sizes(config, facts))
    if facts:
        shape.keep(facts)
    model = MMScaleModel(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def predict(
    tmp_path: Path, config: RunConfig, labels: list[str] | None = None, samples: int = 0, batch: int = 5, facts: Facts | None = None
) -> list[Record]:
    """Records of a whole tiny data set."""
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path / "tokenizer"))
    model = random_model(tokenizer, config, Facts(labels=tuple(labels)) if labels else facts)
    return predict_records(model, build_task(config), config, tokenizer, samples=samples, batch=batch, device=torch.device("cpu"))
