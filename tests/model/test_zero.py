"""ZeRO-3: ranks that hold different modalities do not wait for each other for ever, and compute what one rank computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmscale.data.batch import Batch
from mmscale.model import cross_entropy
from tests.model.streams import GRIDS, NATIVE, ROWS, stream_batch
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


NOTHING: dict[str, list[Any]] = {name: [None] * len(ROWS) for name in GRIDS}
HEARD = {
    "sound | clips": [NOTHING | {"audio": GRIDS["audio"]}, NOTHING | {"video": GRIDS["video"]}],
    "text | all": [NOTHING, GRIDS],
    "images | series": [NOTHING | {"image": GRIDS["image"]}, NOTHING | {"other": GRIDS["other"]}],
}


class Trainee(nn.Module):
    """What an engine wraps: the sum of all terms."""

    def __init__(self, recompute: str, modalities: Any = None) -> None:
        super().__init__()
        self.model = tiny_model(activation_checkpointing=recompute, modalities=modalities or {})
        self.objectives = all_objectives()
        if modalities:  # those that do not look at other samples
            self.objectives = [o for o in self.objectives if o.name not in ("contrastive", "matching")]

    def forward(self, batch: Any) -> Tensor:
        """The sum of the terms' sums."""
        return torch.stack([term.sum for term in self.model(batch, self.objectives).values()]).sum()


def zero_steps(rank: int, ranks: int, stage: int, recompute: str, modalities: Any = None) -> list[dict[str, Tensor]]:
    """Gradients of every step on this rank, gathered from the partitions; summed over ranks."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for minutes
    if recompute:
        cross_entropy.LOGITS_AT_ONCE["cpu"] = VOCAB * 5  # several chunks, whose logits backward computes from the gathered weight
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    trainee = Trainee(recompute, modalities)
    engine, *_ = deepspeed.initialize(model=trainee, optimizer=torch.optim.SGD(trainee.parameters(), lr=0.0), config=config)
    found = []
    for batch in batches_of(rank, trainee, modalities):
        loss = engine(batch)
        engine.backward(loss * ranks)
        found.append({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})
        engine.step()
    return found


def batches_of(rank: int, trainee: Trainee, modalities: Any) -> list[Batch]:
    """What a rank takes in each step."""
    if modalities:
        return [stream_batch(trainee.model, grids=grids[rank], first=len(ROWS) * rank) for grids in HEARD.values()]
    return [make_batch(rows[rank], first=4 * rank) for rows in STEPS.values()]


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


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_ranks_of_sound_clips_and_series_give_the_gradients_of_one_rank(tmp_path: Path, recompute: str) -> None:
    trainee, theirs = Trainee(recompute, NATIVE), []
    for batches in zip(batches_of(0, trainee, NATIVE), batches_of(1, trainee, NATIVE), strict=True):
        trainee.zero_grad()
        for batch in batches:
            trainee(batch).backward()
        theirs.append({name: p.grad.clone() for name, p in trainee.named_parameters()})
    for got in run_ranks(zero_steps, 2, tmp_path, 3, recompute, NATIVE):
        for step, mine, expected in zip(HEARD, got, theirs, strict=True):
            for name, grad in expected.items():
                torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, at=(step, name): f"{at}: {m}")
