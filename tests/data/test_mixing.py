"""Mixup and CutMix: pairs of neighbouring positions, the same mixtures for any ranks and micro-batches, losses that follow them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta

from mmscale.arithmetic import plan_batch
from mmscale.augment_config import AugmentConfig
from mmscale.data.arena import pageable
from mmscale.data.batch import IGNORE, Batch, Mixing
from mmscale.data.build import Builder
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader
from mmscale.data.mixing import box, recipes_for
from mmscale.data.packing import pack, unpack
from mmscale.model.state import State
from mmscale.objectives.build import build_objectives
from mmscale.objectives.classify import Classify
from mmscale.objectives.tag import Tag
from shards.errors import ConfigError
from tests.data.test_streams import build
from tests.data.tiny import SIZE, assert_equal, collator, config, image_bytes, write
from tests.shards.recordings import tone

OFF = dict.fromkeys(("contrastive", "matching", "masked_language", "captioning", "masked_image"), {"weight": 0.0})
LABELS = ["red", "green", "blue"]
STAGE = {"task": {"name": "classification"}, "objectives": OFF, "model": {"modalities": {"audio": {"mels": 16, "patch": 8, "max_seconds": 0.4}}}}
ROWS = (8, 8)


def data(**keys) -> dict[str, object]:
    return {"text": None, "label": "answer", "labels": LABELS, "augment": {"shift": 0, "flip": 0, "scale": 0, "brightness": 0} | keys}


def sample(index: int) -> dict[str, bytes]:
    """A picture and a sound; sounds of two lengths, two samples in a row without a label, one without a picture."""
    fields = {} if index in (6, 7) else {"answer": LABELS[index % 3]}
    parts = {"wav": tone(0.2 if index % 2 else 0.4, hertz=300.0 + 50 * index), "json": json.dumps(fields).encode()}
    return parts if index == 9 else parts | {"jpg": image_bytes(index)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixed") / "shards", sample, ROWS)


def builder(shards: Path, shuffle: bool = False, training: bool = True, **keys) -> Builder:
    made = collator(shards.parent, shards, training=training, data=data(**keys), **STAGE)
    return Builder(ShardDataset(shards, seed=1, image_size=SIZE, shuffle=shuffle), made)


def sounds(batch: Batch) -> list[np.ndarray]:
    stream = batch.streams["audio"]
    return np.split(stream.values_TC.numpy(), stream.cu_seqlens_S1[1:-1])


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_shares_are_those_of_beta_and_belong_to_seed_and_position(key: str) -> None:
    positions, asked = np.arange(20000), AugmentConfig(**{key: 0.4})
    found = recipes_for(3, positions, asked)
    assert found[::-1] == recipes_for(3, positions[::-1], asked)
    assert found != recipes_for(4, positions, asked)
    assert {r.centre is not None for r in found} == {key == "cutmix"}
    shares = [r.share for r in found]
    for part in (0.1, 0.5, 0.9):  # max(x, 1 - x) is the upper half of a distribution that is symmetric about 0.5
        assert np.quantile(shares, part) == pytest.approx(beta.ppf(0.5 + part / 2, 0.4, 0.4), abs=0.01)


def test_with_both_half_are_mixed_by_each_with_its_own_alpha() -> None:
    found = recipes_for(3, np.arange(20000), AugmentConfig(mixup=0.2, cutmix=2.0))
    cut = np.array([r.centre is not None for r in found])
    assert cut.mean() == pytest.approx(0.5, abs=0.01)
    shares = np.array([r.share for r in found])
    for chosen, alpha in ((~cut, 0.2), (cut, 2.0)):
        assert np.median(shares[chosen]) == pytest.approx(beta.ppf(0.75, alpha, alpha), abs=0.02)
    for side in np.array([r.centre for r in found if r.centre]).T:
        assert np.quantile(side, (0.1, 0.5, 0.9)) == pytest.approx((0.1, 0.5, 0.9), abs=0.02)


@pytest.mark.parametrize(
    ("grid", "share", "centre", "expected"),
    [
        ((1, 4, 8), 0.75, (0.5, 0.5), (slice(None), slice(1, 3), slice(2, 6))),  # half of each side
        ((3, 4, 4), 0.75, (0.5, 0.5), (slice(None), slice(1, 3), slice(1, 3))),  # through all frames
        ((8, 4, 1), 0.75, (0.5, 0.99), (slice(2, 6), slice(2, 4), slice(None))),  # time and bands; clipped
        ((8, 1, 1), 0.75, (0.25, 0.9), (slice(1, 3), slice(None), slice(None))),  # a quarter of the time
        ((1, 1, 8), 0.5, (0.9, 0.0), (slice(None), slice(None), slice(0, 2))),  # clipped at the left
        ((1, 5, 5), 0.75, (0.0, 0.0), (slice(None), slice(0, 1), slice(0, 1))),  # 2 of 5, rounded down, clipped
        ((1, 4, 4), 1.0, (0.5, 0.5), (slice(0), slice(0), slice(0))),
        ((1, 1, 1), 0.5, (0.5, 0.5), (slice(0), slice(0), slice(0))),  # nothing to cut from
    ],
)
def test_boxes_by_hand(grid: tuple[int, int, int], share: float, centre: tuple[float, float], expected: tuple[slice, ...]) -> None:
    wanted = np.zeros(grid, dtype=bool)
    wanted[expected] = True
    assert np.array_equal(box(grid, share, centre), wanted)


def test_a_box_leaves_at_least_the_share() -> None:
    for recipe in recipes_for(1, np.arange(2000), AugmentConfig(cutmix=1.0)):
        for grid in ((1, 30, 30), (1, 3, 5), (2, 7, 4), (9, 3, 1)):
            assert recipe.centre is not None
            assert box(grid, recipe.share, recipe.centre).mean() <= 1 - recipe.share + 1e-6


def test_pairs_are_cut_into_one_another(shards: Path) -> None:
    plain, mixed = build(builder(shards), range(16)).batch, build(builder(shards, cutmix=1.0), range(16)).batch
    assert mixed.mixing is not None
    recipes = recipes_for(3, np.arange(16), AugmentConfig(cutmix=1.0))
    before, after = sounds(plain), sounds(mixed)
    images = {int(row): n for n, row in enumerate(plain.image_rows_N)}
    shares, changed = [1.0] * 16, 0
    for row, other in enumerate(mixed.mixing.rows_M.tolist()):
        assert other == (row if row in (6, 7, 8, 9) else row ^ 1)
        picture = plain.pixels_NCHW[images[row]].clone() if row in images else None
        heard = before[row].copy()
        if other != row:
            seen, common = recipes[row], min(len(heard), len(before[other]))
            part = torch.from_numpy(box((1, SIZE, SIZE), seen.share, seen.centre)[0])
            picture[:, part] = plain.pixels_NCHW[images[other]][:, part]
            patches = box((common // 2, 2, 1), seen.share, seen.centre).reshape(-1)  # two bands of eight mels, time before bands
            heard[:common][patches] = before[other][:common][patches]
            shares[row] = 1 - (float(part.float().mean()) + patches.sum() / len(heard)) / 2
            changed += bool(patches.any() and part.any())
        assert np.array_equal(after[row], heard)
        assert picture is None or torch.equal(mixed.pixels_NCHW[images[row]], picture)
    assert changed > 4
    assert mixed.mixing.shares_M.tolist() == pytest.approx(shares)
    assert min(shares) >= 0.5


def test_pairs_are_laid_over_one_another_and_the_rest_is_left(shards: Path) -> None:
    plain, mixed = build(builder(shards), range(16)).batch, build(builder(shards, mixup=1.0), range(16)).batch
    assert plain.mixing is None
    assert mixed.mixing is not None
    unmixed = {6, 7, 8, 9}  # without labels; without a picture, and its partner
    assert mixed.mixing.rows_M.tolist() == [i if i in unmixed else i ^ 1 for i in range(16)]
    drawn = [r.share for r in recipes_for(3, np.arange(16), AugmentConfig(mixup=1.0))]
    shares = [1.0 if i in unmixed else float(s) for i, s in enumerate(drawn)]
    assert mixed.mixing.shares_M.tolist() == shares
    before, after = sounds(plain), sounds(mixed)
    for row, other in enumerate(mixed.mixing.rows_M.tolist()):
        common = min(len(before[row]), len(before[other]))
        expected = before[row].copy()
        if other != row:  # waves turned down to their shares: their powers, 10 ** (4 x - 4), add up by the shares' squares
            own, rest = (10 ** (4 * before[i][:common].astype(np.float64) - 4) for i in (row, other))
            expected[:common] = (np.log10(shares[row] ** 2 * own + (1 - shares[row]) ** 2 * rest) + 4) / 4
        np.testing.assert_allclose(after[row], expected, atol=1e-6)
    images = {int(row): n for n, row in enumerate(plain.image_rows_N)}
    for row, n in images.items():
        one, two = (plain.pixels_NCHW[images.get(i, n)].double() for i in (row, int(mixed.mixing.rows_M[row])))
        assert (mixed.pixels_NCHW[n] - (shares[row] * one + (1 - shares[row]) * two)).abs().max() <= 0.5 + 1e-4
        assert torch.equal(mixed.pixels_NCHW[n], plain.pixels_NCHW[n]) == (row in unmixed)
    assert torch.equal(mixed.targets["label"], plain.targets["label"])
    assert build(builder(shards, training=False, mixup=1.0), range(16)).batch.mixing is None


@pytest.mark.parametrize(("size", "micro", "workers"), [(1, 8, 0), (2, 4, 0), (1, 2, 0), (2, 2, 1)])
def test_mixtures_do_not_depend_on_ranks_accumulation_or_workers(shards: Path, size: int, micro: int, workers: int) -> None:
    def seen(size: int, micro: int, workers: int = 0, samples_seen: int = 0) -> dict[int, tuple[bytes, int, float]]:
        found = {}
        for rank in range(size):
            made = builder(shards, shuffle=True, mixup=0.4, cutmix=1.0, roll=0.5)
            keys = {"global_batch": 8, "micro_batch": micro, "rank": rank, "size": size, "steps": 5, "consecutive": True}
            with StepLoader(made.dataset, made.collator, workers=workers, samples_seen=samples_seen, **keys) as loader:
                for batch in (b for step in loader for b in step.micro):
                    partner_M = batch.positions_M[batch.mixing.rows_M]
                    for row, heard in enumerate(sounds(batch)):
                        found[int(batch.positions_M[row])] = (heard.tobytes(), int(partner_M[row]), float(batch.mixing.shares_M[row]))
        return found

    whole = seen(1, 8)
    assert len(whole) == 40
    assert sum(share < 1 for _, _, share in whole.values()) > 20
    assert seen(size, micro, workers) == whole
    assert seen(size, micro, workers, samples_seen=16) == {p: v for p, v in whole.items() if p >= 16}


def test_a_mixed_batch_survives_packing(shards: Path) -> None:
    made = builder(shards, mixup=0.4)
    arena = pageable(made.arena_bytes(16))
    batch = build(made, range(16), arena).batch
    expected = build(made, range(16)).batch
    block = torch.from_numpy(arena)
    assert_equal(unpack(pack(batch, block, made.decoded_bytes(16)), block), expected)


def loss(batch: Batch, objective: Classify | Tag, logits_MC: torch.Tensor, target: torch.Tensor, mixing: Mixing | None) -> float:
    none = {f.name: torch.empty(0) for f in fields(State)}
    state = State(**none | {"patches": [], "class_logits_MC": {objective.head: logits_MC}})
    batch = replace(batch, targets={objective.head: target}, mixing=mixing)
    return float(objective.loss(state, batch, None).sum)  # type: ignore[arg-type]


def test_the_losses_are_those_of_mixed_targets(shards: Path) -> None:
    batch = build(builder(shards), range(4)).batch
    generator = torch.Generator().manual_seed(0)
    logits_MC, label_M = torch.randn(4, 3, generator=generator), torch.tensor([0, 2, IGNORE, 1])
    mixing = Mixing(rows_M=torch.tensor([1, 0, 2, 3]), shares_M=torch.tensor([0.75, 0.5, 1.0, 1.0]))
    soft_MC = torch.tensor([[0.75, 0, 0.25], [0.5, 0, 0.5], [0, 0, 0], [0, 1, 0]])
    expected = float(-(soft_MC * F.log_softmax(logits_MC, 1)).sum())
    assert loss(batch, Classify(weight=1.0), logits_MC, label_M, mixing) == pytest.approx(expected, rel=1e-6)
    plain = float(F.cross_entropy(logits_MC, label_M, ignore_index=IGNORE, reduction="sum"))
    assert loss(batch, Classify(weight=1.0), logits_MC, label_M, None) == plain
    tags_MC = torch.tensor([[1.0, 0, 1], [0, 1, 1], [IGNORE] * 3, [0, 0, 1]])
    mixed_MC = torch.tensor([[0.75, 0.25, 1], [0.5, 0.5, 1], [0, 0, 0], [0, 0, 1]])
    each_MC = F.binary_cross_entropy_with_logits(logits_MC, mixed_MC, reduction="none")
    assert loss(batch, Tag(weight=1.0), logits_MC, tags_MC, mixing) == pytest.approx(float(each_MC[[0, 1, 3]].sum()), rel=1e-6)


def test_pairs_stay_in_one_micro_batch(shards: Path) -> None:
    assert plan_batch(config(shards, data=data(mixup=0.4), train={"global_batch": 8}, **STAGE), 2).consecutive
    assert not plan_batch(config(shards, data=data(), train={"global_batch": 8}, **STAGE), 2).consecutive
    assert plan_batch(config(shards, data=data(cutmix=1.0), train={"global_batch": 8}, **STAGE), 2).consecutive
    with pytest.raises(ConfigError, match=r"^`data\.augment\.mixup` mixes neighbouring positions, which must lie in one micro-batch: .* got 3\."):
        plan_batch(config(shards, data=data(mixup=0.4), train={"global_batch": 6}, **STAGE), 2)


def test_a_task_whose_targets_cannot_be_mixed_is_refused(shards: Path) -> None:
    stage = STAGE | {"task": {"name": "tests.training.toy_task"}}
    with pytest.raises(ConfigError, match=r"^`data\.augment\.mixup` mixes labels, and the loss of task\.name = tests\.training\.toy_task is"):
        build_objectives(config(shards, data=data(mixup=0.4), **stage))
