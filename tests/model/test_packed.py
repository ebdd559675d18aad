"""The path that a device takes, walked on the CPU: sizes from the host's batch, plans for varlen kernels; the kernel written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmscale.data.batch import Batch
from mmscale.model import packed
from mmscale.model.packed import Order, join, part
from mmscale.model.sequences import Wanted
from mmscale.model.sizes import sizes_of
from tests.devices import no_waits
from tests.model.test_attention import reference_varlen
from tests.model.test_modalities import assert_near, gradients, losses
from tests.model.tiny import Row, all_objectives, make_batch, random_rows, tiny_model

MIXES = {
    "pairs": [Row(label=i % 3) for i in range(4)] + random_rows(4),
    "mixed": random_rows(9),
    "one negative text": [Row(caption=(10,), text=(10,)), Row(caption=tuple(range(10, 30)), text=tuple(range(10, 30)))],
    "texts alone": [Row(image=False, caption=(4, 5, 6), text=(4, 5)), Row(image=False, caption=None, text=(4, 5, 9, 9))],
    "images alone": [Row(caption=None, text=None, label=i) for i in range(3)],
    "captions alone": [Row(caption=(5, 6), text=None), Row(caption=(7,), text=None)],
    "nothing": [Row(image=False, caption=None, text=None)],
}


def mirrored(batch: Batch) -> Batch:
    """A batch with a copy in the host's memory, as one on a device has."""
    return replace(batch, host=batch)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process choose what it would choose on a device."""
    monkeypatch.setattr(packed, "varlen", reference_varlen)
    monkeypatch.setattr(packed, "packs", lambda device, dtype: True)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("mix", MIXES)
def test_packed_plans_give_the_losses_and_gradients_of_padded_ones(mix: str, positions: str, device: None) -> None:
    rows = MIXES[mix]
    model, other = tiny_model(positions=positions), tiny_model(positions=positions)
    with pytest.MonkeyPatch.context() as there:
        there.setattr(packed, "packs", lambda device, dtype: False)
        expected = losses(model, make_batch(rows), all_objectives())
    assert_near(losses(other, mirrored(make_batch(rows)), all_objectives()), expected)
    assert all(p.grad is not None for p in other.parameters())
    assert_near(gradients(other), gradients(model))


@pytest.mark.parametrize("mix", MIXES)
def test_sizes_hold_what_is_laid_out(mix: str) -> None:
    batch, objectives = make_batch(MIXES[mix]), all_objectives()
    sizes = sizes_of(mirrored(batch), Wanted.of(objectives), tiny_model().config)
    assert sizes is not None
    assert sizes.spare == (mix in ("pairs", "mixed", "one negative text"))
    assert sizes.text_bounds[-1] == sizes.rows[-1]
    assert sizes_of(batch, Wanted.of(objectives), tiny_model().config) is None


@pytest.mark.filterwarnings("ignore")  # what torch says to itself while it traces
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_join_and_part_are_each_others_inverse(backend: str | None) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    places = torch.randperm(7)
    order = Order(places.argsort(), places[:4], places[4:], backend)
    joined = join(a, b, order)
    assert torch.equal(joined[places[:4]], a)
    assert torch.equal(joined[places[4:]], b)
    assert all(torch.equal(x, y) for x, y in zip(part(joined, order), (a, b), strict=True))
    assert torch.autograd.gradcheck(lambda a, b: join(a, b, order), (a, b))
    assert torch.autograd.gradcheck(lambda j: part(j, order), (joined.detach().requires_grad_(),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mix", ["pairs", "mixed", "one negative text", "captions alone"])
def test_a_device_gives_the_losses_of_the_cpu_without_waiting(mix: str) -> None:
    model, other = tiny_model(spread=0.05), tiny_model(spread=0.05).cuda().to(torch.bfloat16)
    batch, objectives = make_batch(MIXES[mix]), [o for o in all_objectives() if o.name != "matching" or mix == "one negative text"]
    there = batch.to(torch.device("cuda"))
    expected, _ = losses(model, batch, objectives), losses(other, there, objectives)
    with no_waits():
        got = losses(other, there, objectives)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=0.05, atol=0.05)
