"""Muon: its update, what it is for, steps that are dropped, parts of matrices, and runs that are killed or go on elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmscale.config import OptimizerConfig
from mmscale.memory import parameter_sizes
from mmscale.muon import Muon, orthogonalise
from mmscale.optim import build_optimizer, muon_matrices
from mmscale.weights import Fragment
from tests.devices import no_waits
from tests.model.tiny import tiny_model
from tests.objectives.ranks import run_ranks
from tests.training.runs import STAGE, losses, run_grid, train, write_stage
from tests.training.test_exact_resume import check
from tests.training.test_parity import difference

SHAPES = [(12, 4), (4, 4), (16, 4), (4, 16), (4, 4)]
MUON = OptimizerConfig(name="muon")


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def stepped(own: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int, times: float = 1.0) -> None:
    for p, gradient in zip(own, gradients(step), strict=True):
        p.grad = gradient * times
    optimizer.step()


def muon(own: list[nn.Parameter]) -> Muon:
    return Muon([{"params": own, "weight_decay": 0.1, "muon": True}], lr=0.01)


def test_the_steps_are_those_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    mine = muon(ours)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        stepped(ours, mine, step)
        stepped(theirs, reference, step)
    for p, q, start in zip(ours, theirs, parameters(), strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm()  # both iterate in bf16, which has 8 bits
        assert torch.allclose(mine.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"], atol=1e-6)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = gradients(0)
    orthogonalise(matrices)
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix)
        assert values.min() > 0.4
        assert values.max() < 1.3


def test_a_dropped_step_changes_nothing_and_a_scale_divides() -> None:
    own, scaled = parameters(), parameters()
    optimizer, other = muon(own), muon(scaled)
    other.grad_scale = torch.tensor(4.0)
    for step in range(2):
        stepped(own, optimizer, step)
        stepped(scaled, other, step, times=4.0)
    assert all(torch.equal(p, q) for p, q in zip(own, scaled, strict=True))
    before = [torch.cat((p.detach(), optimizer.state[p]["momentum_buffer"])).clone() for p in own]
    optimizer.found_inf = torch.tensor(1.0)
    stepped(own, optimizer, 2, times=float("nan"))
    after = [torch.cat((p.detach(), optimizer.state[p]["momentum_buffer"])) for p in own]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    stepped(own, optimizer, 2)
    assert not any(torch.equal(a, p) for a, p in zip(before, own, strict=True))


def test_muon_is_for_the_linear_maps_of_the_layers() -> None:
    model = tiny_model(image={"convolution": True}, text={"convolution": True})
    names = muon_matrices(model)
    assert "text_layers.0.expert.qkv.weight" in names
    assert all("_layers." in n and n.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight")) for n in names)
    optimizer = build_optimizer(model, MUON)
    marked = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
    assert sorted(map(id, marked)) == sorted(id(model.get_parameter(n)) for n in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    sizes = parameter_sizes(model, MUON)
    assert sum(s.numel for s in sizes if s.moments == 1) == sum(p.numel() for p in marked)
    assert {s.moments for s in parameter_sizes(model, OptimizerConfig())} == {2}


CUT = 40
"""Numbers of the matrices, one after the other, that the first of two ranks holds: it ends within the first matrix."""


def cut_steps(rank: int, ranks: int) -> torch.Tensor:
    """This rank's part of the matrices after three steps, laid flat as ZeRO 1 does."""
    low, high = (0, CUT) if rank == 0 else (CUT, sum(p.numel() for p in parameters()))
    flat = nn.Parameter(torch.cat([p.detach().view(-1) for p in parameters()])[low:high].clone())
    fragments, begin = [], 0
    for i, p in enumerate(parameters()):
        first, last = max(low, begin), min(high, begin + p.numel())
        if first < last:
            part = flat.detach()[first - low : last - low]
            fragments.append(Fragment(f"p{i}", p, first - begin, part, True, flat, first - low))
        begin += p.numel()
    optimizer = muon([flat])
    optimizer.lay_out(fragments, dist.group.WORLD)
    for step in range(3):
        flat.grad = torch.cat([gradient.view(-1) for gradient in gradients(step)])[low:high].clone()
        optimizer.step()
    return flat.detach()


def test_a_matrix_that_two_ranks_share_is_stepped_as_a_whole_one(tmp_path: Path) -> None:
    whole = parameters()
    optimizer = muon(whole)
    for step in range(3):
        stepped(whole, optimizer, step)
    start, expected = (torch.cat([p.detach().view(-1) for p in own]) for own in (parameters(), whole))
    got = torch.cat(run_ranks(cut_steps, 2, tmp_path))
    for some in (slice(0, SHAPES[0][0] * SHAPES[0][1]), slice(None)):  # the one that is cut, and all
        assert (got - expected)[some].norm() < 0.02 * (expected - start)[some].norm()


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_how_matrices_are_cut(tmp_path: Path, glyphs: Path, full: bool) -> None:
    """In real runs; what is left of a difference is bf16's, of matrices that are orthogonalised in other company."""
    text = STAGE.replace("dropout: 0.1", "dropout: 0.0").replace("contrastive: {", "contrastive: {group: 2, ")
    stage = write_stage(tmp_path, glyphs, text.replace("matching: {", "matching: {group: 2, "))
    stages = (0, 1, 2) if full else (1,)
    run_grid(1, stage, tmp_path / "runs", ["one zero.stage=0 optimizer.name=muon train.micro_batch=16"])
    run_grid(2, stage, tmp_path / "runs", [f"two{z} zero.stage={z} optimizer.name=muon train.micro_batch=8" for z in stages])
    differences = {f"two{z}": difference(tmp_path / "runs", "one", f"two{z}") for z in stages}
    assert max(differences.values()) < 2e-3, differences
    first, last = losses(tmp_path / "runs" / "one")[0][1]["loss"], losses(tmp_path / "runs" / "one")[-1][1]["loss"]
    assert last < first


@pytest.mark.parametrize("zero", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_with_muon_continues_bit_for_bit(tmp_path: Path, glyphs: Path, zero: int) -> None:
    words = ("optimizer.name=muon", "train.ema_decay=0.9", "train.micro_batch=4")
    check(tmp_path, glyphs, zero=zero, workers=0, steps=12, kills=1, extra=words)


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_stage_but_not_with_another_optimizer(tmp_path: Path, glyphs: Path) -> None:
    stage = write_stage(tmp_path, glyphs)
    run = f"run={tmp_path / 'run'}"
    words = ["optimizer.name=muon", "train.steps=8", "checkpoint.every=4"]
    done = train(2, stage, run, "zero.stage=2", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    refused = train(2, stage, run, "zero.stage=2", "train.steps=12")
    assert refused.returncode != 0
    assert "optimizer.name was muon, now not set" in refused.stdout + refused.stderr
    done = train(1, stage, run, "zero.stage=0", *words, "train.steps=12")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(losses(tmp_path / "run")) == 12


@pytest.mark.parametrize("words", ["zero.stage=3", "zero.offload_optimizer=cpu"])
def test_what_has_no_whole_matrices_is_refused(tmp_path: Path, glyphs: Path, words: str) -> None:
    done = train(1, write_stage(tmp_path, glyphs), f"run={tmp_path / 'run'}", "optimizer.name=muon", words)
    assert done.returncode == 2
    assert "`optimizer.name=muon` needs whole matrices at hand" in done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_steps_are_the_same_on_a_gpu_and_wait_for_nothing() -> None:
    ours, theirs = parameters(), [nn.Parameter(p.detach().cuda()) for p in parameters()]
    mine, other = muon(ours), muon(theirs)
    mine.found_inf = torch.zeros(())
    other.found_inf = torch.zeros((), device="cuda")
    given = [[gradient.cuda() for gradient in gradients(step)] for step in range(5)]
    with no_waits():
        for step in range(5):
            stepped(ours, mine, step)
            for q, gradient in zip(theirs, given[step], strict=True):
                q.grad = gradient
            other.step()
    for p, q, start in zip(ours, theirs, parameters(), strict=True):
        assert (p - q.cpu()).norm() < 0.02 * (p - start).norm()
