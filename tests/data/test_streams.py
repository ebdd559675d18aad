"""Shards with sound, clips and pictures of any shape to patch streams: keyed by position, bit for bit, bad parts named."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mmscale.data.arena import pageable
from mmscale.data.build import Builder, Micro
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader
from mmscale.data.packing import pack, unpack
from mmscale.data_config import keep_schedules
from shards.errors import ConfigError
from tests.data.tiny import SIZE, assert_equal, collator, image_bytes, paired, write
from tests.shards.recordings import clip, tone

MODALITIES = {
    "image": {"max_tokens": 20},
    "audio": {"mels": 16, "patch": 8, "max_seconds": 0.3},
    "video": {"frames": 4, "image_size": 8},
    "series": {"kind": "tests.modalities.series:Series"},
}
ROWS = (8, 8)


def heard(index: int) -> dict[str, bytes]:
    """By turns: a sound, a clip, text alone, a picture of another shape, a broken sound, all of it, a series, a broken clip."""
    pair = paired(index)
    text, number = {"txt": pair["txt"]}, index % 4
    series = {"json": json.dumps({"series": list(range(4 * (1 + number)))}).encode()}
    return (
        text | {"wav": tone(0.1 + 0.05 * number)},
        text | {"mp4": clip(frames=2 + number)},
        text,
        text | {"png": image_bytes(index, SIZE + 8 * number, "PNG")},
        text | {"flac": b"fLaC" + bytes(40)},
        text | series | {"wav": tone(0.5), "mp4": clip(frames=9), "jpg": pair["jpg"]},
        series,
        text | {"mp4": clip()[:300]},
    )[index % 8]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("heard") / "shards", heard, ROWS)


def builder(shards: Path, training: bool = True, **layers) -> Builder:
    layers = {"model": {"modalities": MODALITIES}, **layers}
    return Builder(ShardDataset(shards, seed=1, image_size=SIZE, shuffle=False), collator(shards.parent, shards, training=training, **layers))


def build(made: Builder, positions, arena: np.ndarray | None = None) -> Micro:
    with ThreadPoolExecutor(2) as pool:
        places = made.dataset.places(positions)
        return made.submit(pool, 3, places, pageable(made.arena_bytes(len(places))) if arena is None else arena).result()


def test_streams_hold_what_the_samples_have(shards: Path) -> None:
    micro = build(builder(shards, training=False), range(16))
    streams, batch = micro.batch.streams, micro.batch
    assert list(streams) == ["image", "video", "audio", "series"]
    assert {name: s.rows_S.tolist() for name, s in streams.items()} == {
        "image": [3, 5, 11, 13],
        "video": [1, 5, 9, 13],
        "audio": [0, 5, 8, 13],
        "series": [5, 6, 13, 14],
    }
    assert streams["image"].grids_S3.tolist() == [[1, 4, 4]] * 4  # a square of 40 pixels within 20 patches of 4; 16 pixels
    assert streams["audio"].grids_S3.tolist() == [[2, 2, 1], [4, 2, 1], [2, 2, 1], [4, 2, 1]]
    assert streams["video"].grids_S3[:, 0].tolist() == [2, 2, 2, 2]
    for s in streams.values():
        assert s.cu_seqlens_S1.diff().tolist() == s.grids_S3.prod(1).tolist()
        assert len(s.values_TC) == len(s.coordinates_T3) == len(s.mask_T) == s.cu_seqlens_S1[-1]
    assert streams["series"].values_TC.flatten().tolist() == [*range(8), *range(12), *range(8), *range(12)]
    assert batch.pixels_NCHW.shape[0] == 0
    assert batch.perception_rows_N.tolist() == [0, 1, 3, 5, 6, 8, 9, 11, 13, 14]


def test_parts_that_do_not_decode_are_rows_of_weight_0_by_name(shards: Path) -> None:
    micro = build(builder(shards), range(16))
    assert [(position, key) for position, key, _ in micro.quarantined] == [(4, "s4"), (7, "s7"), (12, "s12"), (15, "s15")]
    assert all(error.startswith("undecodable: the ") for _, _, error in micro.quarantined)
    assert micro.batch.weights_M.tolist() == [0.0 if i % 8 in (4, 7) else 1.0 for i in range(16)]


def test_a_sample_is_the_same_in_every_batch(shards: Path) -> None:
    made = builder(shards, data={"keep": {"image": 0.5, "audio": 0.6, "series": 0.5}})
    whole = build(made, range(16)).batch
    for first in range(0, 16, 3):
        part = build(made, range(first, min(16, first + 3))).batch
        for name, s in part.streams.items():
            other = whole.streams[name]
            mine = (other.rows_S >= first) & (other.rows_S < first + 3)
            tokens = mine.repeat_interleave(other.cu_seqlens_S1.diff().long())
            assert torch.equal(s.rows_S + first, other.rows_S[mine])
            for field in ("values_TC", "coordinates_T3", "mask_T"):
                assert torch.equal(getattr(s, field), getattr(other, field)[tokens]), (name, field)


def test_patches_are_decoded_into_the_arena_and_survive_packing(shards: Path) -> None:
    made = builder(shards, data={"keep": {"audio": 0.5}})
    arena = pageable(made.arena_bytes(16))
    batch = build(made, range(16), arena).batch
    begin, end = arena.ctypes.data, arena.ctypes.data + made.decoded_bytes(16)
    assert all(begin <= s.values_TC.data_ptr() < end for s in batch.streams.values())
    expected = build(made, range(16)).batch
    assert_equal(batch, expected)
    block = torch.from_numpy(arena)
    assert_equal(unpack(pack(batch, block, made.decoded_bytes(16)), block), expected)


def test_augmentation_changes_pictures_and_clips_not_sound(shards: Path) -> None:
    plain, changed = (build(builder(shards, data={"augment": {"brightness": b, "shift": 0, "flip": 0, "scale": 0}}), range(16)).batch for b in (0, 0.5))
    for name, differs in {"image": True, "video": True, "audio": False, "series": False}.items():
        assert torch.equal(plain.streams[name].values_TC, changed.streams[name].values_TC) != differs, name


def test_no_image_is_no_perception(shards: Path) -> None:
    batch = build(builder(shards, data={"image": False}), range(16)).batch
    assert batch.streams == {}
    assert not len(batch.perception_rows_N)


def test_kept_patches_are_some_of_all_in_order_and_masks_are_among_them(shards: Path) -> None:
    objectives = {"masked_image": {"fraction": 1.0, "mask": 0.5}}
    kept = build(builder(shards, data={"keep": {"audio": 0.5}}, objectives=objectives), range(16)).batch.streams["audio"]
    whole = build(builder(shards, objectives=objectives), range(16)).batch.streams["audio"]
    assert kept.cu_seqlens_S1.diff().tolist() == [2, 4, 2, 4]
    assert torch.equal(kept.grids_S3, whole.grids_S3)
    assert kept.mask_T.sum() == 6
    at = (whole.coordinates_T3[:, 0] * 2 + whole.coordinates_T3[:, 1]).split(whole.cu_seqlens_S1.diff().tolist())
    mine = (kept.coordinates_T3[:, 0] * 2 + kept.coordinates_T3[:, 1]).split([2, 4, 2, 4])
    values = whole.values_TC.split(whole.cu_seqlens_S1.diff().tolist())
    for places, chosen, all_of, got in zip(at, mine, values, kept.values_TC.split([2, 4, 2, 4]), strict=True):
        assert chosen.tolist() == sorted(chosen.tolist())
        assert set(chosen.tolist()) < set(places.tolist())
        assert torch.equal(got, all_of[chosen])


def test_the_part_kept_of_square_images_follows_the_step_and_resumes(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards")
    schedule = {"keep": {"image": {0: 0.25, 2: 0.5, 3: 1.0}}}
    made = collator(tmp_path, shards, data=schedule, train={"seed": 3, "global_batch": 4})

    def steps(first: int):
        dataset = ShardDataset(shards, seed=1, image_size=SIZE)
        with StepLoader(dataset, made, global_batch=4, micro_batch=4, rank=0, size=1, samples_seen=4 * first, steps=5) as loader:
            return [step.micro[0] for step in loader]

    found = steps(0)
    assert [None if b.kept_NK is None else b.kept_NK.shape[1] for b in found] == [4, 4, 8, None, None]
    assert [b.patch_mask_NP.shape[1] for b in found] == [4, 4, 8, 16, 16]
    assert all((b.kept_NK.diff(dim=1) > 0).all() for b in found[:3])
    for one, other in zip(found[2:], steps(2), strict=True):
        assert_equal(one, other)
    assert_equal(collator(tmp_path, shards, training=False, data=schedule)([]), collator(tmp_path, shards, training=False)([]))


def test_keep_is_checked() -> None:
    assert keep_schedules({"image": 0.5, "audio": {10: 0.5}}, {"image", "audio"}, 4) == {"image": ((0, 0.5),), "audio": ((0, 1.0), (40, 0.5))}
    assert keep_schedules({"image": {"0": 0.5}}, {"image"}, 4) == {"image": ((0, 0.5),)}  # as a checkpoint's run.json holds it
    for keep, message in (
        ({"sound": 0.5}, r"`data\.keep\.sound` names no modality of the model; it has audio, image"),
        ({"image": 0.0}, r"`data\.keep\.image` must be above 0 and at most 1"),
        ({"image": {-1: 0.5}}, r"`data\.keep\.image`: a step must be a whole number from 0 on; got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            keep_schedules(keep, {"image", "audio"}, 4)
