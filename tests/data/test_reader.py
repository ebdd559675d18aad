import gc
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mmscale.data.decode import decode_image
from mmscale.data.reader import ImageBatches
from shards.errors import ConfigError, IntegrityError, ShardError
from shards.read import ShardReader
from tests.data.tiny import SIZE, caption, image_bytes, mixed, paired, write

REPO = Path(__file__).resolve().parents[2]
ROWS = 31


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reader") / "d")


def batches_of(folder, **options):
    return ImageBatches(folder, **{"batch_size": 4, "image_size": SIZE, "seed": 3} | options)


def keys_of(batches):
    return [key for batch in batches for key in batch.keys]


def test_an_epoch_has_every_image_once(folder):
    batches = batches_of(folder)
    assert len(batches) == 8
    found = list(batches)
    assert [len(batch.images) for batch in found] == [4] * 7 + [3]
    assert [batch.samples_seen for batch in found] == [4, 8, 12, 16, 20, 24, 28, 31]
    for batch in found:
        assert not batch.errors
        for image, sample in zip(batch.images, batch.samples, strict=True):
            index = int(sample.key[1:])
            assert np.array_equal(image, decode_image("jpg", image_bytes(index), SIZE))
            assert sample.captions() == [caption(index)]
            assert (sample.fields()["number"], set(sample.parts)) == (index, {"txt", "json"})
    assert sorted(keys_of(found)) == sorted(f"s{i}" for i in range(ROWS))
    assert np.array_equal(np.concatenate([batch.positions for batch in found]), np.arange(ROWS))


def test_iterating_again_reads_the_next_epoch(folder):
    batches = batches_of(folder)
    first, second = keys_of(batches), keys_of(batches)
    assert sorted(first) == sorted(second)
    assert first != second
    assert batches.samples_seen == 2 * ROWS
    in_order = batches_of(folder, shuffle=False)
    assert keys_of(in_order) == keys_of(in_order) == [f"s{i}" for i in range(ROWS)]


@pytest.mark.parametrize("options", [{"threads": 1, "prefetch": 1}, {"threads": 3}, {"threads": 8, "prefetch": 5}])
def test_threads_change_nothing(folder, options):
    for one, other in itertools.zip_longest(batches_of(folder), batches_of(folder, **options)):
        assert one.keys == other.keys
        assert np.array_equal(one.images, other.images)


def test_batches_may_be_kept(folder):
    kept = list(batches_of(folder, prefetch=1))
    for batch in kept:
        for image, key in zip(batch.images, batch.keys, strict=True):
            assert np.array_equal(image, decode_image("jpg", image_bytes(int(key[1:])), SIZE))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_ranks_share_the_epoch(folder, size):
    ranks = [list(batches_of(folder, rank=rank, size=size)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert [b.samples_seen for b in ranks[0]] == [b.samples_seen for b in ranks[-1]]
    assert sorted(p for batches in ranks for b in batches for p in b.positions) == list(range(ROWS))
    whole = keys_of(batches_of(folder, batch_size=4 * size))
    assert [key for step in zip(*ranks, strict=True) for batch in step for key in batch.keys] == whole


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resume_goes_on_with_any_ranks_and_batch_size(folder, stop):
    batches = batches_of(folder)
    seen = keys_of(itertools.islice(batches, stop))
    state = batches.state_dict()
    assert state["samples_seen"] == 4 * stop
    for size, batch_size in ((1, 4), (1, 7), (3, 2)):
        rest = []
        for rank in range(size):
            again = batches_of(folder, rank=rank, size=size, batch_size=batch_size)
            again.load_state_dict(state)
            rest += keys_of(again)
        assert sorted(seen + rest) == sorted(f"s{i}" for i in range(ROWS))


def test_another_order_is_refused(folder):
    state = batches_of(folder).state_dict()
    for options in ({"seed": 4}, {"shuffle": False}):
        with pytest.raises(ConfigError, match="saved state belongs to another order .* the data set, `seed` or `shuffle` differs"):
            batches_of(folder, **options).load_state_dict(state)


def test_bad_images_are_black_and_named(tmp_path):
    folder = write(tmp_path / "d", mixed)
    found = {key: (batch, row) for batch in batches_of(folder) for row, key in enumerate(batch.keys)}
    assert len(found) == ROWS
    for index in range(ROWS):
        batch, row = found[f"s{index}"]
        if index % 6 == 1:
            assert batch.errors[row] == "no_image: the sample has no image part"
        elif index % 6 == 3:
            assert batch.errors[row].startswith("undecodable: the image does not decode")
        else:
            assert row not in batch.errors
            assert batch.images[row].any()
            continue
        assert not batch.images[row].any()


def test_wrong_bytes_end_the_epoch_by_name_and_leave_no_thread(tmp_path):
    folder = write(tmp_path / "d")
    tar = folder / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[ShardReader(folder).index(1)["parts"][2][0]["offset"].as_py() + 5] ^= 1
    tar.chmod(0o644)
    tar.write_bytes(data)
    threads = threading.active_count()
    with pytest.raises(IntegrityError, match=r"00001\.tar:s13"):
        list(batches_of(folder))
    assert threading.active_count() <= threads


def test_leaving_early_leaves_no_thread_and_goes_on(folder):
    threads = threading.active_count()
    batches = batches_of(folder)
    first = next(iter(batches))
    gc.collect()
    assert threading.active_count() <= threads
    assert sorted(first.keys + keys_of(batches)) == sorted(f"s{i}" for i in range(ROWS))


def test_statistics_count_what_was_read(folder):
    batches = batches_of(folder)
    assert batches.statistics().samples == 0
    list(batches)
    found = batches.statistics()
    assert found.samples == ROWS
    assert found.bytes == sum(len(part) for index in range(ROWS) for part in paired(index).values())
    assert found.read_ms > 0
    assert found.decode_ms > 0
    assert found.wait_s >= 0
    assert found.ready == 0


def test_memory_is_used_again(folder):
    addresses = {batch.images.__array_interface__["data"][0] for _ in range(6) for batch in batches_of(folder, prefetch=1)}
    assert len(addresses) < 48


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"threads": 0}, "`threads` must be at least 1; got 0"),
        ({"rank": 2, "size": 2}, r"`rank` must be in \[0, 2\) for 2 ranks; got 2"),
        ({"short_side": SIZE - 1}, f"`short_side` must be at least `image_size` = {SIZE}; got {SIZE - 1}"),
        ({"samples_seen": -1}, "`samples_seen` must be at least 0; got -1"),
    ],
)
def test_what_does_not_fit_is_said(folder, options, text):
    with pytest.raises(ConfigError, match=text):
        batches_of(folder, **options)
    with pytest.raises(ShardError, match="There is no data set folder"):
        ImageBatches(folder / "nowhere")


def test_it_needs_no_torch(folder):
    code = f"import sys; from mmscale.data.reader import ImageBatches as I; print(len(list(I({str(folder)!r}))), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


@pytest.mark.gpu
def test_pinned_batches_are_the_same(folder):
    for pinned, plain in zip(batches_of(folder, pin=True), batches_of(folder), strict=True):
        tensor = torch.from_numpy(pinned.images)
        assert tensor.is_pinned()
        assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), torch.from_numpy(plain.images))


@pytest.mark.parametrize("number", range(3))
def test_the_examples_of_the_page_run(tmp_path, number):
    example = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "reader.md").read_text(), re.DOTALL)[number]
    write(tmp_path / "laion")
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
