"""A step whose loss or gradient is not finite changes nothing: decided on the device, on all ranks alike.

The gradient norm over all ranks is the one criterion. A loss that is not finite is made to reach it: the gradient is multiplied by
`1 + 0 * loss`, which is 1, or not a number. DeepSpeed drops such a step under ZeRO 3, in fp32 under ZeRO 1 and 2, and in bf16 under
ZeRO 0; elsewhere it would take it (0.19.8), so that the optimizer below it is told by `found_inf`, which the fused AdamW reads on the
device. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


class Gate:
    """Stands before the optimizer of an engine.

    Args:
        engine: the DeepSpeed engine.
        entrances: modules that every gradient flows back to, such as the embeddings: what they get says which micro-batch of which rank
            a gradient that is not finite came from, when all losses are finite.
    """

    def __init__(self, engine: Any, *entrances: nn.Module) -> None:
        self.engine = engine
        self._plain = engine.optimizer is engine.basic_optimizer
        self._trace: Tensor | None = None
        for module in entrances:
            module.register_forward_hook(self._watch)
        engine.basic_optimizer.register_step_pre_hook(self._close)

    def backward(self, loss: Tensor, ranks: int) -> Tensor:
        """Add the gradient of the sum over ranks of their losses.

        Args:
            loss: scalar of a micro-batch, normalised by the global count.
            ranks: DeepSpeed averages gradients over them, while a loss over a global count needs the sum.

        Returns:
            fp32 scalar on the device: 0, or not a number if the gradient of this micro-batch on this rank is not finite.
        """
        self._trace = None
        # The product is also what makes scale_wrt_gas=False hold under ZeRO 0: given the very tensor of its forward, DeepSpeed 0.19.8
        # divides by the accumulation.
        self.engine.backward(loss * (ranks + 0 * loss.detach()), scale_wrt_gas=False)
        return self._trace if self._trace is not None else torch.zeros((), device=loss.device)

    def step(self) -> None:
        """Let the engine take its step; at the end of accumulation that is the optimizer's."""
        if self._plain and self.engine.is_gradient_accumulation_boundary():
            # without ZeRO in fp32 DeepSpeed keeps no norm; its clipping comes after this
            self.engine._global_grad_norm = get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
        self.engine.step()

    def skipped(self) -> Tensor:
        """Tell whether the last step was dropped: fp32 scalar on the device, 1 or 0, the same on all ranks."""
        return self._not_finite(self.engine.get_global_grad_norm())

    def _not_finite(self, norm: Any) -> Tensor:
        finite = torch.isfinite(torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device).reshape(()))
        return (~finite).float()

    def _close(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        wrapper = self.engine if self._plain else self.engine.optimizer
        optimizer.found_inf = self._not_finite(wrapper._global_grad_norm)

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._note)  # type: ignore[no-untyped-call]

    def _note(self, gradient: Tensor) -> None:
        zero = 0 * gradient.detach().sum(dtype=torch.float32)
        self._trace = zero if self._trace is None else self._trace + zero
