"""Both back ends against attention written out, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmscale.model import packed
from mmscale.model.attention import dense_plan, padded_plan, ragged_plan, varlen_plan

LENGTHS = [3, 20, 1, 40, 7, 17, 16, 33]
PREFIXES = [0, 20, 1, 5, 7, 0, 15, 33]
"""Causal, bidirectional, and prefix-LM with prefixes of several lengths."""


def written_out(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    out, start = torch.zeros_like(q), 0
    for length, prefix in zip(LENGTHS, PREFIXES, strict=True):
        at = rows[start : start + length]
        start += length
        for i in range(length):
            seen = at[: max(prefix, i + 1)]
            weight = torch.einsum("hk,nhk->nh", q[at[i]], k[seen]).div(q.shape[-1] ** 0.5).softmax(0)
            out[at[i]] = torch.einsum("nh,nhk->hk", weight, v[seen])
    return out


def reference_varlen(q, k, v, queries, keys, causal):  # type: ignore[no-untyped-def]
    """What the CUDA kernel does, with its causal mask aligned at the bottom right."""
    out = []
    for s in range(len(queries.offsets) - 1):
        qs, ks = (slice(int(x.offsets[s]), int(x.offsets[s + 1])) for x in (queries, keys))
        n, m = qs.stop - qs.start, ks.stop - ks.start
        logits = torch.einsum("qhk,nhk->hqn", q[qs], k[ks]) / q.shape[-1] ** 0.5
        if causal:
            logits = logits.masked_fill(torch.arange(m)[None] > torch.arange(n)[:, None] + m - n, float("-inf"))
        out.append(torch.einsum("hqn,nhk->qhk", logits.softmax(-1), v[ks]))
    return torch.cat(out)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(total, 2, 8, requires_grad=True) for _ in range(3))
    return q, k, v, torch.randperm(total)


@pytest.mark.parametrize("backend", ["padded", "varlen"])
def test_back_ends_equal_attention_written_out_in_values_and_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "varlen", reference_varlen)
    q, k, v, rows = inputs()
    lengths, prefixes = torch.tensor(LENGTHS), torch.tensor(PREFIXES)
    plan = padded_plan(lengths, prefixes, rows, torch.float32) if backend == "padded" else varlen_plan(lengths, prefixes, rows)
    weight = torch.randn_like(q)
    got, expected = plan.attend(q, k, v), written_out(q, k, v, rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_half_precision_on_a_cpu_is_computed_in_fp32() -> None:
    """Equal to fp32 attention over the rounded inputs, rounded once: nothing but the storage is half."""
    q, k, v, rows = inputs()
    lengths, prefixes = torch.tensor(LENGTHS), torch.tensor(PREFIXES)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    whole = [x.detach().float().requires_grad_() for x in half]
    outs = [padded_plan(lengths, prefixes, rows, x[0].dtype).attend(*x) for x in (half, whole)]
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(outs[0], outs[1].bfloat16())
    weight = torch.randn_like(q).bfloat16()
    (outs[0] * weight).sum().backward()
    (outs[1] * weight.float()).sum().backward()
    for a, b in zip(half, whole, strict=True):
        assert torch.equal(a.grad, b.grad.bfloat16())


def test_dense_and_empty_plans() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(15, 2, 8, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([5, 5, 5])
    expected = ragged_plan(lengths, lengths, None, torch.float32).attend(q, k, v)
    torch.testing.assert_close(dense_plan(3, 5).attend(q, k, v), expected)
    empty = dense_plan(0, 5).attend(q[:0], k[:0], v[:0])
    empty.sum().backward()
    assert empty.shape == (0, 2, 8)
    assert q.grad is not None


def test_padding_groups_are_of_like_length() -> None:
    lengths = torch.tensor(LENGTHS)
    plan = padded_plan(lengths, lengths, torch.arange(sum(LENGTHS)), torch.float32)
    assert [(g.sequences, g.length) for g in plan.groups] == [(4, 16), (2, 20), (2, 40)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_kernel_equals_the_padded_back_end() -> None:
    q, k, v, rows = (x.detach().cuda().bfloat16() if x.is_floating_point() else x.cuda() for x in inputs())
    lengths, prefixes = torch.tensor(LENGTHS).cuda(), torch.tensor(PREFIXES).cuda()
    got = ragged_plan(lengths, prefixes, rows, torch.bfloat16).attend(q, k, v)
    expected = padded_plan(lengths, prefixes, rows, torch.bfloat16).attend(q, k, v)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_heads_of_any_width_go_through_a_kernel_that_takes_multiples_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q, k, v, queries, keys, most_q, most_k, *, scale, window_size):  # type: ignore[no-untyped-def]
        assert q.shape[-1] % 8 == 0
        scaled = q * scale * q.shape[-1] ** 0.5  # the reference takes the width that it sees
        return reference_varlen(scaled, k, v, packed.Ragged(queries, most_q), packed.Ragged(keys, most_k), window_size[1] == 0)

    torch.manual_seed(0)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    ragged = packed.Ragged(torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    for width in (8, 20):
        q, k, v = (torch.randn(7, 2, width) for _ in range(3))
        torch.testing.assert_close(packed.varlen(q, k, v, ragged, ragged, True), reference_varlen(q, k, v, ragged, ragged, True))
