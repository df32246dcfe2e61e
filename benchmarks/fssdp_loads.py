"""Loads that are imposed on a benchmark's runs: case -> step and layer -> share of each expert; the router that obeys.

    even          every expert alike
    skew70/90     the experts that rank 0 owns under static placement get 70% or 90% of all assignments
    moving        some rank's get 80%, the next one's after 20 steps
    trace         what a run without balancing had: ``record``
    dealt         skew90 once more, after the step in which owners first follow the load

Of one rank's experts, the i-th hottest gets as many as the first, over i. Every rank routes by the same shares, and
draws: loads differ from them, and from rank to rank, as those of a trained gate do.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.cli.compose import compose
from moetrain.config import config
from moetrain.job import open_data
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Context, Routing
from moetrain.train import Trainer
from moetrain.world import Communication, Device, join

TRACE = Path(__file__).parent / "results" / "fssdp-trace.npz"
STRETCHES, LENGTH = (20, 120, 260), 40  # first steps, and how many, of those that are kept
EXPERTS, LAYERS = 16, 4
EVERY = 20  # steps until others are hot, where they change
PARTS = {"skew70": 0.7, "skew90": 0.9, "moving": 0.8, "dealt": 0.9}
CASES = ["even", "skew70", "skew90", "moving", "trace", "dealt"]

Floats = NDArray[np.float64]


def shares(case: str, step: int, layer: int, *, ranks: int, steps: int) -> Floats:
    """(E,), which sum to 1. ``steps``: how many there will be, in which each stretch of a trace has its part."""
    if case == "even":
        return np.full(EXPERTS, 1 / EXPERTS)
    if case == "trace":
        load_SLE = _trace()
        each = -(-steps // len(load_SLE))
        load_E = load_SLE[min(step // each, len(load_SLE) - 1), step % each % LENGTH, layer]
        return load_E / load_E.sum()
    hot = step // EVERY % ranks if case == "moving" else 0
    part_R = np.full(ranks, (1 - PARTS[case]) / (ranks - 1))
    part_R[hot] = PARTS[case]
    own = 1 / np.arange(1, EXPERTS // ranks + 1)
    order = np.random.default_rng(layer)
    return np.concatenate([part * order.permutation(own / own.sum()) for part in part_R])


@cache
def _trace() -> Floats:
    """(stretches, steps, layers, E)."""
    return np.load(TRACE)["load_SLE"].astype(np.float64)


@config
class Imposed(TopK):
    """Experts as ``shares`` has them, whatever the logits, which weigh what is chosen."""

    case: str = "even"
    ranks: int = 1
    steps: int = 1

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        share_E = shares(self.case, ctx.step, layer, ranks=self.ranks, steps=self.steps)
        first = int(ctx.sample_B[0])
        ids_TK = drawn(share_E, len(logits_TE), self.top_k, seed=(ctx.step, layer, first))
        return self.weigh(logits_TE, self.scores(logits_TE), ids_TK)


def drawn(share_E: Floats, tokens: int, k: int, *, seed: tuple[int, ...]) -> Tensor:
    """(T, K) different experts of each token, drawn so that the mean load is ``share_E`` of T * K assignments."""
    rng = np.random.default_rng(seed)
    load_E = np.minimum(rng.multinomial(tokens * k, share_E), tokens)
    while (missing := tokens * k - int(load_E.sum())) > 0:  # of an expert that more than all tokens drew
        load_E = np.minimum(load_E + rng.multinomial(missing, share_E), tokens)
    ids_KT = np.repeat(np.arange(len(share_E)), load_E).reshape(k, tokens)  # nobody twice in a column: load <= tokens
    return torch.from_numpy(ids_KT.T[rng.permutation(tokens)].copy())


def record() -> None:
    """Train the quickstart with more experts and without balancing; keep the loads of some stretches of steps."""
    steps = STRETCHES[-1] + LENGTH
    cfg = compose([
        "experiment=quickstart", "layout=auto", "balance=[]", f"model.moe.num_experts={EXPERTS}",
        f"model.num_layers={LAYERS}", "train.device=cpu", "train.threads=1",
    ])  # fmt: skip
    world = join(device=Device.cpu, communication=Communication.auto, timeout=60.0, threads=1)
    run, loads = Trainer(cfg, world, open_data(cfg, log=print)), []
    for step in range(steps):
        result = run.step()
        loads.append(result.load_LE.to(torch.int32).numpy())
        if step % 20 == 0:
            busiest = (loads[-1].max(1) / loads[-1].mean(1)).round(2)
            print(f"step {step}: loss {float(result.loss):.3f}, hottest expert over mean, by layer: {busiest}")
    TRACE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(TRACE, load_SLE=np.stack([np.stack(loads[s : s + LENGTH]) for s in STRETCHES]))
