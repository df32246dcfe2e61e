"""Near-ties of every router: where a layout's logits are moved a little, its choices are replayed, and it is the same."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from drawn import drawn
from test_options import NEEDS
from test_verify import HERE, MODEL, Pool, config

from moetrain.config import OPTIONS
from moetrain.config import config as config_node
from moetrain.layouts import Layout
from moetrain.moe.layer import MoE
from moetrain.moe.types import Router, Routing
from moetrain.verify import choices
from moetrain.verify.outcome import Outcome
from moetrain.verify.ranks import Job, perform
from moetrain.verify.report import table
from moetrain.verify.session import make_reference, verify
from moetrain.world import World

SHAKE = 2e-6


@config_node
class Shaken(Router):
    """``inner``, which chooses by logits that are moved, and weighs by those that it was given."""

    inner: Router

    def __call__(self, logits_TE, bias_E, **known) -> Routing:
        noise_TE = torch.arange(logits_TE.numel(), dtype=logits_TE.dtype).cos().view_as(logits_TE)
        moved = self.inner(logits_TE + SHAKE * noise_TE, bias_E, **known)
        return replace(self.weigh(logits_TE, self.scores(logits_TE), moved.ids_TK), own_TK=moved.own_TK)

    def scores(self, logits_TE):
        return self.inner.scores(logits_TE)

    def weigh(self, logits_TE, scores_TE, ids_TK) -> Routing:
        return self.inner.weigh(logits_TE, scores_TE, ids_TK)

    def margins(self, logits_TE, bias_E, **known):
        return self.inner.margins(logits_TE, bias_E, **known)


class ShakenPool(Pool):
    def run(self, job: Job) -> str | None:
        self.pool.run(one, job.encode())


def one(rank: int, size: int, job: str) -> None:
    world = World(rank, size, rank, size, HERE, "gloo" if size > 1 else "", dist.group.WORLD if size > 1 else None)
    wanted, make = Job.decode(job), MoE.__init__

    def shaken(self, *args, **keys) -> None:
        make(self, *args, **keys)
        self.router = Shaken(top_k=self.router.top_k, inner=self.router)

    MoE.__init__ = make if wanted.alone else shaken
    try:
        perform(wanted, world, None)
    finally:
        MoE.__init__ = make


CASES = {name: {"router": {"kind": name} | NEEDS.get(name, {})} for name in OPTIONS["router"] if name != "replay"}
CASES |= {f"rounding of {name}": CASES[name] | {"rounding": {"multiple": 2}} for name in ("topk", "sinkhorn", "random")}
CASES["group_limited"] = {"router": {"kind": "group_limited", "num_groups": 2, "max_groups": 1}}
CASES["noisy_topk"] = {"router": {"kind": "noisy_topk", "gumbel": 1e-5}}  # not more than what scores differ by


@pytest.mark.parametrize("case", drawn(CASES, 4, of="near-ties"))
def test_near_ties_of_every_router_are_replayed(ranks, tmp_path, case) -> None:
    moe = MODEL["moe"] | {"balance": {}} | CASES[case]
    pool = ShakenPool(ranks(2))
    reference = make_reference(config("float32", init_std=1e-4, moe=moe), pool, tmp_path / "reference")
    verdict = verify(Layout(dp=1, cp=2), reference, pool, tmp_path / "layout")
    assert verdict.report is not None, verdict.error
    assert verdict.kind == "same", "\n".join(table(verdict.report))
    free = choices.compare(Outcome(tmp_path / "layout"), Outcome(reference.folder), replayed=False)
    assert (free.near_ties > 0) == (case != "random"), "a hash is not moved"
