"""What ``test_routing_kernels.py`` runs in processes of its own, where Triton is told at its import how to run.

interpret   the routing kernels in Triton's interpreter, beside torch's path and float64
compile     the kernels built for sm_90, on any machine: registers spilled
"""

import json
import sys
from dataclasses import replace

import torch
from torch import Tensor
from triton_runs import spilled

from moetrain import config as configs
from moetrain.moe.dispatchers.allgather import AllGather
from moetrain.moe.dispatchers.dropless import Dropless
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.rounding import TokenRounding
from moetrain.moe.routers.group_limited import GroupLimited, GroupScore
from moetrain.moe.routers.noisy_topk import NoisyTopK
from moetrain.moe.routers.topk import Score, TopK
from moetrain.moe.rows import sort
from moetrain.moe.types import Context, Router
from moetrain.moe.zero_computation import ZeroComputationConfig

CTX = Context(step=0, micro_batch=0, sample_B=torch.arange(1), position_S=torch.arange(70), routed_tokens=70.0)
SIGMOID = {"score": Score.sigmoid, "scale": 2.5}
ROUTERS: dict[str, tuple[TopK, int]] = {
    "one of 3": (TopK(top_k=1, renormalize=False), 3),
    "2 of 8": (TopK(top_k=2), 8),
    "8 of 64": (TopK(top_k=8), 64),
    "6 of 160, sigmoid": (TopK(top_k=6, **SIGMOID), 160),
    "3 of 5, not renormalized": (TopK(top_k=3, renormalize=False, scale=0.7), 5),
    "all of 9": (TopK(top_k=9), 9),
    "8 of 4 of 8 groups of 32": (GroupLimited(top_k=8, num_groups=8, max_groups=4, **SIGMOID), 256),
    "6 of 3 of 8 groups of 20, by the best": (
        GroupLimited(top_k=6, num_groups=8, max_groups=3, group_score=GroupScore.max), 160
    ),
    "2 of 2 of 3 groups of 1": (GroupLimited(top_k=2, num_groups=3, max_groups=2), 3),
    "noisy": (NoisyTopK(top_k=4, gumbel=0.5, jitter=0.1), 24),
}  # fmt: skip
"""Name -> the router and E."""


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def route(router: Router, logits_TE: Tensor, bias_E: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, weights, those of a second run that is given the ids, and the gradient of the logits."""
    leaf = logits_TE.clone().requires_grad_()
    found = router(leaf, bias_E, ctx=CTX, layer=0)
    again = router.weigh(leaf, router.scores(leaf), found.ids_TK.int().long())
    g = g[:, : found.ids_TK.shape[1]].to(leaf.dtype)
    (d_logits,) = torch.autograd.grad(found.weights_TK, leaf, g)
    return found.ids_TK, found.weights_TK.detach(), again.weights_TK.detach(), d_logits


def routers() -> dict[str, dict]:
    found = {}
    for name, (router, E) in ROUTERS.items():
        for case in ("random", "ties", "not a number"):
            generator = torch.Generator().manual_seed(E)
            logits = torch.randn(70, E, generator=generator)
            bias = 0.01 * torch.randn(E, generator=generator)
            if case == "ties":
                logits, bias = (logits * 2).round() / 2, (bias * 100).round() / 100
            if case == "not a number":
                logits[3], logits[5, E // 2] = torch.nan, torch.nan
            g = torch.randn(70, E, generator=generator)
            fused = configs.replace(router, fused=True)
            ids, weights, again, d_logits = route(fused, logits, bias, g)
            want_ids, want, _, _ = route(router, logits, bias, g)
            sound = torch.isfinite(logits).all(1)
            truth = route(configs.replace(Pinned(top_k=router.top_k), router=router, ids=ids), logits.double(), bias, g)
            found[f"{name}, {case}"] = {
                "choices": torch.equal(ids, want_ids),
                "off by": ((weights - want).abs() / want.abs())[sound].max().item(),
                "again": torch.equal(weights[sound], again[sound]),
                "weights": error(weights[sound], truth[1][sound]),
                "of torch": error(want[sound], truth[1][sound]),
                "gradient": error(d_logits[sound], truth[3][sound]),
                "replay": torch.equal(d_logits[sound], route(fused, logits, bias, g)[3][sound]),
            }
    return found


@configs.config
class Pinned(TopK):
    """``router`` with choices that are given: the truth of weights and gradients."""

    router: TopK | None = None
    ids: Tensor | None = None
    renormalize: bool = False

    def __call__(self, logits_TE, bias_E, **_):
        assert self.router is not None
        return self.router.weigh(logits_TE, self.router.scores(logits_TE), self.ids)

    def weigh(self, logits_TE, scores_TE, ids_TK):
        assert self.router is not None
        return self.router.weigh(logits_TE, scores_TE, ids_TK)


def orders() -> dict[str, bool]:
    found = {}
    for keys in (1, 7, 64, 600):
        for rows in (0, 1, 255, 256, 257, 1000):
            keys_N = torch.randint(keys, (rows,), generator=torch.Generator().manual_seed(rows))
            mine, theirs = sort(keys_N, num_keys=keys, fused=True), sort(keys_N, num_keys=keys)
            found[f"{rows} rows, {keys} keys"] = all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    last_N = torch.full((300,), 5)
    found["all to the last"] = torch.equal(sort(last_N, num_keys=6, fused=True)[0], torch.arange(300))
    return found


LAYERS = {
    "dropless": {"dispatcher": Dropless()},
    "allgather": {"dispatcher": AllGather()},
    "group limited": {"router": GroupLimited(top_k=2, num_groups=4, max_groups=2, scale=2.0)},
    "zero computation": {"zero_computation": ZeroComputationConfig(zero=1, copy=1)},
    "rounding": {"rounding": TokenRounding(multiple=4)},
}


def layers() -> dict[str, dict]:
    found = {}
    for name, keys in LAYERS.items():
        runs = []
        for fused in (True, False):
            torch.manual_seed(1)
            router = configs.replace(keys.get("router", TopK(top_k=3)), fused=fused)
            layer = MoE(MoEConfig(num_experts=8, hidden=16, **keys | {"router": router}), dim=32, layer=0)
            with torch.no_grad():
                for p in layer.parameters():
                    p.copy_(torch.randn(p.shape) * 0.3)
            x = torch.randn(2, 24, 32).requires_grad_()
            mask_BS = torch.arange(24)[None] < torch.tensor([24, 19])[:, None]
            ctx = Context(0, 0, torch.arange(2), torch.arange(24), 43.0, mask_BS=mask_BS)
            ctx = replace(ctx, ids={}, scores={})
            y, _ = layer(x, {}, ctx)
            y.backward(torch.randn(2, 24, 32))
            assert ctx.ids is not None
            runs.append(([y.detach(), x.grad, *[p.grad for p in layer.parameters()]], ctx.ids[0], layer.load_ME))
        (mine, my_ids, my_load), (theirs, ids, load) = runs
        found[name] = {
            "choices": torch.equal(my_ids, ids) and torch.equal(my_load, load),
            "errors": [error(a, b.double()) for a, b in zip(mine, theirs, strict=True) if b is not None],
        }
    return found


def build() -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moetrain.kernels import triton_routing as kernels

    plain = {"GROUPED": False, "BEST": 1, "GROUPS": 16}
    cases = [
        (kernels.choose_kernel, plain | {"WIDTH": 16, "BLOCK_T": 256}),
        (kernels.choose_kernel, plain | {"WIDTH": 128, "BLOCK_T": 32}),
        (kernels.choose_kernel, {"GROUPED": True, "BEST": 2, "GROUPS": 16, "WIDTH": 256, "BLOCK_T": 16}),
        (kernels.weigh_kernel, {"NORMED": True, "BLOCK_T": 128}),
        (kernels.weigh_grad_kernel, {"NORMED": True, "WIDTH": 16, "BLOCK_T": 256}),
        (kernels.weigh_grad_kernel, {"NORMED": True, "WIDTH": 256, "BLOCK_T": 16}),
        (kernels.count_kernel, {"BINS": 128, "BLOCK_N": 256}),
        (kernels.place_kernel, {"BLOCK_N": 256, "PART": 16}),
    ]
    found = {}
    for kernel, constants in cases:
        types = {name: kind(name) for name in kernel.arg_names if name not in constants}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        built = triton.compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 90, 32))
        found[f"{kernel.__name__} {constants}"] = spilled(built.asm["ptx"])
    return found


def kind(name: str) -> str:
    """The type of a kernel's argument."""
    known = {"scale": "fp32", "counts": "*i32", "ends": "*i32"} | dict.fromkeys(
        ("ids", "keys", "order", "back"), "*i64"
    )
    return known.get(name) or ("i32" if name.startswith("num_") or name.isupper() else "*fp32")


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        print(json.dumps(build()))
    else:
        print(json.dumps({"routers": routers(), "orders": orders(), "layers": layers()}))
