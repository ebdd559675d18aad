"""A modality that mmscale does not know: one file (series.py) and one entry of the configuration, and it trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel, mmscale_config
from mmscale.objectives import build_objectives
from tests.data.tiny import config, tokenizer_folder, write

ENTRY = {"series": {"kind": "tests.modalities.series:Series", "longest": 24, "width": 4}}
WORDS = ("red", "green", "blue")
"""Caption of a rising, a falling and a waving series."""


def waving(index: int) -> dict[str, bytes]:
    generator = np.random.default_rng(index)
    x = np.linspace(0, 1, 12 + 4 * (index % 4))
    shape = (x, 1 - x, np.sin(12 * x))[index % 3] + 0.05 * generator.normal(size=len(x))
    return {"txt": WORDS[index % 3].encode(), "json": json.dumps({"series": shape.tolist()}).encode()}


def test_a_modality_is_one_file_and_one_entry_and_it_trains(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", waving, (48, 48))
    model = {"hidden_size": 32, "num_heads": 2, "unimodal_layers": 1, "fusion_layers": 1, "projection_size": 16, "modalities": ENTRY}
    objectives = {name: {"weight": 1.0} for name in ("contrastive", "captioning")} | {"masked_image": {"weight": 1.0, "mask": 0.5}}
    stage = config(shards, model=model, objectives=objectives | {n: {"weight": 0.0} for n in ("matching", "masked_language")})
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path / "tokenizer"))
    torch.manual_seed(0)
    special = {"pad": tokenizer.pad, "begin": tokenizer.begin, "end": tokenizer.end, "mask": tokenizer.mask}
    network = MMScaleModel(mmscale_config(stage.model, tokenizer.vocab_size, special, candidates=16)).train()
    wanted, optimizer = build_objectives(stage), torch.optim.AdamW(network.parameters(), lr=5e-3)
    history: list[dict[str, float]] = []
    dataset = ShardDataset(shards, image_size=stage.model.image_size)
    with StepLoader(dataset, Collator.from_config(stage, tokenizer), global_batch=16, micro_batch=16, rank=0, size=1, steps=30) as loader:
        for step in loader:
            batch = step.micro[0]
            means = {n: term.sum / max(1.0, o.count(batch)) for o, (n, term) in zip(wanted, network(batch, wanted).items(), strict=True)}
            optimizer.zero_grad()
            sum(means.values()).backward()
            optimizer.step()
            history.append({name: mean.item() for name, mean in means.items()})
    for name in ("contrastive", "captioning", "masked_image"):
        early, late = (np.mean([h[name] for h in some]) for some in (history[:4], history[-4:]))
        assert late < 0.9 * early, name
    network.save_pretrained(tmp_path / "saved")
    again = MMScaleModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again.embed_images(batch), network.eval().embed_images(batch))
