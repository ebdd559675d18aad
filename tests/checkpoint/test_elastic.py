"""A run goes on on any number of ranks and any ZeRO stage: no tensor changes a bit on the way, and the losses go on to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.find import name_of
from mmscale.checkpoint.fingerprint import BLOCK, fingerprint
from mmscale.checkpoint.reader import StateReader
from tests.checkpoint.forks import Forks
from tests.checkpoint.toy import hashes, train

STEPS = 3
TRAINED = {"embedding.weight", "hidden.weight", "hidden.bias", "norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("dtype", "topologies"),
    [
        ("float32", [(1, 1, None), (2, 3, 2), (4, 2, None), (1, 0, 4), (2, 1, None)]),
        pytest.param("bfloat16", [(2, 1, 2), (2, 3, None), (1, 2, None), (2, 0, None), (4, 1, None)], marks=pytest.mark.slow),
    ],
)
def test_every_tensor_survives_a_change_of_ranks_and_stage(
    tmp_path: Path, forks: Forks, dtype: str, topologies: list[tuple[int, int, int | None]]
) -> None:
    losses: list[float] = []
    before = None
    for leg, (ranks, stage, micro) in enumerate(topologies):
        here = tmp_path / f"{leg}"
        load = None if before is None else str(before)
        codes, results = forks(train, ranks, checkpoints=str(here), stage=stage, steps=STEPS, load=load, micro=micro, dtype=dtype)
        assert codes == [0] * ranks
        if before is not None:
            assert hashes(here / name_of(0)) == hashes(before)
            assert [r["stale"] for r in results] == [[]] * ranks
        losses += results[0]["losses"]
        before = here / name_of(STEPS * (leg + 1))
    assert before is not None
    index = StateReader(before).index
    assert {kind: set(entries) for kind, entries in index.tensors.items()} == {
        **dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "average"), TRAINED),
        "frozen": {"frozen.weight", "frozen.bias"},
        "buffer": {"mean", "batches"},
    }
    codes, results = forks(
        train, 1, checkpoints=str(tmp_path / "fixed"), stage=0 if dtype == "float32" else 1, steps=len(losses), dtype=dtype
    )
    assert codes == [0]
    assert losses == pytest.approx(results[0]["losses"], abs=1e-4 if dtype == "float32" else 5e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [0, 3])
def test_the_same_topology_goes_on_bit_for_bit(tmp_path: Path, forks: Forks, stage: int) -> None:
    whole = forks(train, 2, checkpoints=str(tmp_path / "whole"), stage=stage, steps=6)[1][0]["losses"]
    first = forks(train, 2, checkpoints=str(tmp_path / "first"), stage=stage, steps=4)[1][0]["losses"]
    rest = forks(train, 2, checkpoints=str(tmp_path / "rest"), stage=stage, steps=2, load=str(tmp_path / "first" / name_of(4)))[1][0][
        "losses"
    ]
    assert first + rest == whole
    assert hashes(tmp_path / "rest" / name_of(6)) == hashes(tmp_path / "whole" / name_of(6))


def test_fingerprints_add_up_and_see_what_changes() -> None:
    values = torch.randn(3 * BLOCK + 17, generator=torch.Generator().manual_seed(0))
    whole = fingerprint(values)
    for cut in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5, values.numel()):
        assert (fingerprint(values[:cut]) + fingerprint(values[cut:], cut)) % 2**64 == whole
    swapped = values.clone()
    swapped[[5, BLOCK + 5]] = values[[BLOCK + 5, 5]]
    negated = values.clone()
    negated[-1] = -negated[-1]
    assert len({whole, fingerprint(swapped), fingerprint(negated), fingerprint(values, 1)}) == 4
    assert fingerprint(torch.zeros(3)) != fingerprint(-torch.zeros(3))
    assert fingerprint(values.bfloat16()) != fingerprint(values.half())
    assert fingerprint(torch.ones(4, dtype=torch.int64)) == fingerprint(torch.ones(4, dtype=torch.bool))
