"""Muon for the matrices of the layers and AdamW for all else, as one optimizer; ZeRO 1 and 2 may have cut the matrices.

A matrix is not moved along its momentum but along the nearest semi-orthogonal matrix, so that all its directions are learned at one
speed. Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the update and its Newton-Schulz
iteration); Liu et al. 2025, "Muon is scalable for LLM training", equation 4: times 0.2 sqrt(max(R, C)) an update is as large as AdamW's,
so that one learning rate and one weight decay serve both.

`torch.optim.Muon` has neither of what a run needs: a step that the device alone decides to drop (`mmscale.guard`), and matrices that are
divided over ranks.

Shape letters: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.weights import Fragment

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the iteration X <- a X + (b A + c A A) X with A = X X^T: steep at 0, so that five of them bring every singular value near 1."""
ITERATIONS = 5
AT_ONCE = 1 << 25
"""Numbers that are made orthogonal together at most."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a flat tensor holds of one matrix."""

    offset: int
    """Where it begins in the flat tensor."""
    start: int
    """Where it begins in the matrix, flattened."""
    numel: int
    shape: torch.Size
    """(R, C) of the whole matrix."""
    cut: int | None
    """Where the whole matrix begins in the buffer of those that are cut; None where it lies here whole."""


@dataclass(slots=True)
class Layout:
    """What one flat tensor of this rank holds."""

    parts: list[Part] = field(default_factory=list)
    cut: int = 0
    """Numbers in all matrices of its parameter group that no rank holds whole."""


class Muon(torch.optim.Optimizer):
    """Steps the groups marked `muon` along their orthogonalised momentum, the others by AdamW (Loshchilov and Hutter 2019).

    Args:
        groups: parameter groups, each with its `weight_decay`; those marked `muon` have matrices only.
        lr: learning rate of all groups.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        momentum: decay rate of Muon's momentum, which is Nesterov's.

    Attributes:
        found_inf: fp32 scalar on the device; the step changes nothing where it is not 0. None: it is always taken.
        grad_scale: fp32 scalar on the device that gradients are divided by, or None.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "muon": False})
        others = [group for group in self.param_groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True) if others else None
        self._layouts: dict[int, Layout] = {}
        self._ranks: dist.ProcessGroup | None = None

    def lay_out(self, fragments: Sequence[Fragment], ranks: dist.ProcessGroup) -> None:
        """Tell which matrices lie where in the tensors that ZeRO laid flat (all ranks call, before the first step).

        Args:
            fragments: this rank's parts of all trained parameters.
            ranks: those that the parameters are divided over.
        """
        marked = {id(p): i for i, group in enumerate(self.param_groups) if group["muon"] for p in group["params"]}
        own = [(marked[id(f.stepped)], f) for f in fragments if id(f.stepped) in marked]
        mine = {(i, f.name, f.shape.numel()) for i, f in own if f.master.numel() < f.shape.numel()}
        everyone: list[set[tuple[int, str, int]]] = [set()] * dist.get_world_size(ranks)
        dist.all_gather_object(everyone, mine, group=ranks)
        begins: dict[str, int] = {}
        sizes = dict.fromkeys(marked.values(), 0)
        for i, name, numel in sorted(set[tuple[int, str, int]]().union(*everyone)):
            begins[name] = sizes[i]
            sizes[i] += numel
        self._ranks = ranks
        self._layouts = {key: Layout(cut=sizes[i]) for key, i in marked.items()}
        for _, f in own:
            part = Part(f.offset, f.start, f.master.numel(), f.shape, begins.get(f.name))
            self._layouts[id(f.stepped)].parts.append(part)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no step of ours has a closure
        """Take one step with the gradients that are there (all ranks call, where matrices are cut)."""
        if self._adamw is not None:  # DeepSpeed puts other tensors into the groups, and steps one group at a time
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self._adamw.state = self.state
            self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step(group)

    def _step(self, group: dict[str, Any]) -> None:
        taken = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        updates: list[tuple[Tensor, Tensor]] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p, requires_grad=False))
            if p.ndim == 2 or id(p) in self._layouts:  # DeepSpeed makes a step of nothing before anyone knows what lies where
                updates.append((p, self._update(p.grad, momentum, group["momentum"], taken)))
        matrices = [self._matrices(p, update) for p, update in updates]
        orthogonalise([matrix for own in matrices for matrix, _ in own])
        for (p, update), own in zip(updates, matrices, strict=True):
            for matrix, part in own:
                scaled = matrix.mul_(0.2 * max(matrix.shape) ** 0.5)
                if part is not None and part.cut is not None:
                    update.narrow(0, part.offset, part.numel).copy_(scaled.view(-1).narrow(0, part.start, part.numel))
            p.mul_(1.0 - taken * (group["lr"] * group["weight_decay"]))
            p.sub_(update.mul_(taken * group["lr"]))

    def _update(self, gradient: Tensor, momentum: Tensor, decay: float, taken: Tensor | float) -> Tensor:
        """Add a gradient to the momentum, and give what is to be orthogonalised; no number of a step to be dropped gets anywhere."""
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        if isinstance(taken, Tensor):
            gradient = torch.where(taken > 0, gradient, 0.0)
        momentum.add_((gradient - momentum).mul_((1 - decay) * taken))
        return gradient.lerp(momentum, decay)

    def _matrices(self, p: Tensor, update: Tensor) -> list[tuple[Tensor, Part | None]]:
        """The whole matrices behind a stepped tensor: views of its update, or of a copy of those that are cut."""
        layout = self._layouts.get(id(p))
        if layout is None:
            return [(update, None)]
        whole = torch.zeros(layout.cut, dtype=update.dtype, device=update.device)
        for part in layout.parts:
            if part.cut is not None:
                whole.narrow(0, part.cut + part.start, part.numel).copy_(update.narrow(0, part.offset, part.numel))
        if layout.cut:
            dist.all_reduce(whole, group=self._ranks)  # each number comes from one rank, to which the others add 0
        found: list[tuple[Tensor, Part | None]] = []
        for part in layout.parts:
            flat, begin = (update, part.offset) if part.cut is None else (whole, part.cut)
            found.append((flat.narrow(0, begin, part.shape.numel()).view(part.shape), part))
        return found


def orthogonalise(matrices: Sequence[Tensor]) -> None:
    """Put in the place of each matrix (R, C) about U V^T of its singular value decomposition U S V^T; those of one shape together."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        shapes.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in shapes.items():
        together = max(1, AT_ONCE // shape.numel())
        for low in range(0, len(alike), together):
            some = alike[low : low + together]
            torch._foreach_copy_(some, list(_newton_schulz(torch.stack(some)).unbind()))


def _newton_schulz(x_NRC: Tensor) -> Tensor:
    """Five iterations towards U V^T, in bf16, which is all that they need (Jordan et al. 2024)."""
    a, b, c = COEFFICIENTS
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = (x_NRC.mT if tall else x_NRC).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
