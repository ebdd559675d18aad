"""What the ranks measure together, over the process group that a run would have: clocks, all-reduce, exchanges between nodes.

Every rank calls every function here, in the same order. Names: R ranks, N nodes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

CLOCK_ROUNDS = 5
SECONDS = 1.0
"""An all-reduce is repeated for about so long."""
MOST_ROUNDS = 20
ALL_REDUCE_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
EXCHANGE_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
EXCHANGES = 3
GB = 1e9


def clock_offsets(size: int) -> list[float]:
    """How far each rank's clock is ahead of the first's, in seconds.

    Clocks are read when a barrier lets the ranks go; of several rounds the nearest counts, as a rank that was merely late is not off.
    """
    best = torch.full((size,), float("inf"), dtype=torch.float64)
    for _ in range(CLOCK_ROUNDS):
        wait_for_all()
        offsets_R = _gather(time.time(), size)
        offsets_R = offsets_R - offsets_R[0]
        best = torch.where(offsets_R.abs() < best.abs(), offsets_R, best)
    return [float(offset) for offset in best]


def wait_for_all() -> None:
    """A barrier that no device takes part in."""
    dist.all_reduce(torch.zeros(1))


def all_reduce_gb_s(device: torch.device, size: int) -> float:
    """Bus bandwidth of an all-reduce, GB/s: 2 (R - 1) / R bytes a second, as nccl-tests has it, comparable between numbers of ranks."""
    content = torch.ones(ALL_REDUCE_BYTES[device.type] // 4, device=device)
    dist.all_reduce(content)  # connections and buffers are made at the first
    took_s = _all_reduce_s(content, 1, size)
    rounds = max(1, min(MOST_ROUNDS, int(SECONDS / max(took_s, 1e-6))))
    return 2 * (size - 1) / size * content.nbytes / _all_reduce_s(content, rounds, size) / GB


def exchanges_gb_s(device: torch.device, rank: int, nodes: Sequence[Sequence[int]]) -> dict[tuple[int, int], float]:
    """What neighbouring nodes of a ring send each other, all pairs at once, each way, GB/s: a slow link is one of a slow node's pairs.

    Args:
        device: of this rank.
        rank: this rank.
        nodes: ranks of each node. The n-th rank of a node exchanges with the n-th of its neighbour.

    Returns:
        Pair of nodes -> their rate, the sum over their ranks.
    """
    rates: dict[tuple[int, int], float] = {}
    size = sum(len(ranks) for ranks in nodes)
    mine = next(number for number, ranks in enumerate(nodes) if rank in ranks)
    place = list(nodes[mine]).index(rank)
    for pairs in ring_rounds(len(nodes)):
        other = next((b if a == mine else a for a, b in pairs if mine in (a, b)), None)
        rate = 0.0
        if other is not None and place < len(nodes[other]):
            rate = _exchange(device, nodes[other][place])
        rates_R = _gather(rate, size)
        rates |= {(a, b): float(sum(rates_R[r] for r in nodes[a])) for a, b in pairs}
    return rates


def ring_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """The neighbours of a ring, parted so that a node has one at a time. Pure."""
    if nodes < 2:
        return []
    ring = [(number, (number + 1) % nodes) for number in range(nodes if nodes > 2 else 1)]
    rounds = [ring[0 : nodes - 1 : 2], ring[1:nodes:2], ring[nodes - 1 :] if nodes % 2 else []]
    return [pairs for pairs in rounds if pairs]


def slow_nodes(nodes: Sequence[str], exchanges: Mapping[tuple[int, int], float]) -> dict[str, float]:
    """Nodes whose better pair is not half as fast as is usual: with two nodes it cannot be told which one is slow. Pure."""
    if len(nodes) < 3:
        return {}
    best = {node: max(rate for pair, rate in exchanges.items() if number in pair) for number, node in enumerate(nodes)}
    usual = sorted(best.values())[len(best) // 2]
    return {node: rate for node, rate in best.items() if rate < usual / 2}


def _exchange(device: torch.device, peer: int) -> float:
    sent = torch.ones(EXCHANGE_BYTES[device.type] // 4, device=device)
    received = torch.empty_like(sent)
    times = []
    for _ in range(EXCHANGES):
        start = time.perf_counter()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
            work.wait()
        _finish(device)
        times.append(time.perf_counter() - start)
    return sent.nbytes / min(times) / GB


def _all_reduce_s(content: torch.Tensor, rounds: int, size: int) -> float:
    """Seconds of one, the slowest rank's; the same on every rank."""
    _finish(content.device)
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(content, op=dist.ReduceOp.MAX)
    _finish(content.device)
    return float(_gather((time.perf_counter() - start) / rounds, size).max())


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gather(value: float, size: int) -> torch.Tensor:
    """A number of each rank, in CPU memory, on every rank."""
    out = [torch.zeros(1, dtype=torch.float64) for _ in range(size)]
    dist.all_gather(out, torch.tensor([value], dtype=torch.float64))
    return torch.cat(out)
