"""The sigmoid loss: its value, its independence of ranks, and duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmscale.objectives.contrastive import Contrastive
from mmscale.objectives.sigmoid import Side, SigmoidLoss, hits, pair_loss
from shards.errors import ConfigError
from tests.model.tiny import Largest, Row, make_batch, random_rows, tiny_model
from tests.objectives.ranks import run_ranks

ROWS = [*random_rows(5), Row(caption=None), Row(image=False), Row(caption=random_rows(1)[0].caption)]
"""Eight samples: six pairs, of which the last repeats the first one's caption, an image and a text."""


def gradients(rows: list[Row], first: int, group: int | None, parts: int = 1) -> dict[str, Any]:
    """Loss and gradients of the contrastive sum over `parts` micro-batches of these samples."""
    model, size, total = tiny_model(), len(rows) // parts, 0.0
    for i in range(parts):
        batch = make_batch(rows[i * size : (i + 1) * size], first=first + i * size)
        term = model(batch, [Contrastive(weight=1.0, group=group)])["contrastive"]
        term.sum.backward()
        total += term.sum.item()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": total, "grads": grads, "largest": max(g.abs().max().item() for g in grads.values())}


def on_rank(rank: int, ranks: int, group: int | None, per_block: int) -> dict[str, Any]:
    import mmscale.objectives.sigmoid as sigmoid

    sigmoid.PAIRS_AT_ONCE = per_block
    size = len(ROWS) // ranks
    return gradients(ROWS[rank * size : (rank + 1) * size], rank * size, group)


def assert_equal(expected: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    assert sum(p["loss"] for p in parts) == pytest.approx(expected["loss"], rel=1e-6)
    for name, grad in expected["grads"].items():
        got = sum(p["grads"][name] for p in parts)
        worst = (got - grad).abs().max().item() / expected["largest"]
        assert worst < 5e-6, (name, worst)  # fp32 sums in another order: 1.1e-6 on some processors


@pytest.mark.parametrize(("group", "ranks", "per_block"), [(None, 2, 1 << 22), (8, 2, 1 << 22), (None, 4, 1), (None, 2, 12)])
def test_ranks_together_give_the_value_and_gradients_of_one_process(tmp_path: Path, group: int | None, ranks: int, per_block: int) -> None:
    parts = run_ranks(on_rank, ranks, tmp_path, group, per_block)
    assert_equal(gradients(ROWS, 0, group), parts)


@pytest.mark.parametrize("parts", [2, 4])
def test_with_a_group_accumulation_changes_nothing(parts: int) -> None:
    assert_equal(gradients(ROWS, 0, group=2), [gradients(ROWS, 0, group=2, parts=parts)])


@pytest.mark.parametrize("per_block", [1 << 22, 5])
def test_the_gradient_is_that_of_autograd_over_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, per_block: int) -> None:
    monkeypatch.setattr("mmscale.objectives.sigmoid.PAIRS_AT_ONCE", per_block)
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(9, 16), dim=1).requires_grad_() for _ in range(2)]
    leaves += [torch.tensor([3.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)]
    valid, hashes, positions = torch.arange(9) % 4 > 0, torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 2]), torch.arange(9)
    counts = valid[:, None] & valid[None] & (positions[:, None] // 3 == positions[None] // 3)
    sign = torch.where(hashes[:, None] == hashes[None], 1.0, -1.0)
    plain = -torch.where(counts, F.logsigmoid(sign * (leaves[0] @ leaves[1].T * leaves[2] + leaves[3])), 0.0).sum()
    side = Side(leaves[0].detach(), leaves[1].detach(), valid, hashes, positions)
    ours = SigmoidLoss.apply(*leaves, side, [], 3)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for got, grad in zip(torch.autograd.grad(2 * ours, leaves), torch.autograd.grad(2 * plain, leaves), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-6)


def test_no_more_similarities_exist_at_once_than_a_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmscale.objectives.sigmoid.PAIRS_AT_ONCE", 64)
    side = Side(*(F.normalize(torch.randn(64, 4), dim=1) for _ in range(2)), torch.ones(64).bool(), torch.arange(64), torch.arange(64))
    with Largest() as seen:
        pair_loss(side, [side, side], torch.tensor([3.0]), torch.tensor([-1.0]), None)
        hits(side, None)
    assert seen.elements == 64 * 4  # an embedding; 64 x 64 similarities would be sixteen times that


def test_value_is_the_sigmoid_loss_of_the_pairs() -> None:
    model, batch = tiny_model().eval(), make_batch(ROWS)
    x, y = model.embed_images(batch), model.embed_captions(batch)
    pairs = [0, 1, 2, 3, 4, 7]
    images, captions = x[[0, 1, 2, 3, 4, 6]], y[[0, 1, 2, 3, 4, 6]]
    scale, bias = model.contrastive_scale()
    logits = images @ captions.T * scale + bias
    sign = 2 * torch.eye(6) - 1
    sign[0, 5] = sign[5, 0] = 1  # the same caption
    term = model(batch, [Contrastive(weight=1.0)])["contrastive"]
    torch.testing.assert_close(term.sum, -F.logsigmoid(sign * logits).sum())
    assert Contrastive(weight=1.0).count(batch) == len(pairs)
    assert term.logs["contrastive_accuracy"][1].item() == len(pairs)


def test_a_group_that_the_ranks_do_not_hold_together_is_refused() -> None:
    Contrastive(weight=1.0, group=8).check(micro_batch=4, ranks=2)
    with pytest.raises(ConfigError, match=r"`objectives.contrastive.group` must divide micro-batch x ranks = 4 x 2 = 8; got 16"):
        Contrastive(weight=1.0, group=16).check(micro_batch=4, ranks=2)
