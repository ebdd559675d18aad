"""The chunked language head against the whole one; patches; the shipped sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from mmscale.config import CONFIGS
from mmscale.model import MMScaleModel, cross_entropy, mmscale_config
from mmscale.model.embeddings import patchify
from mmscale.model.heads import LanguageHead
from mmscale.model_config import ModelConfig
from shards import configfile
from tests.model.tiny import VOCAB, Largest, tiny_config

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.mark.filterwarnings("ignore")  # what torch says to itself while it traces
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])])
@pytest.mark.parametrize("more", [0, 6])
@pytest.mark.parametrize("rows", [0, 1, 4, 23, 24])
def test_the_chunked_loss_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, rows: int, more: int, backend: str | None) -> None:
    """Also with the words that a device's kernels want more of, and compiled."""
    monkeypatch.setattr(cross_entropy, "_padded", lambda weight, bias: cross_entropy._widened(weight, bias, more))
    torch.manual_seed(0)
    head = LanguageHead(tiny_config())
    torch.nn.init.normal_(head.weight, std=0.3)
    torch.nn.init.normal_(head.bias)
    head.backend = backend
    x, labels, above = torch.randn(23 if rows else 0, 32, requires_grad=True), torch.randint(0, VOCAB, (23,)), torch.randn(23)
    labels, above, leaves = labels[: len(x)], above[: len(x)], (x, head.weight, head.bias)
    logits, _ = head(x)
    plain = F.cross_entropy(logits, labels, reduction="none")
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", VOCAB * max(1, rows))
    loss, hits = head(x, labels)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    assert hits.tolist() == (logits.argmax(1) == labels).tolist()
    expected = torch.autograd.grad((plain * above).sum(), leaves)
    for again in (True, False):
        for got, grad in zip(torch.autograd.grad((loss * above).sum(), leaves, retain_graph=again), expected, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-6)


def test_gradients_are_summed_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 weights the gradient is as far from the exact one as bf16 must be, in however many chunks it was summed."""
    torch.manual_seed(0)
    x, weight, labels = torch.randn(512, 32).bfloat16(), (0.1 * torch.randn(VOCAB, 32)).bfloat16(), torch.randint(0, VOCAB, (512,))
    exact = weight.double().requires_grad_()
    F.cross_entropy(x.double() @ exact.T, labels, reduction="sum").backward()
    errors = []
    for rows in (512, 2):
        monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", VOCAB * rows)
        leaf = weight.clone().requires_grad_()
        cross_entropy.linear_cross_entropy(x, leaf, torch.zeros(VOCAB).bfloat16(), labels)[0].sum().backward()
        errors.append((leaf.grad.double() - exact.grad).norm() / exact.grad.norm())
    assert errors[1] < 1.2 * errors[0] < 0.02


def test_no_logits_of_all_rows_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", VOCAB * 4)
    head, x, labels = LanguageHead(tiny_config()), torch.randn(200, 32, requires_grad=True), torch.randint(0, VOCAB, (200,))
    torch.nn.init.normal_(head.weight)
    with Largest() as seen:
        head(x, labels)[0].sum().backward()
    assert seen.elements == x.numel() < 200 * VOCAB


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
