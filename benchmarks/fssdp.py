"""Whether FSSDP pays: steps of the ``tiny`` preset under skewed routing, beside other placements and beside the bound.

    python benchmarks/fssdp.py                              # prints tables, writes results/fssdp-cpu.json
    python benchmarks/fssdp.py --cases skew90 --ranks 4 --pairs 60      # these anew, of the results
    python benchmarks/fssdp.py --record                     # the trace anew: results/fssdp-trace.npz

Every policy has a ``Trainer`` of its own (16 experts, fp32, ep = dp = ranks of one thread over gloo, a step of one
micro-batch, sharded as in the quickstart) on the same ranks; a router imposes the load (``fssdp_loads.py``). Policies
take turns, a step each in a block; a step's time is that of the slowest rank, from a barrier on, planning included.
Costs are measured by the product, in its first steps. Figures are medians over blocks of ratios within a block, with a
bootstrapped 95% interval; blocks in which the machine's host was busy with others are run again. "whole" is the ratio
of sums, in which the steps after a change count as they should.

The bound: what a step would take if every rank computed as many rows, and no expert travelled.

    even step   measured in the same blocks: static placement, every expert alike
    rows        of a layer: max(those of the busiest rank, all / cores), as ranks that wait leave their core to others
    bound       (even step + seconds of a row * (static's rows - even rows)) / even step
              = 1 - share + share * skew;  share = seconds of a row * even rows / even step,  skew = rows / even rows
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

from fssdp_loads import CASES, EXPERTS, TRACE, record
from fssdp_runs import EVEN, POLICIES, WARM, Measured, Seen, Size, measure
from saving import begin, end
from schedule_runs import on_ranks
from schedules import interval

RESULTS = Path(__file__).parent / "results" / "fssdp-cpu.json"
PART, SLOWER = 0.85, 1.03
"""Of the bound that is to be reached; how much longer than the best other policy a step may take."""
MiB = 2**20


def figures(case: str, per_rank: list[Measured], *, cores: int) -> dict:
    """What is said about a case, from what each rank saw."""
    ranks = len(per_rank)
    seen = {name: [found.seen[name] for found in per_rank] for name in per_rank[0].seen}
    times = {name: [max(x) for x in zip(*(s.seconds for s in of), strict=True)] for name, of in seen.items()}
    row = statistics.median(found.row_seconds for found in per_rank)
    policies = {name: of_policy(seen[name], times[name], times["static"]) for name in POLICIES}
    others = [name for name in POLICIES if name != "fssdp"]
    best = min(others, key=lambda name: policies[name]["step_ms"])
    found = {
        "case": case, "ranks": ranks, "date": date.today().isoformat(), "pairs": len(times["static"]),
        "policies": policies, "row_us": row * 1e6,
        "best": best, "to_best": ratios(times["fssdp"], times[best]),
        "memory_of_replicate_all": policies["fssdp"]["replica_mib"] / policies["replicate_all"]["replica_mib"],
        "costs": seen["fssdp"][0].costs, "shadow_costs": seen["shadow"][0].costs, "load_average": os.getloadavg()[0],
        "blocks_run": per_rank[0].blocks, "stolen": max(per_rank[0].stolen),
    }  # fmt: skip
    if EVEN in times:
        even, rows, even_rows = (
            statistics.median(times[EVEN]), busy_rows(seen["static"], cores), busy_rows(seen[EVEN], cores)
        )  # fmt: skip
        share, skew = row * even_rows / even, rows / even_rows
        bound, reached = 1 - share + share * skew, policies["fssdp"]["faster"]["median"]
        found |= {
            "even_step_ms": even * 1e3, "moe_share": share, "skew": skew, "bound": bound, "part": reached / bound,
            "static_to_even": ratios(times["static"], times[EVEN]),
            "fssdp_to_even": ratios(times["fssdp"], times[EVEN]),
        }  # fmt: skip
    return found | {"every_ms": {name: [1e3 * t for t in of] for name, of in times.items()}}


def of_policy(seen: list[Seen], times: list[float], static: list[float]) -> dict:
    """``seen`` on every rank, ``times`` of a step's slowest."""
    first = seen[0]
    mean = sum(sum(s.rows[0]) for s in seen) / len(seen)
    busiest = [sum(map(max, zip(*of_ranks, strict=True))) for of_ranks in zip(*(s.rows for s in seen), strict=True)]
    replicas = max((sum(x) for s in seen for x in s.replicas), default=0)
    copies = [max(map(sum, of_ranks)) for of_ranks in zip(*(s.copies for s in seen), strict=True)]
    moved = statistics.median(copies) * first.travels * first.expert_bytes if copies else 0
    return {
        "step_ms": 1e3 * statistics.median(times), "faster": ratios(static, times),
        "overload": statistics.median(busiest) / mean, "replica_mib": 2 * replicas * first.expert_bytes / MiB,
        "moved_mib": moved / MiB, "planning_ms": 1e3 * statistics.median(first.planning) if first.planning else 0.0,
    }  # fmt: skip


def busy_rows(seen: list[Seen], cores: int) -> float:
    """Of a step, summed over layers: until the last rank has computed its rows, on so many cores."""
    steps = zip(*(s.rows for s in seen), strict=True)
    return statistics.median(
        sum(max(*of_layer, sum(of_layer) / cores) for of_layer in zip(*of_ranks, strict=True)) for of_ranks in steps
    )


def ratios(a: list[float], b: list[float]) -> dict:
    each = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": statistics.median(each), "interval_95": interval(each), "whole": sum(a) / sum(b)}


def show(found: dict) -> None:
    print(
        f"\n{found['case']}, {found['ranks']} ranks, {found['pairs']} blocks of {found['blocks_run']} (load "
        f"{found['load_average']:.1f}, at the most {found['stolen']:.1%} of the processors taken by others)"
    )
    heads = ["placement", "step", "faster than static (95%)", "whole", "overload", "replicas", "moved", "planning"]
    cells = [heads]
    for name, p in found["policies"].items():
        cells.append([
            name, f"{p['step_ms']:.0f} ms", words(p["faster"]), f"{p['faster']['whole']:.3f}", f"{p['overload']:.2f}",
            f"{p['replica_mib']:.0f} MiB", f"{p['moved_mib']:.0f} MiB",
            f"{p['planning_ms']:.1f} ms {p['planning_ms'] / p['step_ms']:.1%}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for cell in cells:
        print("  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip())
    fits = found["to_best"]["median"] <= SLOWER
    less = found["memory_of_replicate_all"]
    print(f"fssdp takes {words(found['to_best'])} of {found['best']}, the best other: {said(fits)} {SLOWER} or less")
    print(f"its replicas take {less:.0%} of replicate_all's memory: {said(less < 1)} less")
    if "bound" in found:
        reached = found["policies"]["fssdp"]["faster"]["median"]
        print(
            f"bound {found['bound']:.3f} (experts {found['moe_share']:.0%} of an even step of "
            f"{found['even_step_ms']:.0f} ms, {found['row_us']:.1f} us a row, skew {found['skew']:.2f}); reached "
            f"{reached:.3f} = {found['part']:.0%} of it: {said(found['part'] >= PART)} {PART:.0%} or more"
        )
        print(
            f"beside even steps: static takes {words(found['static_to_even'])}, fssdp {words(found['fssdp_to_even'])}"
        )
    for name in ("costs", "shadow_costs"):
        print(f"{name.replace('_', ' ')} measured, us:", *(f"{k}={v:g}" for k, v in (found[name] or {}).items()))


def said(yes: bool) -> str:
    return "yes," if yes else "NO, not"


def words(ratio: dict) -> str:
    low, high = ratio["interval_95"]
    return f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})"


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(y) for k, y in x.items()}
    return [rounded(y) for y in x] if isinstance(x, list) else round(x, 4) if isinstance(x, float) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--pairs", type=int, default=20, help="blocks of a step of every policy")
    parser.add_argument("--batch", type=int, default=Size.batch, help="samples of a step, over all ranks")
    parser.add_argument("--seq-len", type=int, default=Size.seq_len)
    parser.add_argument("--also", nargs="*", default=Size.also, metavar="KEY=VALUE", help="of every policy's config")
    parser.add_argument("--record", action="store_true", help="the trace anew, and nothing else")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    if args.record:
        record()
        return print(f"written: {os.path.relpath(TRACE)}")
    if args.pairs < 2:
        parser.error(f"--pairs {args.pairs}: an interval takes 2 or more")
    size = Size(args.batch, args.seq_len, tuple(args.also))
    began = time.monotonic()
    what = f"Trainer.step, tiny with {EXPERTS} experts, fp32, gloo, {WARM} steps to warm up"
    report = begin(what, size=asdict(size))
    report["cases"] = []
    for ranks in args.ranks:
        for case in args.cases:
            found = figures(case, on_ranks(ranks, measure, case, args.pairs, size), cores=report["cores"])
            show(found)
            report["cases"].append(rounded(found))
    if RESULTS.exists():  # cases that were not run now stay as they are
        now = {(found["case"], found["ranks"]) for found in report["cases"]}
        known = json.loads(RESULTS.read_text())["cases"]
        report["cases"] += [found for found in known if (found["case"], found["ranks"]) not in now]
        report["cases"].sort(key=lambda f: (f["ranks"], CASES.index(f["case"])))
    end(report, RESULTS, began=began, write=not args.no_write)


if __name__ == "__main__":
    main()
