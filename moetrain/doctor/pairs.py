"""From each rank to each other: how fast, and which pair is slow.

Up to 16 ranks: every ordered pair, one at a time. With more, each rank and those of its groups that are 1, 2, 4, ...
places further (round the group), as many disjoint pairs at a time as there are.
"""

import time
from collections.abc import Iterable
from statistics import median, median_high
from typing import Any

import torch
import torch.distributed as dist

from moetrain import comm, where
from moetrain.doctor.findings import Finding, bad, ok, size
from moetrain.doctor.groups import Kind
from moetrain.world import World

ALL = 16
Pair = tuple[int, int]
"""From, to."""


def rule(world: int) -> str:
    if world <= ALL:
        return "every pair, one at a time"
    return "each rank and those 1, 2, 4, ... places further in its groups, disjoint pairs at a time"


def chosen(kinds: list[Kind], *, world: int) -> list[list[Pair]]:
    """Pairs by turns, in which each rank has at most one other; the same on every rank."""
    if world <= ALL:
        return [[(a, b)] for a in range(world) for b in range(world) if a != b]
    found: dict[Pair, None] = {}
    for kind in kinds:
        for ranks in kind.groups:
            n, step = len(ranks), 1
            while step < n:
                found |= {(ranks[i], ranks[(i + step) % n]): None for i in range(n)}
                step *= 2
    turns: list[tuple[set[int], list[Pair]]] = []
    for pair in found:
        turn = next((t for t in turns if not t[0] & set(pair)), None)
        if turn is None:
            turns.append(turn := (set(), []))
        turn[0].update(pair)
        turn[1].append(pair)
    return [pairs for _, pairs in turns]


def measure(turns: list[list[Pair]], world: World, *, bytes: int, rounds: int) -> dict[Pair, float]:
    """Bytes/s from this rank to others, each the median of ``rounds``. Collective."""
    device = world.device if world.backend == "nccl" else torch.device("cpu")
    payload, answer = torch.empty(max(1, bytes // 4), device=device), torch.empty(1, device=device)
    found = {}
    for turn in turns:
        comm.barrier(world.host_group)
        for pair in turn:
            if world.rank in pair:
                seconds = [_send(pair, world.rank, payload, answer) for _ in range(rounds + 1)]
                if world.rank == pair[0]:
                    found[pair] = payload.nbytes / median(seconds[1:])  # the first makes the connection
    return found


def _send(pair: Pair, me: int, payload: torch.Tensor, answer: torch.Tensor) -> float:
    """Seconds until the other has it all, and has said so."""
    source, target = pair
    since = time.perf_counter()
    with where.inside(f"transfer from rank {source} to rank {target}"):
        if me == source:
            dist.send(payload, target)
            dist.recv(answer, target)
        else:
            dist.recv(payload, source)
            dist.send(answer, source)
        answer.item()  # on a GPU both are only queued so far
    return time.perf_counter() - since


def judged(rates: dict[Pair, float], hosts: list[str], *, slow: float) -> list[Finding]:
    """One finding for pairs within nodes, one for those across; slow is ``slow`` times below the median of them."""
    found = []
    within = {pair: rate for pair, rate in rates.items() if hosts[pair[0]] == hosts[pair[1]]}
    across = {pair: rate for pair, rate in rates.items() if pair not in within}
    for what, of in (("pairs within a node", within), ("pairs across nodes", across)):
        if not of:
            continue
        usual, slowest = median_high(of.values()), min(of, key=of.__getitem__)
        words = f"{len(of)}, {size(usual)}/s (median); slowest {_arrow(slowest, hosts)} {size(of[slowest])}/s"
        late = {pair: rate for pair, rate in sorted(of.items(), key=lambda x: x[1]) if rate * slow < usual}
        data = {
            "bytes_per_second": [[*pair, rate] for pair, rate in of.items()], "slow": list(late),
        }  # fmt: skip
        if not late:
            found.append(ok(what, words, data))
            continue
        named = ", ".join(f"{_arrow(pair, hosts)} {size(rate)}/s" for pair, rate in list(late.items())[:8])
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        found.append(bad(what, f"slow: {named}{more}; the median of {len(of)} is {size(usual)}/s{_common(late)}", data))
    return found


def _arrow(pair: Pair, hosts: list[str]) -> str:
    a, b = pair
    names = "" if hosts[a] == hosts[b] else f" ({hosts[a]} to {hosts[b]})"
    return f"rank {a} to {b}{names}"


def _common(pairs: Iterable[Pair]) -> str:
    """The rank that all of several slow pairs share."""
    pairs = list(pairs)
    shared: set[Any] = set.intersection(*map(set, pairs))
    return f"; all of them with rank {shared.pop()}" if len(shared) == 1 else ""
