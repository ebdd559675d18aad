"""DeepSpeed: the configuration derived from ours, and the wrapped model that the loop trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.arithmetic import BatchPlan
from mmscale.config import RunConfig, ZeroConfig
from mmscale.data.batch import Batch
from mmscale.model import MMScaleModel
from mmscale.model.compiled import compile_experts
from mmscale.muon import Muon
from mmscale.objectives import Objective
from mmscale.optim import build_optimizer
from mmscale.weights import trained_fragments

Logs = dict[str, tuple[Tensor, Tensor]]


class Trainee(nn.Module):
    """The model with its objectives: one forward gives the scaled loss of a micro-batch."""

    def __init__(self, model: MMScaleModel, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = tuple(objectives)

    def forward(self, batch: Batch, factors_K: Tensor, objectives: Sequence[Objective] | None = None) -> tuple[Tensor, Tensor, Logs]:
        """Run every objective once.

        Args:
            batch: a micro-batch on this rank's device.
            factors_K: what each objective's sum is multiplied by, its weight over its global count.
            objectives: others for this forward; None for those of training.

        Returns:
            The loss to differentiate (scalar); the detached sum of each objective (K,); detached (sum, count) pairs by name.
        """
        objectives = self.objectives if objectives is None else objectives
        terms = self.model(batch, objectives)
        sums_K = torch.stack([terms[o.name].sum for o in objectives])
        logs = {name: pair for o in objectives for name, pair in terms[o.name].logs.items()}
        return (sums_K * factors_K).sum(), sums_K.detach(), logs


def clips_itself(zero: ZeroConfig, dtype: torch.dtype, accumulation: int) -> bool:
    """Whether `mmscale.guard.Gate` works out the gradient norm and clips, and not DeepSpeed.

    Under ZeRO 1 and 2 DeepSpeed 0.19.8 looks at every parameter's gradient by itself, for numbers that are not finite and for its norm:
    some 15 kernels a parameter and step, and waits for the device. It can be told not to, but for an offloaded optimizer, for ZeRO 1 with
    bf16 gradients that are summed in fp32 (which is another optimizer of its), and for ZeRO 3.
    """
    if zero.offload_optimizer != "none":
        return False
    if dtype == torch.float32:
        return zero.stage < 3
    return zero.stage == 2 or (zero.stage == 1 and accumulation == 1)


def zero_options(zero: ZeroConfig, trained: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` section.

    The bucket is no larger than all trained numbers: DeepSpeed makes a buffer of its size whatever the model, 2 GB by default in fp32.
    """
    options: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": max(1, min(zero.reduce_bucket, trained))}
    if zero.stage == 3:
        options |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
        }
    if zero.offload_optimizer == "cpu":  # page-locked memory is for copies from and to an accelerator
        options["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return options


def deepspeed_config(config: RunConfig, plan: BatchPlan, dtype: torch.dtype, trained: int, device: torch.device) -> dict[str, Any]:
    """Derive DeepSpeed's configuration; nobody writes it by hand."""
    own = clips_itself(config.zero, dtype, plan.accumulation)
    derived: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0 if own else config.train.clip_norm,
        "steps_per_print": 2**31,
        "zero_optimization": zero_options(config.zero, trained, device),
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": config.optimizer.name == "muon",
    }
    if own and config.zero.stage:
        derived["zero_optimization"]["compute_grad_norm"] = False
    if dtype == torch.bfloat16:
        derived["bf16"] = {"enabled": True, "check_grad_overflow": not own}
        if plan.accumulation > 1 and config.zero.stage >= 1:
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived


def build_engine(trainee: Trainee, config: RunConfig, plan: BatchPlan, dtype: torch.dtype, device: torch.device) -> Any:
    """Wrap the trainee in DeepSpeed (all ranks call).

    Returns:
        The `deepspeed.DeepSpeedEngine`.
    """
    import deepspeed

    if config.train.compile:
        compile_experts(trainee.model)
    trained = sum(p.numel() for p in trainee.parameters() if p.requires_grad)
    derived = deepspeed_config(config, plan, dtype, trained, device)
    optimizer = build_optimizer(trainee, config.optimizer)
    engine, *_ = deepspeed.initialize(model=trainee, optimizer=optimizer, config=derived)
    if isinstance(optimizer, Muon) and config.zero.stage:
        optimizer.lay_out(trained_fragments(engine, trainee), engine.optimizer.dp_process_group)
    if plan.ranks == 1 and config.zero.stage == 0:  # it would copy all gradients into a buffer and back, to sum them over one rank
        engine.enable_backward_allreduce = False
    return engine
