"""Writes the tables of docs/fssdp-sim.md: the simulator against the speed-ups over expert parallelism of Hecate.

    python benchmarks/hecate.py                              # prints them: two minutes on one core
    python benchmarks/hecate.py --write docs/fssdp-sim.md    # between the marks in the page

What nobody published (how skewed the loads were, how fast attention and matmuls ran) is chosen by a grid so that the
ends of cluster A's ranges come out; cluster B is then computed with the same choice.
"""

import argparse
import itertools
import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import Tensor

from moetrain import config as configs
from moetrain.cli.compose import folder
from moetrain.config import UserError
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.static import Static
from moetrain.simulate.cluster import Cluster
from moetrain.simulate.loads import Drift
from moetrain.simulate.price import Layer, Travel
from moetrain.simulate.runs import Outcome, Sample, priced, run

BEGIN, END = "<!-- benchmarks/hecate.py: begin -->", "<!-- benchmarks/hecate.py: end -->"
FIT = {("p3dn", 16): (1.40, 1.58), ("p3dn", 32): (1.34, 1.78)}
HELD_OUT = {("p4d", 32): (1.26, 1.70)}
"""(cluster, GPUs) -> lowest and highest speed-up of a training step over expert parallelism, arXiv 2502.02581."""
NAMES = {"p3dn": "A", "p4d": "B"}
QUICK, WHOLE = Sample(steps=2, layers=2), Sample(steps=8, layers=4)
GRID = {
    "exponent": (0.4, 0.6, 0.8, 1.0), "share": (0.25,), "gemm": (0.15, 0.3, 0.5),
    "attention": (0.02, 0.04, 0.08, 0.15, 0.3), "sequences": (4, 16),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    dim: int
    seq_len: int
    num_layers: int  # each with an MoE layer of 2 * GPUs experts: so the published numbers of parameters come out
    vocab_size: int


MODELS = {
    "GPT-MoE-S": Model(768, 2048, 12, 50257),
    "GPT-MoE-L": Model(1536, 2048, 12, 50257),
    "BERT-MoE": Model(1024, 512, 12, 30522),
    "BERT-MoE-Deep": Model(1024, 512, 24, 30522),
}
HELD = 5.73
"""Parameters of experts on a rank over those under expert parallelism, of the same paper."""
LAYERS = 12  # that are simulated; Deep's 24 are as those


@dataclass(frozen=True)
class Assumed:
    exponent: float
    share: float  # of the experts that change places every 20 steps
    gemm: float
    attention: float
    sequences: int  # of 512 tokens a GPU; of 2,048 tokens, 4


@dataclass(frozen=True)
class Pair:
    static: Outcome
    fssdp: Outcome
    rest: float  # ms of a step beside its layers: the head

    def speedup(self, layers: int) -> float:
        return (layers * self.static.layer + self.rest) / (layers * self.fssdp.layer + self.rest)


Cell = tuple[str, int]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="the page whose part between the marks is replaced")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        before, after = _around(args.write) if args.write else ("", "")
        text = "\n".join(tables(fit()))
        if args.write:
            args.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
            text = str(args.write)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(text)
    return 0


def fit() -> Assumed:
    """The choice whose ends of A's ranges are nearest: of the grid, then of what is around the best."""
    best = sorted((Assumed(*values) for values in itertools.product(*GRID.values())), key=error)[:3]
    shares = (0.1, 0.25, 0.5)
    best = min((replace(a, share=share) for a in best for share in shares), key=lambda a: error(a, WHOLE))
    near = (
        replace(best, exponent=round(best.exponent + more, 2), attention=round(best.attention * factor, 4))
        for more in (-0.1, 0.0, 0.1)
        for factor in (0.7, 1.0, 1.4)
    )
    best = min(near, key=lambda a: error(a, WHOLE))
    return min((replace(best, share=share) for share in shares), key=lambda a: error(a, WHOLE))


def error(assumed: Assumed, sample: Sample = QUICK) -> float:
    """Sum of squared log ratios of simulated to published ends."""
    total = 0.0
    for cell, published in FIT.items():
        ends = _ends({name: pair(name, cell, assumed, sample).speedup(m.num_layers) for name, m in MODELS.items()})
        total += sum(math.log(x / y) ** 2 for x, y in zip(ends, published, strict=True))
    return total


@cache
def _pair(shape: tuple[int, int, int], sequences: int, cell: Cell, a: Assumed, sample: Sample, travel: Travel) -> Pair:
    dim, seq_len, vocab = shape
    name, ranks = cell
    cluster = cluster_of(name, a)
    tokens = seq_len * sequences
    layer = Layer(
        dim=dim, top_k=2, expert_params=4 * dim * dim, other_flops=8.0 * dim * dim + 4.0 * seq_len * dim, tokens=tokens,
        gradient_bytes=2, travel=travel,
    )  # fmt: skip
    loads = loads_of(2 * ranks, a.exponent, a.share, tokens)
    replicas = (HELD - 1) * loads[0].shape[1] / ranks
    memory = replicas * layer.expert_params * layer.weight_bytes * LAYERS / 2**30
    policies = {"static": Static(), "fssdp": FSSDP(memory=memory)}
    steps, layers = priced(policies.values(), loads, sample)
    static, fssdp = (
        run(policy, p, loads, layer=layer, cluster=cluster, ranks=ranks, steps=steps, layers=layers)
        for policy, p in policies.items()
    )
    return Pair(static, fssdp, replace(layer, other_flops=2.0 * dim * vocab).attention_us(cluster) / 1e3)


def pair(model: str, cell: Cell, assumed: Assumed, sample: Sample, travel: Travel = Travel.relay) -> Pair:
    m = MODELS[model]
    sequences = assumed.sequences if m.seq_len == 512 else 4
    shape = (m.dim, m.seq_len, m.vocab_size)
    return _pair(shape, sequences, cell, replace(assumed, sequences=0), sample, travel)


@cache
def loads_of(experts: int, exponent: float, share: float, tokens: int) -> list[Tensor]:
    """Of each layer (steps, E)."""
    drift = Drift(exponent=exponent, share=share, steps=200)
    return [drift.load(experts=experts, top_k=2, tokens=tokens, layer=i, seed=0) for i in range(LAYERS)]


def cluster_of(name: str, assumed: Assumed) -> Cluster:
    data = yaml.safe_load((folder() / "cluster" / f"{name}.yaml").read_text())
    return configs.load(data | {"gemm": assumed.gemm, "attention": assumed.attention}, Cluster, "cluster")


def tables(a: Assumed) -> list[str]:
    """In Markdown: what was chosen, the ranges, each model, figures that took no part in the choice."""
    lines = [
        f"Chosen on A: Zipf exponent {a.exponent:g}; every 20 steps {a.share:.0%} of the experts change places; the "
        f"experts' matmuls reach {a.gemm:.1%} of the peak, everything else {a.attention:.1%}; a GPU has 4 sequences "
        f"of 2,048 tokens, or {a.sequences} of 512.",
        "",
        "| cluster, GPUs | | published | simulated | lower end | upper end | copies from their owners |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {c: {m: pair(m, c, a, WHOLE) for m in MODELS} for c in (*FIT, *HELD_OUT)}
    for cell, (low, high) in (FIT | HELD_OUT).items():
        ends = _ends({m: x.speedup(MODELS[m].num_layers) for m, x in found[cell].items()})
        direct = _ends({m: pair(m, cell, a, WHOLE, Travel.direct).speedup(MODELS[m].num_layers) for m in MODELS})
        lines.append(
            f"| {NAMES[cell[0]]}, {cell[1]} | {'fitted' if cell in FIT else 'held out'} | {low:.2f}-{high:.2f}x | "
            f"{ends[0]:.2f}-{ends[1]:.2f}x | {ends[0] / low - 1:+.1%} | {ends[1] / high - 1:+.1%} | "
            f"{direct[0]:.2f}-{direct[1]:.2f}x |"
        )
    lines += [
        "",
        "| simulated | " + " | ".join(f"{NAMES[c]}, {n}" for c, n in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for m, model in MODELS.items():
        cells = " | ".join(f"{found[c][m].speedup(model.num_layers):.2f}x" for c in found)
        lines.append(f"| {m} | {cells} |")
    s = found["p4d", 32]["GPT-MoE-S"]
    worst = max(x.static.worst_overload for cells in found.values() for x in cells.values())
    held = (s.fssdp.owned_gib / 8 + s.fssdp.replicas_gib) / (s.static.owned_gib / 8)  # of 16-bit weights alone
    fewer = f"{s.static.tokens / s.fssdp.tokens:.2f}x" if s.fssdp.tokens else "none left"
    rows = [
        ("MoE layers alone, GPT-MoE-S on B", "11.87x (2.8-18.8x)", f"{s.static.moe / s.fssdp.moe:.2f}x"),
        ("time of its all-to-alls, under expert parallelism / Hecate", "12.3x", fewer),
        ("parameters of experts on a rank, Hecate / expert parallelism", "5.73x", f"{held:.2f}x"),
        ("worst imbalance's slow-down (here: rows of the fullest rank / mean)", "5.18x", f"{worst:.2f}x"),
    ]  # fmt: skip
    lines += ["", "| took no part in the choice | published | simulated |", "|---|---|---|"]
    return lines + [f"| {what} | {theirs} | {ours} |" for what, theirs, ours in rows]


def _ends(found: dict[str, float]) -> tuple[float, float]:
    return min(found.values()), max(found.values())


def _around(path: Path) -> tuple[str, str]:
    """What of the page stands before and after the marks; raises ``UserError`` rather than lose it."""
    text = path.read_text() if path.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UserError(f"{path} has not one {BEGIN} and, after it, one {END}: put them where the tables go")
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]


if __name__ == "__main__":
    sys.exit(main())
