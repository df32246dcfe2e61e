"""Idle share of every pipeline schedule, measured on equal stages, beside the textbook's.

    python benchmarks/schedules.py                      # prints tables, writes results/schedules-cpu.json
    python benchmarks/schedules.py --draw               # and what each rank did when, as text
    python benchmarks/schedules.py --milliseconds 10 14 6 --no-model --no-write

The runner is the one that trains (``Pipeline.step``: its order, its messages over gloo, weight gradients put off by
``deferred.py``), on real ranks. A chunk's forward, backward of inputs and of weights are waits of fixed length that
leave the core free, around little real arithmetic: so more ranks than cores can be measured. The model is ``2 pp``
equal chunks; 1f1b has two of them as one stage. The last table is a real model through ``Trainer``, two ranks.

Columns: "runner" is the part of the idle share in which a rank neither computes nor waits for a message; "counted" the
share that the schedule's table has with no delays at all; "own span" the same two shares within each rank's own time.

Schedules take turns; a figure is the median of the repetitions with a bootstrapped 95% interval.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from saving import begin, end
from schedule_counts import (
    BOOKS,
    Times,
    counted,
    drawing,
    idle,
    idle_within,
    in_flight,
    textbook,
)  # fmt: skip
from schedule_runs import BATCH, DIM, SEQ_LEN, Case, Run, on_ranks, trained, waiting_ranks

from moetrain.parallel.schedules import Action, Kind, Schedule

RESULTS = Path(__file__).parent / "results" / "schedules-cpu.json"
NAMES = [s.value for s in Schedule]


def interval(values: list[float]) -> list[float]:
    """95% interval of the median, bootstrapped."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return [medians[50], medians[1949]]


def figures(case: Case, per_rank: list[list[Run]], seconds: Callable[[Action], float]) -> dict:
    """What is said about a case, from rank -> repetition -> run; ``seconds`` of an action, to count its table with."""
    repetitions = list(zip(*per_rank, strict=True))
    shares = [idle([run.line for run in runs]) for runs in repetitions]
    makespans = [max(r.line[-1].end for r in runs) - min(r.line[0].start for r in runs) for runs in repetitions]
    runner = [statistics.mean(r.unaccounted for r in runs) / t for runs, t in zip(repetitions, makespans, strict=True)]
    own = [idle_within([run.line for run in runs]) for runs in repetitions]
    order, chunks = case.table, case.config.stages_a_rank
    lines = counted(order, seconds)
    book = textbook(case.schedule, case.times, pp=case.pp, chunks=chunks, micro_batches=case.micro_batches)
    found = {
        "schedule": case.schedule.value, "pp": case.pp, "micro_batches": case.micro_batches, "stages_a_rank": chunks,
        "idle": statistics.median(shares), "interval_95": interval(shares), "runner": statistics.median(runner),
        "counted": idle(lines), "textbook": book, "own_idle": statistics.median(own),
        "own_counted": idle_within(lines),
        "in_flight": [in_flight(actions, chunks=chunks) for actions in order],
        "makespan_ms": statistics.median(makespans) * 1e3, "every_idle": shares, "load_average": os.getloadavg()[0],
    }  # fmt: skip
    return {k: _rounded(x) for k, x in found.items()}


def _rounded(x):
    return [_rounded(y) for y in x] if isinstance(x, list) else round(x, 4) + 0.0 if isinstance(x, float) else x


def observed_seconds(per_rank: list[list[Run]]) -> Callable[[Action], float]:
    """The median length of a kind of action on a stage."""
    found: dict[tuple[Kind, int], list[float]] = {}
    for span in (span for runs in per_rank for run in runs for span in run.line):
        found.setdefault((span.action.kind, span.action.stage), []).append(span.end - span.start)
    medians = {key: statistics.median(values) for key, values in found.items()}
    return lambda action: medians[action.kind, action.stage]


def show(rows: list[dict], *, last: str) -> None:
    """``last``: what the textbook's column is called."""
    heads = [
        "schedule",
        "pp",
        "m",
        "v",
        "measured idle (95%)",
        "runner",
        "counted",
        last,
        "own span: measured, counted",
    ]
    cells = [[*heads, "load", "micro-batches in flight"]]
    for r in rows:
        low, high = r["interval_95"]
        cells.append([
            r["schedule"], str(r["pp"]), str(r["micro_batches"]), str(r["stages_a_rank"]),
            f"{r['idle']:.1%} ({low:.1%} to {high:.1%})", f"{r['runner']:.1%}", f"{r['counted']:.1%}",
            "-" if r["textbook"] is None else f"{r['textbook']:.1%}", f"{r['own_idle']:.1%}, {r['own_counted']:.1%}",
            f"{r['load_average']:.1f}", " ".join(f"{x:g}" for x in r["in_flight"]),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def draw(case: Case, per_rank: list[list[Run]]) -> None:
    """The repetition whose idle share is the median."""
    repetitions = [[run.line for run in runs] for runs in zip(*per_rank, strict=True)]
    middle = sorted(repetitions, key=idle)[len(repetitions) // 2]
    print(f"\n{case.schedule.value}, pp={case.pp}, {case.micro_batches} micro-batches, idle {idle(middle):.1%}")
    print(*drawing(middle), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--schedules", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--pp", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--micro-batches", type=int, help="of a step; twice pp unless given")
    parser.add_argument("--milliseconds", nargs=3, type=float, default=[10, 10, 10], metavar=("F", "I", "W"))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8, help="of the real model")
    parser.add_argument("--draw", action="store_true", help="what each rank did, as text")
    parser.add_argument("--no-model", action="store_true", help="without the real model")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    began, times = time.monotonic(), Times(*(t / 1e3 for t in args.milliseconds))
    report = begin(
        f"Pipeline.step, gloo, chunks of {args.milliseconds} ms, {BATCH * SEQ_LEN * DIM * 4} bytes a message"
    )
    report["waits"], report["model"] = rows, real = [], []
    pictures, notes = [], []
    for pp in args.pp:
        cases = [Case(Schedule(name), pp, args.micro_batches or 2 * pp, times) for name in args.schedules]
        got = on_ranks(pp, waiting_ranks, cases, args.repetitions)
        first, seconds, _ = got[0]
        priority = "ranks have real-time priority" if first else "no real-time priority: under load, sleeps end late"
        notes.append(f"pp={pp}: a message takes {seconds * 1e3:.2f} ms (half a round trip); {priority}")
        late = []
        for i, case in enumerate(cases):
            runs = [found[i] for _, _, found in got]
            rows.append(row := figures(case, runs, case.stage_times.of))
            pictures.append((case, runs))
            part = (case.stage_times.forward + case.stage_times.backward) / 3
            late.append(part * ((1 - row["counted"]) / (1 - row["idle"]) - 1) * 1e3)
        notes.append(
            f"pp={pp}: counted becomes measured if each F, I and W takes {min(late):.2f} to {max(late):.2f} ms more"
        )
    print("\nWaits of equal length in place of arithmetic")
    show(rows, last="textbook")
    print(*notes, "Idle seconds of a rank in a step, by the book, F, B, W of a stage:", sep="\n")
    for name in args.schedules:
        print(f"  {name:24}{BOOKS[Schedule(name)][0]:20}{BOOKS[Schedule(name)][1]}")
    report["notes"] = notes
    if not args.no_model:
        cases = [Case(Schedule(name), 2, args.micro_batches or 8, Times()) for name in args.schedules]
        got = on_ranks(2, trained, cases, args.steps)
        for i, case in enumerate(cases):
            runs = [found[i] for found in got]
            real.append(figures(case, runs, observed_seconds(runs)))
            pictures.append((case, runs))
        print("\nA real model through Trainer, on two ranks; counted with the lengths its own actions had")
        show(real, last="textbook, equal stages")
    for case, runs in pictures if args.draw else ():
        draw(case, runs)
    end(report, RESULTS, began=began, write=not args.no_write)


if __name__ == "__main__":
    main()
