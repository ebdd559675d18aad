"""A step whose loss or gradient is not finite changes nothing: decided on the device, on all ranks alike.

The gradient norm over all ranks is the one criterion. A loss that is not finite is made to reach it: the gradient is multiplied by
`1 + 0 * loss`, which is 1, or not a number. Where `mmscale.engine.clips_itself`, the norm is worked out here, in a few kernels over all
gradients at once; elsewhere it is DeepSpeed's. The fused AdamW is told by `found_inf` whether to take the step and by `grad_scale` what
gradients are to be divided by, and reads both on the device, as torch's own loss scaler has it. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmscale.own_time import Moment


class Gate:
    """Stands before the optimizer of an engine.

    Args:
        engine: the DeepSpeed engine, configured by `mmscale.engine.deepspeed_config`.
        clip_norm: what the gradient's norm is clipped to, where that is not DeepSpeed's task; 0 for nothing.
        entrances: modules that every gradient flows back to, such as the embeddings: what they get says which micro-batch of which rank
            a gradient that is not finite came from, when all losses are finite.
    """

    def __init__(self, engine: Any, clip_norm: float, *entrances: nn.Module) -> None:
        self.engine, self.clip_norm = engine, clip_norm
        self._plain = engine.optimizer is engine.basic_optimizer
        self._own = self._plain or not getattr(engine.optimizer, "compute_grad_norm", True)
        self._norm: Any = None
        self._trace: Tensor | None = None
        self.arrived: list[Moment] = []
        """When gradients reached the embeddings in the last `backward`."""
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
        self._trace, self.arrived = None, []
        # The product is also what makes scale_wrt_gas=False hold under ZeRO 0: given the very tensor of its forward, DeepSpeed 0.19.8
        # divides by the accumulation.
        self.engine.backward(loss * (ranks + 0 * loss.detach()), scale_wrt_gas=False)
        return self._trace if self._trace is not None else torch.zeros((), device=loss.device)

    def step(self) -> None:
        """Let the engine take its step; at the end of accumulation that is the optimizer's (all ranks call)."""
        if self._own and self.engine.is_gradient_accumulation_boundary():
            self._norm = self._global_norm()
        self.engine.step()

    @property
    def norm(self) -> Any:
        """The gradient norm of the last step over all ranks: a scalar, on the device or the host; None before the first."""
        return self._norm if self._own else self.engine.get_global_grad_norm()

    def skipped(self) -> Tensor:
        """Tell whether the last step was dropped: fp32 scalar on the device, 1 or 0, the same on all ranks."""
        return self._not_finite(self.norm)

    def _global_norm(self) -> Tensor:
        """2-norm of all gradients, fp32: of the whole ones that each rank has, or of the ranks' parts."""
        if self._plain:
            parts = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        else:
            groups = self.engine.optimizer.averaged_gradients.values()
            parts = [part for group in groups for part in ([group] if isinstance(group, Tensor) else group)]
        squares = torch.zeros((), device=self.engine.device)
        if parts:
            wider = (
                None if parts[0].dtype == torch.float32 else torch.float32
            )  # naming the type that they have takes CPUs eight times as long
            squares = torch.stack(torch._foreach_norm(parts, 2.0, wider)).square().sum()
        if not self._plain:
            dist.all_reduce(squares, group=self.engine.optimizer.dp_process_group)
        return squares.sqrt()

    def _not_finite(self, norm: Any) -> Tensor:
        finite = torch.isfinite(torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device).reshape(()))
        return (~finite).float()

    def _close(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.found_inf = self._not_finite(self._norm if self._own else self.engine.optimizer._global_grad_norm)
        if self._own and self.clip_norm:
            optimizer.grad_scale = ((self._norm + 1e-6) / self.clip_norm).clamp(min=1.0)

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._note)  # type: ignore[no-untyped-call]

    def _note(self, gradient: Tensor) -> None:
        self.arrived.append(Moment(gradient.device))
        zero = 0 * gradient.detach().sum(dtype=torch.float32)
        self._trace = zero if self._trace is None else self._trace + zero
