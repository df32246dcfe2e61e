"""What ``test_triton.py`` runs in processes of its own, where Triton is told at its import how to run. Prints JSON.

interpret   the kernels in Triton's interpreter, beside float64 and F.grouped_mm
            those in float8 beside the emulation of it
compile     the kernels built for sm_90, on any machine: registers spilled, shared memory, tensor core instructions
"""

import json
import sys
from functools import partial

import torch
from triton_runs import spilled

from moetrain import deferred
from moetrain.kernels import Kernel, float8, fused, grouped, reference
from moetrain.moe.dispatchers.allgather import AllGather
from moetrain.moe.dispatchers.capacity import Capacity
from moetrain.moe.dispatchers.dropless import Dropless
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.routers.topk import TopK
from moetrain.moe.rows import inverse
from moetrain.moe.types import Context, Rows

COUNTS = {
    "ragged": ([37, 0, 90, 1, 200], 2, 64, 96),
    "all to one": ([0, 200, 0, 0], 4, 96, 160),
    "even": ([48] * 4, 1, 160, 64),
    "first and last empty": ([0, 129, 127, 0], 2, 32, 32),
    "one row": ([0, 0, 1], 1, 64, 64),
    "no rows": ([0, 0, 0], 1, 64, 64),
}
IN_FLOAT8 = {
    "ragged": ([37, 0, 90, 1, 200], 2, 128, 256),
    "all to one": ([0, 130, 0], 1, 256, 128),
    "no rows": ([0, 0], 1, 128, 128),
}
TAIL = 7  # rows past the last offset, which nobody may read


def leaves(counts: list[int], top_k: int, dim: int, hidden: int) -> tuple[dict[str, torch.Tensor], Rows]:
    E, M = len(counts), sum(counts)
    N = M // top_k
    ids_M = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))[torch.randperm(M)]
    order_M = ids_M.argsort(stable=True)
    t = {
        "x": torch.randn(N, dim) * 0.3, "weights": torch.rand(M + TAIL), "g": torch.randn(N, dim),
        "gate_up": torch.randn(E, 2, hidden, dim) * 0.3, "down": torch.randn(E, dim, hidden) * 0.3,
    }  # fmt: skip
    index_M = torch.cat([order_M // top_k, torch.full((TAIL,), -1)])
    offsets_S = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    return t, Rows(t["x"], index_M, inverse(order_M).view(N, top_k), offsets_S, t["weights"], ragged=True)


def compute(backend, t: dict[str, torch.Tensor], rows: Rows, dtype: torch.dtype, *, later: bool = False) -> list:
    x, weights, gate_up, down = (
        t[n].to(dtype, copy=True).requires_grad_() for n in ("x", "weights", "gate_up", "down")
    )
    rows = Rows(x, rows.index_M, rows.back_NJ, rows.offsets_S, weights, rows.ragged)
    with deferred.splittable(later):
        y = backend(rows, gate_up * 1, down * 1)
    queue: deferred.Queue = []
    with deferred.into(queue if later else None):
        y.backward(t["g"].to(dtype), retain_graph=later)
    if later:
        assert gate_up.grad is None, "the weights' gradients were to wait"
        assert len(queue) == 2
        deferred.run(queue)
    assert weights.grad is not None
    return [y.detach(), x.grad, weights.grad[:-TAIL], gate_up.grad, down.grad]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    if not want.numel() or not want.norm():
        return float(got.double().norm()) if got.isfinite().all() else torch.inf
    found = ((got.double() - want).norm() / want.norm()).item()
    return found if found == found else torch.inf


def interpret() -> dict:
    torch.manual_seed(0)
    found: dict[str, dict] = {}
    for name, (counts, top_k, dim, hidden) in COUNTS.items():
        t, rows = leaves(counts, top_k, dim, hidden)
        for dtype in (torch.float32, torch.float16):
            t = {n: x.to(dtype) for n, x in t.items()}
            want = compute(reference.swiglu, t, rows, torch.float64)
            got = compute(fused.swiglu, t, rows, dtype)
            theirs = compute(grouped.swiglu, t, rows, dtype)
            once_more = compute(fused.swiglu, t, rows, dtype)
            case = {
                "errors": [error(a, b) for a, b in zip(got, want, strict=True)],
                "of grouped_mm": [error(a, b) for a, b in zip(theirs, want, strict=True)],
                "replay": all(torch.equal(a, b) for a, b in zip(got, once_more, strict=True)),
            }
            if sum(counts):
                later = compute(fused.swiglu, t, rows, dtype, later=True)
                case["deferred"] = all(torch.equal(a, b) for a, b in zip(got, later, strict=True))
            found[f"{name}, {dtype}"] = case
    for name, (counts, top_k, dim, hidden) in IN_FLOAT8.items():
        t, rows = leaves(counts, top_k, dim, hidden)
        want = compute(partial(float8.swiglu, 128), t, rows, torch.float32)
        ours = partial(fused.swiglu, in_float8=True)
        got, once_more = (compute(ours, t, rows, torch.float32) for _ in range(2))
        case = {
            "errors": [error(a, b.double()) for a, b in zip(got, want, strict=True)],
            "replay": all(torch.equal(a, b) for a, b in zip(got, once_more, strict=True)),
        }
        if sum(counts):
            later = compute(ours, t, rows, torch.float32, later=True)
            case["deferred"] = all(torch.equal(a, b) for a, b in zip(got, later, strict=True))
        found[f"{name}, float8"] = case
    for dispatcher in (Dropless(), Capacity(factor=1.0), AllGather()):
        found[type(dispatcher).__name__] = {"errors": layers(dispatcher), "replay": True}
    return found


def layers(dispatcher) -> list[float]:
    """A whole MoE layer with these kernels beside one with the reference in float64."""
    outs = []
    for kernel, dtype in ((Kernel.triton, torch.float32), (Kernel.reference, torch.float64)):
        torch.manual_seed(1)
        cfg = MoEConfig(num_experts=4, hidden=32, router=TopK(top_k=2), kernel=kernel, dispatcher=dispatcher)
        layer = MoE(cfg, dim=32, layer=0)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape) * 0.3)
        layer = layer.to(dtype)
        x = torch.randn(2, 24, 32).to(dtype).requires_grad_()
        mask_BS = torch.arange(24)[None] < torch.tensor([24, 19])[:, None]
        ctx = Context(0, 0, torch.arange(2), torch.arange(24), 48.0, mask_BS=mask_BS)
        y, _ = layer(x, {}, ctx)
        y.backward(torch.randn(2, 24, 32).to(dtype))
        outs.append([y.detach(), x.grad, *[p.grad for p in layer.parameters()]])
    return [error(a, b) for a, b in zip(*outs, strict=True)]


def build() -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moetrain.kernels import triton_fp8
    from moetrain.kernels import triton_launch as launch

    every = "--all" in sys.argv
    shared = {"PRECISION": "tf32", "BLOCK_K": 64}
    kernels = [  # how it is tuned, the constants that are given to it
        (launch._up, {"BLOCK_M": 128}), (launch._rows, {"BLOCK_M": 128, "KN": False}),
        (launch._rows, {"BLOCK_M": 128, "KN": True}), (launch._down_grad, {"BLOCK_M": 128, "BLOCK_N": 128}),
        (launch._weights, {"GATHER_LEFT": True}), (launch._weights, {"GATHER_LEFT": False}),
    ]  # fmt: skip
    tile = triton_fp8.TILE
    eight = {"BLOCK_M": 128, "BLOCK_K": tile}
    kernels += [
        (triton_fp8._up, eight),
        (triton_fp8._rows, eight),
        (triton_fp8._down_grad, eight | {"BLOCK_N": tile // 2}),
    ]
    found = {}
    for tuned, given in kernels:
        kernel = tuned.fn
        for config in tuned.configs[: None if every else 1]:
            constants = shared | given | config.kwargs
            constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
            types = {name: kind(name, kernel.arg_names) for name in kernel.arg_names if name not in constants}
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            at = {i: name for i, name in enumerate(kernel.arg_names) if name in types}
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in at.items() if types[n][0] == "*" or len(n) == 1}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            built = triton.compile(
                ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
            )
            found[f"{kernel.__name__} {given} {config}"] = {
                "spilled": spilled(built.asm["ptx"]), "shared": built.metadata.shared,
                "wgmma": built.asm["ptx"].count("wgmma.mma_async"), "copies": built.asm["ptx"].count("cp.async"),
                "float8": built.asm["ptx"].count("e4m3.e4m3"),
            }  # fmt: skip
    return found


def kind(name: str, of: list[str]) -> str:
    """The type of one of a kernel's arguments in a bf16 run; what comes with scales is float8."""
    if f"{name}_scale" in of:
        return "*fp8e4nv"
    known = {"index": "*i64", "tiles": "*i32", "offsets": "*i32", "weights": "*fp32"}
    known |= {n: "*fp32" for n in of if n.endswith("_scale")}
    return known.get(name) or ("i32" if name.startswith("num_") or name.isupper() else "*bf16")


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": build}[sys.argv[1]]()))
