"""The collectives of a layout's groups: whether what arrives is what was sent, and how fast it does."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.doctor.findings import Finding, bad, ok, size
from moetrain.layouts import Layout, kinds, slices, views
from moetrain.mesh import Mesh

OPERATIONS = "all-to-all", "all-gather", "reduce-scatter"


@dataclass(frozen=True)
class Kind:
    """Groups of one size that tile the ranks, under every name that the layout has for them."""

    names: tuple[str, ...]
    view: str
    axes: tuple[str, ...]
    groups: list[tuple[int, ...]]

    def __str__(self) -> str:
        return " = ".join(self.names)


def of_layout(layout: Layout) -> list[Kind]:
    """Every kind with more than one rank, and that of all ranks."""
    found: dict[tuple[tuple[int, ...], ...], Kind] = {}
    every = {"all ranks": ("dense", *views(layout)["dense"]), **kinds(layout)}
    for name, (view, *axes) in every.items():
        groups = slices(views(layout)[view], tuple(axes))
        if len(groups[0]) > 1:
            before = found.get(tuple(groups))
            names = (*before.names, name) if before else (name,)
            found[tuple(groups)] = Kind(names, view, tuple(axes), groups)
    return list(found.values())


def measure(kind: Kind, mesh: Mesh, *, bytes: list[int], rounds: int, device: torch.device) -> dict[str, Any]:
    """On every rank, of its group: operation -> what was ``wrong``, or nothing, and bytes -> bytes/s. Collective.

    A rate is of what a rank sends, (n - 1)/n of its buffer (of n ranks), by the median of the rounds.
    """
    group = mesh.group(kind.view, *kind.axes)
    assert group is not None
    found: dict[str, Any] = {}
    for operation in OPERATIONS:
        rates, wrong = {}, _uneven(group, device) if operation == "all-to-all" else None
        for n in bytes:
            run, check = _prepared(operation, n, group, device)
            got = run()  # makes connections
            wrong = wrong or check(got)
            seconds = []
            for _ in range(rounds):
                comm.barrier(group)
                _settle(device)
                since = time.perf_counter()
                got = run()
                _settle(device)
                seconds.append(time.perf_counter() - since)
            wrong = wrong or check(got)
            rates[str(n)] = n * (group.size() - 1) / group.size() / median(seconds)
        found[operation] = {"wrong": wrong, "rates": rates}
    return found


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_Prepared = tuple[Callable[[], Tensor], Callable[[Tensor], str | None]]


def _prepared(operation: str, bytes: int, group: ProcessGroup, device: torch.device) -> _Prepared:
    """(the operation on a buffer of about so many bytes, what is wrong with its result).

    Each number says where it comes from, and where in the buffer it lies; float32 holds them exactly.
    """
    n, me = group.size(), group.rank()
    each = max(1, bytes // 4 // n)
    at = torch.arange(each, dtype=torch.float32, device=device) % 251

    def known(source: int, target: int) -> Tensor:
        return (source * 31 + target * 7) % 1021 * 1.0 + at

    if operation == "all-to-all":
        x = torch.stack([known(me, r) for r in range(n)])
        want = torch.stack([known(r, me) for r in range(n)])
        return (lambda: comm.all_to_all(x, recv=None, send=None, group=group)), _compared(want)
    if operation == "all-gather":
        x, want, out = known(me, 0), torch.cat([known(r, 0) for r in range(n)]), at.new_empty(n * each)

        def gather() -> Tensor:
            comm.all_gather_into(out, x, group=group)
            return out

        return gather, _compared(want)
    x, out = torch.cat([known(me, r) for r in range(n)]), torch.empty_like(at)
    want = at * n + sum((r * 31 + me * 7) % 1021 for r in range(n))

    def scatter() -> Tensor:
        comm.reduce_scatter_into(out, x, group=group)
        return out

    return scatter, _compared(want)


def _compared(want: Tensor) -> Callable[[Tensor], str | None]:
    def check(got: Tensor) -> str | None:
        odd = got != want
        if not odd.any():
            return None
        first = int(odd.flatten().nonzero()[0])
        a, b = got.flatten()[first].item(), want.flatten()[first].item()
        return f"{int(odd.sum())} of {odd.numel()} numbers, the first at {first}: {a} in place of {b}"

    return check


def _uneven(group: ProcessGroup, device: torch.device) -> str | None:
    """Rows as a dropless dispatch sends them, none to some ranks."""
    n, me = group.size(), group.rank()

    def rows(source: int, target: int) -> int:
        return (source + 2 * target) % 3

    send, recv = [rows(me, r) for r in range(n)], [rows(r, me) for r in range(n)]
    x = torch.tensor([me] * sum(send), dtype=torch.float32, device=device)[:, None].expand(-1, 8)
    want = torch.tensor([r for r in range(n) for _ in range(recv[r])], dtype=torch.float32, device=device)
    got = comm.all_to_all(x, recv=recv, send=send, group=group)
    return _compared(want[:, None].expand(-1, 8))(got)


def judged(kind: Kind, of_ranks: list[dict[str, Any]], hosts: list[str]) -> list[Finding]:
    """One finding an operation, from what ``measure`` returned on each rank."""
    within = [len({hosts[r] for r in ranks}) == 1 for ranks in kind.groups]
    place = "within a node" if all(within) else "across nodes" if not any(within) else "some across nodes"
    found = []
    for operation in OPERATIONS:
        what = f"{operation}, {kind}"
        of = [of_rank[operation] for of_rank in of_ranks]
        rates: dict[str, list[float]] = {
            n: [min(of[r]["rates"][n] for r in ranks) for ranks in kind.groups] for n in of[0]["rates"]
        }
        data = {"operation": operation, "names": kind.names, "groups": kind.groups, "within": within, "rates": rates}
        wrong = {r: it["wrong"] for r, it in enumerate(of) if it["wrong"]}
        if wrong:
            rank, words = next(iter(wrong.items()))
            more = f", and {len(wrong) - 1} more ranks" if len(wrong) > 1 else ""
            found.append(bad(what, f"wrong on rank {rank} ({hosts[rank]}): {words}{more}", data | {"wrong": wrong}))
            continue
        words = ", ".join(f"{size(median(of))}/s at {size(int(n))}" for n, of in rates.items())
        largest = list(rates.values())[-1]
        slowest = min(range(len(largest)), key=largest.__getitem__)
        if len(largest) > 1:
            ranks = " ".join(map(str, kind.groups[slowest]))
            words += f"; slowest of {len(largest)} groups {size(largest[slowest])}/s (ranks {ranks})"
        found.append(ok(what, f"{len(kind.groups[0])} ranks {place}, {words}", data))
    return found
