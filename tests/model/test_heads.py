"""The chunked language head against the whole one; patches; the shipped sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmscale.config import CONFIGS
from mmscale.model import MMScaleModel, heads, mmscale_config
from mmscale.model.embeddings import patchify
from mmscale.model.heads import LanguageHead
from mmscale.model_config import ModelConfig
from shards import configfile
from tests.model.tiny import VOCAB, tiny_config


def test_the_chunked_loss_equals_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = LanguageHead(tiny_config())
    torch.nn.init.normal_(head.weight)
    x, labels = torch.randn(23, 32, requires_grad=True), torch.randint(0, VOCAB, (23,))
    results = []
    for at_once in (1 << 25, VOCAB * 4):
        monkeypatch.setattr(heads, "LOGITS_AT_ONCE", at_once)
        loss, hits = head(x, labels)
        results.append((loss, hits, *torch.autograd.grad((loss * torch.arange(23)).sum(), (x, head.weight, head.bias))))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-4)
    logits, _ = head(x)
    torch.testing.assert_close(results[0][0], F.cross_entropy(logits, labels, reduction="none"))
    assert results[0][1].tolist() == (logits.argmax(1) == labels).tolist()


def test_patches_are_laid_out_as_a_convolution_reads_them() -> None:
    pixels, weight = torch.randn(2, 3, 16, 16), torch.randn(5, 3, 8, 8)
    expected = F.conv2d(pixels, weight, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(pixels, 8) @ weight.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 3.0), ("small", 77.5), ("base", 304.6), ("large", 822.5)])
def test_shipped_sizes(name: str, millions: float) -> None:
    shape = configfile.load(ModelConfig, CONFIGS / "model" / f"{name}.yaml")
    vocabulary = 2000 if name == "tiny" else 30522
    with torch.device("meta"):
        model = MMScaleModel(mmscale_config(shape, vocabulary, {}))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
