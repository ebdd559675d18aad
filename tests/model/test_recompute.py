"""Activation checkpointing: the same losses and gradients, less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmscale.model import MMScaleConfig, MMScaleModel
from mmscale.model_config import modernize
from tests.model.live import Live
from tests.model.test_forward import MIXES, total
from tests.model.tiny import all_objectives, make_batch, random_rows, tiny_config, tiny_model


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mix", ["pairs", "mixed", "nothing"])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_loss_and_gradients_are_those_without(kind: str, mix: str, dropout: float) -> None:
    plain, recomputed = tiny_model(dropout=dropout), tiny_model(dropout=dropout, activation_checkpointing=kind)
    losses = []
    for model in (plain, recomputed):
        torch.manual_seed(5)
        loss = total(model, make_batch(MIXES[mix]), all_objectives())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


def kept_bytes(kind: str) -> int:
    """Bytes alive between forward and backward."""
    model = tiny_model(activation_checkpointing=kind, unimodal_layers=4, fusion_layers=4, hidden_size=64)
    batch = make_batch(random_rows(16))
    with Live(*model.parameters()) as live:
        loss = total(model, batch, all_objectives())
        found = live.bytes()
    loss.backward()
    return found


def test_full_keeps_less_than_selective_and_selective_less_than_none() -> None:
    none, selective, full = (kept_bytes(kind) for kind in ("none", "selective", "full"))
    assert selective < 0.6 * none
    assert full < 0.5 * selective


def test_evaluation_recomputes_nothing() -> None:
    model = tiny_model(activation_checkpointing="full").eval()
    assert model._recompute == "none"


@pytest.mark.parametrize(("old", "new"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_what_older_versions_saved_still_loads(tmp_path: Path, old: bool | str, new: str) -> None:
    MMScaleModel(tiny_config()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text()
    assert '"activation_checkpointing": "none"' in text
    file.write_text(text.replace('"activation_checkpointing": "none"', f'"activation_checkpointing": {old!r}'.replace("'", '"').lower()))
    assert MMScaleConfig.from_pretrained(tmp_path).activation_checkpointing == new
    assert modernize({"activation_checkpointing": old, "dropout": 0.5}) == {"activation_checkpointing": new, "dropout": 0.5}
