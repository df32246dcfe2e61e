"""What planning placements costs: operations of fssdp's two plans, counted, and their time on one core.

    python benchmarks/planning.py [--repeats 5]

Operations of a layer's plan: candidates, E + 1 with the hottest experts on every rank (one step each) and those with
a few copies; of these, steps, which place one expert's replicas and look at all R ranks, and holders, (expert, rank)
pairs whose arrivals are counted. Of sharding: experts that are given an owner, two heap replacements each; entries of
the heaps, ranks and nodes, set up once a layer. Load is Zipf's (1 / rank of the expert), shuffled in each layer.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.moe.placement.cost import modelled
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.types import Costs, Grid, deal

COSTS = Costs(row=0.05, hop=0.02, expert=60.0, hidden=500.0)
SIZES = ((64, 32), (128, 128), (256, 512), (256, 1024))  # experts, ranks
LAYERS = (4, 58)
NODE = 8
ROWS = 4096 * 8  # assignments that a rank routes


def loads(experts: int, ranks: int, layers: int) -> list[Tensor]:
    zipf_E = 1 / torch.arange(1.0, experts + 1, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    return [(zipf_E / zipf_E.sum() * ROWS * ranks)[torch.randperm(experts, generator=draw)] for _ in range(layers)]


def milliseconds(work: Callable[[], object], repeats: int) -> str:
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - start))
    return f"{statistics.median(taken):.3g} ({min(taken):.3g} to {max(taken):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"median of {repeats} (least to most) in ms; {COSTS}, {ROWS} assignments a rank, nodes of {NODE}\n")
    print("| experts x ranks | room | candidates | steps | holders | plan of a layer, ms | overload | modelled time |")
    print("|---|---|---|---|---|---|---|---|")
    for experts, ranks in SIZES:
        for room in (None, 2):
            print(planned(experts, Grid(edp=1, ep=ranks, node=NODE, room=room), repeats))
    print("\n| experts x ranks | layers | experts owned | heap entries | sharding, ms | time of 4 to deal's |")
    print("|---|---|---|---|---|---|")
    for experts, ranks in SIZES:
        for layers in LAYERS:
            print(sharded(experts, layers, Grid(edp=1, ep=ranks, node=NODE), repeats))


def planned(experts: int, grid: Grid, repeats: int) -> str:
    [load_E], [owner_E] = loads(experts, grid.ranks, 1), deal([experts], grid.ranks)
    plans = FSSDP().candidates(load_E, owner_E, grid, COSTS)
    steps, holders = sum(len(p.order_H) for p in plans[1:]), sum(int(p.holds_HR.sum()) for p in plans[1:])
    taken = milliseconds(lambda: FSSDP()(load_E, owner_E, grid, COSTS), repeats)
    before, after = (modelled(p(load_E, owner_E, grid, COSTS), load_E, COSTS) for p in (FSSDP(overlap=0), FSSDP()))
    room = "any" if grid.room is None else grid.room
    return (
        f"| {experts} x {grid.ranks} | {room} | {experts + 1} + {len(plans) - 1} | {steps} | {holders} | {taken} | "
        f"{before.overload:.2f} -> {after.overload:.2f} | "
        f"{before.time_us / 1e3:.3g} -> {after.time_us / 1e3:.3g} ms |"
    )


def sharded(experts: int, layers: int, grid: Grid, repeats: int) -> str:
    load_LE = loads(experts, grid.ranks, layers)
    taken = milliseconds(lambda: FSSDP().owners(load_LE, grid), repeats)
    times = []
    for owners in (FSSDP().owners(load_LE, grid), deal([experts] * layers, grid.ranks)):
        few = list(zip(load_LE, owners, strict=True))[: LAYERS[0]]
        times.append(sum(modelled(FSSDP()(x, o, grid, COSTS), x, COSTS).time_us for x, o in few))
    entries = layers * (grid.ranks + grid.ranks // NODE)
    ratio = f"{times[0] / times[1]:.3f}"
    return f"| {experts} x {grid.ranks} | {layers} | {experts * layers} | {entries} | {taken} | {ratio} |"


if __name__ == "__main__":
    main()
