import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec

import psutil
import pytest
import torch

from mmscale.data.arena import ArenaPool
from mmscale.data.build import Builder
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader, evaluation_batches
from mmscale.data.starting import StartingFeed
from mmscale.data.workers import WorkerFeed, _preload
from mmscale.errors import RunError
from shards.errors import ConfigError, IntegrityError
from tests.data.tiny import SIZE, assert_equal, collator, image_bytes, mixed, write

B, M, STEPS = 12, 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("loader") / "d", mixed)


def loader(folder, *, seen=0, rank=0, size=1, micro=M, steps=STEPS, **options):
    dataset = ShardDataset(folder, seed=1, image_size=SIZE)
    options = {"workers": 0, "threads": 1, "prefetch": 2} | options
    made = collator(folder.parent, folder)
    return StepLoader(dataset, made, global_batch=B, micro_batch=micro, rank=rank, size=size, samples_seen=seen, steps=steps, **options)


def steps_of(folder, **options):
    """All steps; after the first, the workers are waited for, so that threads build the first batches and workers the others."""
    steps = []
    with loader(folder, **options) as opened:
        for step in opened:
            steps.append(step)
            if isinstance(opened.feed, StartingFeed):
                assert opened.feed.workers.pids
    return steps


def workers_alive():
    return [p for p in psutil.Process().children(recursive=True) if "forkserver" in " ".join(p.cmdline()) and p.parent().pid != os.getpid()]


def assert_same_steps(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.step, a.samples_seen_after, a.keys, a.positions, a.quarantined) == (
            b.step,
            b.samples_seen_after,
            b.keys,
            b.positions,
            b.quarantined,
        )
        for x, y in zip(a.micro, b.micro, strict=True):
            assert_equal(x, y)


@pytest.mark.parametrize(("workers", "threads", "prefetch"), [(0, 4, 1), (0, 2, 7), (1, 1, 2), (2, 1, 3), (2, 4, 1)])
def test_workers_and_threads_change_nothing(folder, workers, threads, prefetch):
    assert_same_steps(steps_of(folder), steps_of(folder, workers=workers, threads=threads, prefetch=prefetch))


def test_every_position_once_and_in_order(folder):
    steps = steps_of(folder)
    assert [s.step for s in steps] == list(range(STEPS))
    assert [s.samples_seen_after for s in steps] == [B * (i + 1) for i in range(STEPS)]
    assert [p for s in steps for p in s.positions] == list(range(B * STEPS))
    keys = [k for s in steps for k in s.keys]
    assert sorted(keys[:31]) == sorted(keys[31:62]) == sorted(f"s{i}" for i in range(31))
    assert all(s.wait_s >= 0 and s.micro is s.host for s in steps)


@pytest.mark.parametrize(("size", "micro", "workers"), [(1, 12, 0), (1, 4, 0), (2, 3, 0), (2, 6, 0), (3, 2, 0), (3, 4, 0), (3, 2, 2)])
def test_ranks_share_the_same_global_batches(folder, size, micro, workers):
    whole = steps_of(folder, micro=12)
    ranks = [steps_of(folder, rank=r, size=size, micro=micro, workers=workers) for r in range(size)]
    for i, step in enumerate(whole):
        parts = [batch for a in range(B // (size * micro)) for rank in ranks for batch in [rank[i].micro[a]]]
        assert [p for b in parts for p in b.positions_M.tolist()] == step.positions
        assert [k for b in parts for k in b.keys] == step.keys
        assert torch.equal(torch.cat([b.pixels_NCHW for b in parts]), step.micro[0].pixels_NCHW)
        assert torch.equal(torch.cat([b.text.ids_T for b in parts]), step.micro[0].text.ids_T)
        assert torch.equal(torch.cat([b.gumbel_MG for b in parts]), step.micro[0].gumbel_MG)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_exactly(folder, workers):
    whole = steps_of(folder)
    for done in (1, 3, 5) if workers == 0 else (3,):
        assert_same_steps(steps_of(folder, seen=done * B, workers=workers), whole[done:])
    assert steps_of(folder, seen=STEPS * B, workers=workers) == []


def test_resume_after_samples_of_another_batch_size_starts_at_the_next_position(folder):
    steps = steps_of(folder, seen=2 * B + 5)
    assert [p for s in steps for p in s.positions] == list(range(2 * B + 5, 2 * B + 5 + 4 * B))
    assert [s.step for s in steps] == [2, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_does_not_decode_is_a_row_of_weight_0(folder, workers):
    steps = steps_of(folder, workers=workers)
    reported = [q for s in steps for q in s.quarantined]
    weights = {p: w for s in steps for b in s.micro for p, w in zip(b.positions_M.tolist(), b.weights_M.tolist(), strict=True)}
    keys = {p: k for s in steps for p, k in zip(s.positions, s.keys, strict=True)}
    bad = sorted(p for p, w in weights.items() if w == 0)
    assert [p for p, _, _ in reported] == bad
    assert [k for _, k, _ in reported] == [keys[p] for p in bad]
    assert {k for k in keys.values() if int(k[1:]) % 6 == 3} == {k for _, k, _ in reported}
    assert all("undecodable" in error for _, _, error in reported)


def test_batches_may_be_kept(folder):
    """Memory is used again only when nobody holds it: every batch still is what a fresh loader gives."""
    for workers in (0, 1):
        kept = steps_of(folder, workers=workers, prefetch=1)
        assert_same_steps(kept, steps_of(folder, prefetch=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_used_again(folder, workers):
    with loader(folder, workers=workers, steps=40) as opened:
        for _ in opened:
            pools = [opened.feed._arenas] if workers == 0 else [w.arenas for w in opened.feed.workers._workers]
        assert sum(map(len, pools)) <= 12 * max(1, workers)


def test_an_arena_comes_back_when_its_last_tensor_dies():
    pool = ArenaPool(64)
    tensor = torch.from_numpy(pool.lend(pool.take()))
    part = tensor[8:16].view(torch.int64)
    del tensor
    assert pool.take() == 1
    del part
    assert pool.take() == 0


def test_an_arena_comes_back_when_its_last_array_dies():
    pool = ArenaPool(64)
    array = pool.lend(pool.take())
    part = array.reshape(8, 8)[2:4][:, 1]
    del array
    assert pool.take() == 1
    del part
    assert pool.take() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_no_thread_and_no_worker(folder, workers):
    threads = threading.active_count()
    descriptors = psutil.Process().num_fds()
    for _ in range(2):
        with loader(folder, workers=workers, threads=2, prefetch=4) as opened:
            next(iter(opened))
        assert threading.active_count() == threads
        assert not workers_alive()
    assert psutil.Process().num_fds() <= descriptors + 3  # the fork server's and the resource tracker's


def test_breaking_out_of_the_loop_ends_it_too(folder):
    threads = threading.active_count()
    for _ in loader(folder, threads=2):
        break
    assert threading.active_count() == threads


def test_a_killed_worker_is_an_error_and_no_hang(folder):
    begin = time.monotonic()
    with loader(folder, workers=2, steps=10_000, prefetch=1) as opened:
        steps = iter(opened)
        next(steps)
        os.kill(opened.feed.workers.pids[1], signal.SIGKILL)
        with pytest.raises(
            RunError, match=r"Loader worker 1 \(pid \d+\) was killed by SIGKILL while it was to read positions \d+ to \d+\."
        ):
            list(steps)
    assert time.monotonic() - begin < 20
    assert not workers_alive()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_keeps_its_type_and_text(tmp_path, workers):
    folder = write(tmp_path / "d")
    tar = folder / "00001.tar"
    content = tar.read_bytes()
    start = content.index(image_bytes(12))
    tar.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    with pytest.raises(IntegrityError, match=r"00001\.tar:s12"):
        steps_of(folder, workers=workers)
    assert not workers_alive()


PARENT = """
if __name__ == "__main__":
    import pickle, sys, time
    from mmscale.data.workers import WorkerFeed, _preload
    builder = pickle.load(open(sys.argv[1], "rb"))
    feed = WorkerFeed(builder, samples=3, workers=2, threads=1)
    for start in range(0, 30, 3):
        feed.submit(builder.dataset.places(range(start, start + 3)))
    feed.take()
    print(*feed.pids, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("way", ["killed", "ends without closing"])
def test_workers_end_with_their_parent(folder, tmp_path, way):
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "builder").write_bytes(pickle.dumps(Builder(ShardDataset(folder, image_size=SIZE), collator(folder.parent, folder))))
    words = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "builder"), "100" if way == "killed" else "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(p) for p in parent.stdout.readline().split()]
        if way == "killed":
            parent.kill()
        assert parent.wait(20) == (-signal.SIGKILL if way == "killed" else 0)
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(p) for p in pids)


def test_a_signal_to_the_whole_group_is_the_parents_to_decide(folder):
    with loader(folder, workers=2, steps=20) as opened:
        seen = 0
        for _ in opened:
            seen += 1
            for pid in opened.feed.workers.pids:
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGINT)
        assert seen == 20


def test_a_batch_that_does_not_divide_is_said(folder):
    with pytest.raises(ConfigError, match=r"`train.global_batch` must divide by micro_batch x ranks = 5 x 2 = 10; got 12"):
        loader(folder, micro=5, size=2)


def test_image_sizes_must_agree(folder):
    with pytest.raises(ConfigError, match="The data set decodes images of size 8 and the batch wants 16"):
        Builder(ShardDataset(folder, image_size=8), collator(folder.parent, folder))


def test_an_error_that_cannot_be_pickled_is_told_by_its_text(folder):
    builder = Builder(ShardDataset(folder, image_size=SIZE), collator(folder.parent, folder))
    builder.dataset = Unpicklable(folder, image_size=SIZE)
    feed = WorkerFeed(builder, samples=M, workers=1, threads=1)
    feed.submit(builder.dataset.places(range(M)))
    with pytest.raises(RunError, match=r"(?s)Loader worker 0 failed:.*the disk is on fire"):
        feed.take()
    feed.close()


class LocalError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class Unpicklable(ShardDataset):
    def fetch(self, place):
        raise LocalError("the disk", "is on fire")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_takes_each_sample_once_and_all_ranks_the_same_number_of_batches(folder, size):
    dataset = ShardDataset(folder, shuffle=False, image_size=SIZE)
    made = collator(folder.parent, folder, training=False)
    numbered = [list(evaluation_batches(dataset, made, samples=20, batch=4, rank=r, size=size, threads=2)) for r in range(size)]
    ranks = [[batch for _, batch, _ in batches] for batches in numbered]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(k for batches in ranks for b in batches for k in b.keys) == sorted(f"s{i}" for i in range(20))
    assert all(len(b.fields) == b.size for batches in ranks for b in batches)
    assert len(list(evaluation_batches(dataset, made, samples=1000, batch=4, rank=0, size=1))) == 8
    rest = evaluation_batches(dataset, made, samples=20, batch=4, rank=0, size=size, skip={0})
    assert [(n, b.keys) for n, b, _ in rest] == [(n, b.keys) for n, b, _ in numbered[0][1:]]


def test_the_fork_server_imports_what_our_own_entry_point_did_but_not_itself(monkeypatch):
    assert _preload() == ["mmscale.data.workers"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("mmscale.data.loader", None))
    assert "mmscale.data.workers" in _preload()
    assert "mmscale.data.loader" not in _preload()


def test_the_first_batches_come_before_the_workers_have_started(folder):
    builder = Builder(ShardDataset(folder, image_size=SIZE), collator(folder.parent, folder))
    feed = StartingFeed(builder, samples=M, workers=2, threads=1)
    feed.submit(builder.dataset.places(range(M)))
    assert list(feed._turns) == [feed._local]
    assert len(feed.workers.pids) == 2
    feed.submit(builder.dataset.places(range(M)))
    assert list(feed._turns) == [feed._local, feed.workers]
    by_threads, by_worker = feed.take(), feed.take()
    assert_equal(by_threads.batch, by_worker.batch)
    feed.close()


class DiesAtStart(ShardDataset):
    def __setstate__(self, state):
        os._exit(3)


def test_a_worker_that_cannot_begin_is_an_error(folder):
    builder = Builder(ShardDataset(folder, image_size=SIZE), collator(folder.parent, folder))
    builder.dataset = DiesAtStart(folder, image_size=SIZE)
    with pytest.raises(RunError, match=r"Loader worker 0 \(pid \d+\) ended with exit code 3 before it could begin"):
        WorkerFeed(builder, samples=M, workers=2, threads=1)
    assert not workers_alive()


def test_statistics_count_what_threads_and_workers_read(folder):
    expected = None
    for workers in (0, 2):
        with loader(folder, workers=workers, steps=8) as opened:
            assert opened.statistics().samples == 0
            for _ in opened:
                if workers:
                    assert opened.feed.workers.pids
            found = opened.statistics()
        assert found.samples == 8 * B
        assert min(found.read_ms, found.decode_ms) > 0
        expected = expected or found.bytes
        assert found.bytes == expected > 0
