"""The experts of an MoE layer beside other libraries' in one run: TFLOP/s forward and backward, activation memory.

    python benchmarks/moe_layer.py cuda "NVIDIA H200" [--small]

Four shapes, three routings (``routings.py``), bf16. What is timed begins with tokens and their routing and ends with
each token's sum, permutation included; flops are 6 T K D F forward and 12 T K D F backward, of real rows. Everybody has
the same weights, and is held against float64 over all tokens before being timed. A peer is the best of its variants and
of these compiled (``peers/``); what was tried, and what failed, is in the results. A peer that is not here, out of
memory or wrong is "not compared". Ours are all of ``Kernel`` but ``auto`` and ``reference``, that of torch also with
``train.compile``; the figure is of the one that ``auto`` takes. Then candidates take turns: inputs rotate, the L2 is
overwritten before each. Medians; a ratio has a 95% interval. Beside it the rate of cuBLAS for the same matmuls and the
roofline of what was measured here.

A fourth row a shape: the whole layer, gate and top-k included, of those that have one.
"""

import statistics
import sys
import warnings
from functools import partial
from typing import Any

import ceilings
import peers
import torch
from gpu_results import KINDS, SHAPES, WHOLE, failed, layer_cell, measured, named, record, versions_here
from gpu_timing import Clock, free, in_turns, one_line
from intervals import ratio, shown
from layer_bench import Bench, Own, OwnLayer, Run, Tried
from routings import Batch, errors

from moetrain import kernels
from moetrain.kernels import Kernel

ROUNDS = 20
TURNS = "out of memory where candidates took turns"


def own_variants(bench: Bench) -> tuple[dict[str, Tried], str, dict[str, str]]:
    """Ours by backend, the one that ``auto`` takes, and the words of those that refuse."""
    _, _, F, _, _ = bench.shape
    chosen, why = kernels.choose(
        Kernel.auto, device=bench.weights.down_EDF.device, dtype=torch.bfloat16, dim=bench.shape[1], hidden=F
    )
    found, refused, auto = {}, {}, ""
    ours = [(kernel, False) for kernel in Kernel if kernel not in (Kernel.auto, Kernel.reference)]
    for kernel, compiled in (*ours, (Kernel.torch, True)):
        name, make = (
            kernel.value + "_compiled" * compiled,
            partial(Own, bench.weights, kernel=kernel, compiled=compiled),
        )
        tried = bench.attempt("ours", name, make, compiled=False, limit=60)
        if tried.run is None:
            refused[name] = tried.words
            continue
        found[name] = tried
        assert isinstance(tried.run.module, Own)
        if compiled:
            continue
        if tried.run.module.backend == chosen or why.startswith(f"{kernel.value}:"):
            auto = kernel.value
    if not auto:
        raise RuntimeError(f"what auto takes did not run: {refused}")
    return found, auto, refused


def floors(shape: tuple[int, ...], tops: ceilings.Ceilings) -> tuple[float, float]:
    """Roofline seconds, forward and backward: each input read once, each output written once, H of 2 F kept."""
    T, D, F, E, K = shape
    flops, tokens, kept, weights = 6 * T * K * D * F, 2 * T * D, 4 * T * K * F, 6 * E * D * F
    forward = tops.floor(flops=flops, num_bytes=2 * tokens + kept + weights)
    return forward, tops.floor(flops=2 * flops, num_bytes=3 * tokens + kept + 2 * weights)


def beside(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """Theirs over ours: of both, of the forward, of the backward."""
    n = min(len(ours), len(theirs))
    a, b = ours[:n], theirs[:n]
    columns = {"both": sum, "forward": lambda t: t[0], "backward": lambda t: t[1]}
    return {name: ratio([of(t) for t in a], [of(t) for t in b]) for name, of in columns.items()}


def cell_of(
    bench: Bench, kind: str, ours: dict[str, Tried], auto: str, theirs: list[Tried],
    found: dict[str, list[list[float]]], tops: ceilings.Ceilings, cublas: dict[str, tuple[float, float]],
    missing: dict[str, str],
) -> dict:  # fmt: skip
    T, D, F, E, K = bench.shape
    flops, mine = 6 * T * K * D * F, found[auto]
    forward, backward = (statistics.median(t[i] for t in mine) for i in (0, 1))
    both = statistics.median(sum(t) for t in mine)
    floor = floors(bench.shape, tops)
    run = ours[auto].run
    assert run is not None
    least = 2 * T * D + 4 * T * K * F
    ratios = {t.who: beside(mine, found[t.who]) for t in theirs if t.who in found}
    words = {t.who: f"not compared: {t.words or TURNS}" for t in theirs if t.who not in found} | {
        name: f"not compared: {why}" for name, why in missing.items()
    }
    others = {f"ours_{name}": f"{3 * flops / statistics.median(map(sum, found[name])) / 1e12:.4g} TFLOP/s"
              for name in ours if name != auto and name in found}  # fmt: skip
    data = {
        "seconds": found, "ratios": ratios, "ceilings": {"matmul": tops.matmul, "copy": tops.copy}, "cublas_s": cublas,
        "kept_bytes": {n: t.run.kept for n, t in everybody(ours, theirs).items() if t.run},
        "peak_bytes": {n: t.run.peak for n, t in everybody(ours, theirs).items() if t.run},
        "tried": [t.said() for t in bench.tried], "versions": versions_here(),
    }  # fmt: skip
    of_cublas = ", ".join(f"{sum(t) / both:.0%} of {name}" for name, t in cublas.items())
    return measured(
        3 * flops / both / 1e12, "TFLOP/s forward and backward",
        backend=auto,
        forward=f"{flops / forward / 1e12:.4g} TFLOP/s, {forward * 1e3:.4g} ms",
        backward=f"{2 * flops / backward / 1e12:.4g} TFLOP/s, {backward * 1e3:.4g} ms",
        **others,
        **{f"{t.who}_({t.name})_over_ours": shown(ratios[t.who]["both"]) + (
            f", forward {ratios[t.who]['forward'][0]:.2f}, backward {ratios[t.who]['backward'][0]:.2f}")
            for t in theirs if t.who in ratios},
        **words,
        of_cuBLAS=of_cublas,
        of_the_roofline=f"forward {floor[0] / forward:.0%}, backward {floor[1] / backward:.0%} ({tops})",
        activations=f"{run.kept / 2**30:.3f} GiB kept, {run.kept / least:.2f} of 2TD + 4TKF; others: " + (
            ", ".join(f"{t.who} {t.run.kept / 2**30:.3f}" for t in theirs if t.run) or "none"),
        first_call=f"{ours[auto].first:.3g} s",
        errors=f"at most {max(ours[auto].errors.values()):.1e} from float64",
        max_violation=f"{bench.batches[kind][0].max_violation(E):.2f}",
    ) | {"data": data}  # fmt: skip


def everybody(ours: dict[str, Tried], theirs: list[Tried]) -> dict[str, Tried]:
    return ours | {t.who: t for t in theirs}


def experts(bench: Bench, shape: tuple[int, ...], at: list[peers.Peer], missing: dict[str, str], **known: Any) -> None:
    """The rows of a shape: everybody's experts, by routing."""
    clock, tops, name = known["clock"], known["tops"], known["name"]
    ours, auto, refused = own_variants(bench)
    missing = missing | {f"ours: {kernel}": why for kernel, why in refused.items()}
    theirs, trying = [], Clock(0.7 * clock.left())
    for peer in at:
        variants = {v: partial(make, bench.weights) for v, make in peer.variants.items()}
        theirs.append(bench.best(peer.name, variants, compile_too=known["compile_too"], clock=trying))
    _, _, _, E, _ = bench.shape
    cublas = {
        f"cuBLAS, {words}": ceilings.experts(bench.shape, bench.device, groups=groups)
        for words, groups in (("dense", 1), ("expert by expert", E))
    }
    for i, kind in enumerate(KINDS):
        turns, batches = clock.part(len(KINDS) - i), bench.batches[kind]
        runs = {n: partial(timed, t.run, batches) for n, t in everybody(ours, theirs).items() if t.run}
        rounds = 3 if bench.small else ROUNDS if kind == "random" else ROUNDS // 2
        found = in_turns(runs, rounds=rounds, enough=lambda turns=turns: turns.left() < 0)
        cell = cell_of(bench, kind, ours, auto, theirs, found, tops, cublas, missing)
        save(name, layer_cell(shape, kind), cell, known["done"])


def timed(run: Run, batches: list[Batch], i: int) -> list[float]:
    return run(batches[i % len(batches)])[0]


def whole(bench: Bench, shape: tuple[int, ...], at: list[peers.Peer], missing: dict[str, str], **known: Any) -> None:
    """The fourth row: gate to sum, of those that have a whole layer."""
    ours = bench.attempt("ours", "layer", partial(OwnLayer, bench.weights, bench.gate_ED), compiled=False, limit=60)
    if ours.run is None:
        raise RuntimeError(ours.words)
    trying = Clock(0.7 * known["clock"].left())
    theirs = [
        bench.best(
            peer.name, {v: partial(make, bench.weights, bench.gate_ED) for v, make in peer.layers.items()},
            compile_too=known["compile_too"], clock=trying,
        )
        for peer in at if peer.layers
    ]  # fmt: skip
    batches = bench.batches["random"]
    runs = {t.who: partial(timed, t.run, batches) for t in (ours, *theirs) if t.run}
    found = in_turns(runs, rounds=3 if bench.small else ROUNDS // 2, enough=lambda: known["clock"].left() < 0)
    T, D, F, _, K = bench.shape
    mine = found["ours"]
    both = statistics.median(map(sum, mine))
    y = ours.run(batches[0])[1]["y"]
    apart = {t.who: errors({"y": t.run(batches[0])[1]["y"]}, {"y": y})["y"] for t in theirs if t.run}
    ratios = {t.who: beside(mine, found[t.who]) for t in theirs if t.who in found}
    cell = measured(
        18 * T * K * D * F / both / 1e12, "TFLOP/s forward and backward",
        layer=f"{both * 1e3:.4g} ms",
        **{f"{t.who}_({t.name})_over_ours": f"{shown(ratios[t.who]['both'])}, result {apart[t.who]:.1e} from ours"
           for t in theirs if t.who in ratios},
        **{t.who: f"not compared: {t.words or TURNS}" for t in theirs if t.who not in ratios},
        **{who: f"not compared: {why}" for who, why in missing.items()},
    ) | {"data": {"seconds": found, "ratios": ratios, "tried": [t.said() for t in bench.tried]}}  # fmt: skip
    save(known["name"], layer_cell(shape, WHOLE), cell, known["done"])


def save(name: str, key: str, cell: dict, done: set[str]) -> None:
    print(key, {k: v for k, v in cell.items() if k != "data"}, flush=True)
    record(name, {key: cell})
    done.add(key)


def main(device: torch.device, name: str, *, small: bool) -> int:
    bad, clock = 0, Clock()
    warnings.simplefilter("ignore")  # of other libraries, once a call
    at, missing = peers.load()
    print("peers:", ", ".join(f"{p.name} {p.version}" for p in at), "| missing:", missing, flush=True)
    tops = ceilings.measure(device, small=small)
    print(tops, flush=True)
    plan = [(experts, KINDS, 3, shape) for shape in SHAPES] + [(whole, (WHOLE,), 1, shape) for shape in SHAPES]
    for i, (part, kinds, weight, shape) in enumerate(plan):
        T, D, F, E, K = shape
        used = (T // 256, D // 8, F // 8, E // 8, max(2, K // 4)) if small else shape
        own = Clock(weight * clock.left() / sum(x[2] for x in plan[i:]))
        known = {"clock": own, "tops": tops, "name": name, "compile_too": not small or shape == SHAPES[0]}
        print(f"{part.__name__}: {named(shape)} as {used}, {own.left():.0f} s", flush=True)
        done: set[str] = set()
        try:
            bench = Bench(used, device, small=small)
            part(bench, shape, at, missing, done=done, **known)
        except Exception as error:
            bad = 1
            print(f"failed: {one_line(error)}", flush=True)
            keys = [layer_cell(shape, kind) for kind in kinds]
            record(name, {key: failed(one_line(error)) for key in keys if key not in done})
        bench = None
        torch._dynamo.reset()
        free()
    return bad


if __name__ == "__main__":
    sys.exit(main(torch.device(sys.argv[1]), sys.argv[2], small="--small" in sys.argv))
