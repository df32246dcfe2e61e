"""Who computes which whole matrix, and which pieces of it travel: plain arithmetic, the same on every rank.

A parameter is seen in four dimensions (E, L, R, C): E units of L matrices R x C, each unit computed on one rank. An
expert is a unit (its gate and up are L = 2), an attention weight the only one of its parameter. A piece is the box of a
unit that some ranks hold. The rank that computes a unit is one that holds a piece of it, the one with the fewest flops
so far; units that few ranks hold are dealt first, large ones before small ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

Unit = tuple[int, int]
"""(number of the parameter, index in its dimension E)."""

Piece = tuple[int, int, tuple[int, int, int], tuple[int, int, int]]
"""A unit, then offsets and sizes in (L, R, C)."""


@dataclass(frozen=True)
class Trip:
    """One all-to-all from one rank's side: pieces in the order of the ranks they go to and come from, elements each."""

    out: tuple[Piece, ...]
    out_counts: list[int]
    into: tuple[Piece, ...]
    into_counts: list[int]


@dataclass(frozen=True)
class Batch:
    """Units whose matrices are computed between one pair of all-to-alls. ``mine``: (L, R, C) -> those of this rank."""

    there: Trip
    back: Trip
    mine: dict[tuple[int, int, int], tuple[Unit, ...]]
    travels: bool  # whether any piece of any rank goes to another


def batches(
    held: list[list[Piece]], shapes: list[tuple[int, int, int, int]], *, rank: int, steps: int, at_once: int
) -> list[Batch]:
    """What each rank holds -> the work of ``rank``; of at most ``at_once`` elements a rank (on average) at a time."""
    holders: dict[Unit, dict[Piece, list[int]]] = {}
    for peer, pieces in enumerate(held):
        for piece in pieces:
            holders.setdefault(piece[:2], {}).setdefault(piece, []).append(peer)
    for unit, pieces in holders.items():
        if sum(prod(sizes) for *_, sizes in pieces) != prod(shapes[unit[0]][1:]):
            raise RuntimeError(f"the ranks' boxes of parameter {unit[0]}, part {unit[1]}, do not tile it")
    return [
        _batch(units, holders, shapes, ranks=len(held), rank=rank, steps=steps)
        for units in _runs(sorted(holders), shapes, at_once * len(held))
    ]


def flops(shape: tuple[int, ...], *, steps: int) -> int:
    """Of Newton-Schulz on L matrices."""
    L, (small, large) = shape[0], sorted(shape[1:])
    return L * steps * (4 * small * small * large + 2 * small**3)


def deal(
    units: list[Unit],
    holders: dict[Unit, dict[Piece, list[int]]],
    shapes: list[tuple[int, int, int, int]],
    *,
    ranks: int,
    steps: int,
) -> dict[Unit, int]:
    """Unit -> the rank that computes it."""
    able = {unit: sorted({peer for peers in holders[unit].values() for peer in peers}) for unit in units}
    cost = {unit: flops(shapes[unit[0]][1:], steps=steps) for unit in units}
    load, found = [0] * ranks, {}
    for unit in sorted(units, key=lambda u: (len(able[u]), -cost[u], u)):
        found[unit] = min(able[unit], key=lambda peer: (load[peer], peer))
        load[found[unit]] += cost[unit]
    return found


def _runs(units: list[Unit], shapes: list[tuple[int, int, int, int]], limit: int) -> Iterator[list[Unit]]:
    some, numel = [], 0
    for unit in units:
        size = prod(shapes[unit[0]][1:])
        if some and numel + size > limit:
            yield some
            some, numel = [], 0
        some.append(unit)
        numel += size
    if some:
        yield some


def _batch(
    units: list[Unit],
    holders: dict[Unit, dict[Piece, list[int]]],
    shapes: list[tuple[int, int, int, int]],
    *,
    ranks: int,
    rank: int,
    steps: int,
) -> Batch:
    worker = deal(units, holders, shapes, ranks=ranks, steps=steps)
    sent = [0] * ranks
    there: dict[tuple[int, int], list[Piece]] = {}
    back: dict[tuple[int, int], list[Piece]] = {}
    for unit in units:
        at = worker[unit]
        for piece, peers in sorted(holders[unit].items()):
            source = at if at in peers else min(peers, key=lambda peer: (sent[peer], peer))
            sent[source] += prod(piece[3]) if source != at else 0
            there.setdefault((source, at), []).append(piece)
            for peer in peers:
                back.setdefault((at, peer), []).append(piece)
    mine: dict[tuple[int, int, int], list[Unit]] = {}
    for unit in units:
        if worker[unit] == rank:
            mine.setdefault(shapes[unit[0]][1:], []).append(unit)
    return Batch(
        _trip(there, rank, ranks), _trip(back, rank, ranks), {shape: tuple(us) for shape, us in mine.items()},
        travels=any(source != target for source, target in (*there, *back)),
    )  # fmt: skip


def _trip(pieces: dict[tuple[int, int], list[Piece]], rank: int, ranks: int) -> Trip:
    out, into = ([pieces.get(pair, []) for pair in pairs] for pairs in (
        [(rank, peer) for peer in range(ranks)], [(peer, rank) for peer in range(ranks)]
    ))  # fmt: skip
    count = lambda runs: [sum(prod(sizes) for *_, sizes in run) for run in runs]  # noqa: E731
    flat = lambda runs: tuple(piece for run in runs for piece in run)  # noqa: E731
    return Trip(flat(out), count(out), flat(into), count(into))
