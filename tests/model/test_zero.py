"""ZeRO-3: ranks that hold different modalities do not wait for each other for ever, and compute what one rank computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmscale.model import cross_entropy
from tests.model.tiny import VOCAB, Row, all_objectives, make_batch, random_rows, tiny_model
from tests.objectives.ranks import run_ranks

TEXT_ONLY = [Row(image=False, caption=r.caption, text=r.text, label=r.label) for r in random_rows(4)]
IMAGE_ONLY = [Row(caption=None, text=None, label=i % 3) for i in range(4)]
STEPS = {
    "text | image": [TEXT_ONLY, IMAGE_ONLY],
    "image | pairs": [IMAGE_ONLY, random_rows(4)],
    "pairs | nothing": [random_rows(4), [Row(image=False, caption=None, text=None)] * 4],
    "pairs | pairs": [random_rows(4, seed=1), random_rows(4, seed=2)],
}


class Trainee(nn.Module):
    """What an engine wraps: the sum of all terms."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        self.model = tiny_model(activation_checkpointing=recompute)
        self.objectives = all_objectives()

    def forward(self, batch: Any) -> Tensor:
        """The sum of the terms' sums."""
        return torch.stack([term.sum for term in self.model(batch, self.objectives).values()]).sum()


def zero_steps(rank: int, ranks: int, stage: int, recompute: str) -> list[dict[str, Tensor]]:
    """Gradients of every step on this rank, gathered from the partitions; summed over ranks."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for minutes
    if recompute:
        cross_entropy.LOGITS_AT_ONCE = VOCAB * 5  # several chunks, whose logits backward computes from the gathered weight
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    trainee = Trainee(recompute)
    engine, *_ = deepspeed.initialize(model=trainee, optimizer=torch.optim.SGD(trainee.parameters(), lr=0.0), config=config)
    found = []
    for rows in STEPS.values():
        loss = engine(make_batch(rows[rank], first=4 * rank))
        engine.backward(loss * ranks)
        found.append({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})
        engine.step()
    return found


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Tensor]]:
    """Gradients of one process over both ranks' samples."""
    found = []
    for rows in STEPS.values():
        trainee = Trainee("none")
        matching = [o for o in trainee.objectives if o.name == "matching"]
        trainee.objectives = [o for o in trainee.objectives if o.name != "matching"]
        trainee(make_batch(rows[0] + rows[1])).backward()
        trainee.objectives = matching  # its negatives come from a rank's own micro-batch
        for rank in (0, 1):
            trainee(make_batch(rows[rank], first=4 * rank)).backward()
        found.append({name: p.grad.clone() for name, p in trainee.named_parameters()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "recompute"), [(3, "none"), (3, "full"), (3, "selective"), (2, "none"), (1, "none")])
def test_ranks_of_different_modalities_give_the_gradients_of_one_rank(
    tmp_path: Path, expected: list[dict[str, Tensor]], stage: int, recompute: str
) -> None:
    for got in run_ranks(zero_steps, 2, tmp_path, stage, recompute):
        for step, mine, theirs in zip(STEPS, got, expected, strict=True):
            for name, grad in theirs.items():
                torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, at=(step, name): f"{at}: {m}")
