"""What ``test_triton_adamw.py`` runs in processes of its own, where Triton is told at its import how to run. Prints
JSON.

interpret   the kernel in Triton's interpreter beside torch's operations: how many elements differ, and by how much
compile     the kernel built for sm_90, on any machine
"""

import json
import re
import sys
from itertools import product

import torch
from torch import Tensor
from triton_runs import spilled

from moetrain.logical import Chunk, Logical
from moetrain.optim import OptimConfig, Optimizer, StateDType, UpdateKernel

SHAPES = {"blocks.0.attention.q.weight": (33, 24), "blocks.0.ffn_norm.weight": (131,), "experts": (3, 2, 6, 7)}


def describe(name: str, box: Tensor) -> Logical:
    """Experts 0, 1 and 4 of six, and of each a slice of the width that ends in padding; the rest is whole."""
    if name != "experts":
        return Logical(tuple(box.shape), box.dtype, (Chunk((0,) * box.dim(), box),))
    chunks = tuple(Chunk((e, 0, 6, 0), box[i : i + 1, :, :5]) for i, e in enumerate((0, 1, 4)))
    return Logical((6, 2, 11, 7), box.dtype, chunks)


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    for row, value in enumerate((0.0, 1e-30, 1e-20, 1e10)):  # averages of squares below what is normal, and large
        found["blocks.0.attention.q.weight"][row] *= value
    found["experts"][:, :, 5:] = 0
    return found


def after(kernel: UpdateKernel, weight: torch.dtype, state: StateDType, *, skips: bool) -> dict[str, Tensor]:
    cfg = OptimConfig(state_dtype=state, kernel=kernel)
    weights = {n: (t * 0.02).to(weight) for n, t in tensors(0).items()}
    optimizer = Optimizer(cfg, weights, describe=describe, seed=9)
    for step in range(4):
        skip = torch.tensor(step == 2) if skips else None
        optimizer.adamw.step(tensors(step + 1), lr=1e-3, scale=torch.tensor(0.7).double(), skip=skip, step=step)
    return weights | {f"{kind} of {n}": x for kind, states in optimizer.state().items() for n, x in states.items()}


def interpret() -> dict:
    found = {}
    for weight, state, skips in product((torch.float32, torch.bfloat16), StateDType, (False, True)):
        if weight is torch.float32 and state is StateDType.float32:
            continue  # torch has a fused kernel of its own, which rounds otherwise
        want, got = (after(k, weight, state, skips=skips) for k in (UpdateKernel.torch, UpdateKernel.triton))
        case = found[f"weights {weight}, state {state.value}, {'with' if skips else 'without'} skips"] = {}
        for name, x in want.items():
            if x.dtype is torch.bfloat16:
                apart = (x.view(torch.int16).long() - got[name].view(torch.int16).long()).abs()
            else:  # in float32's rounding of the largest number around: updates and weights cancel
                largest = torch.maximum(x.abs(), got[name].abs()).amax(-1, keepdim=True)
                apart = (x - got[name]).abs() / (largest * 2.0**-24).clamp_min(1e-45)
            assert got[name].isfinite().all(), name
            different = float((x != got[name]).double().mean())
            case[name] = {"apart": float(apart.max()), "different": different, "bits": 8 * x.itemsize}
    return found


def build() -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moetrain.kernels.triton_adamw import adamw_kernel as kernel

    given = {p.name: p.annotation_type for p in kernel.params}
    found = {}
    for weights, averages, aligned in product(("*i16", "*fp32"), ("*i16", "*fp32"), (True, False)):
        constants = {"ROUND": weights == "*i16", "ALIGNED": aligned, "QUADS": 256}
        types = {"weights": weights, "grads": "*fp32", "first": averages, "second": averages, "known": "*fp32"}
        signature = {n: "constexpr" if n in constants else types.get(n) or given[n] for n in kernel.arg_names}
        even = {"start", "pitch", "cols"}
        aligned_at = [i for i, n in enumerate(kernel.arg_names) if n in types or (n in even and aligned)]
        attrs = {(i,): [["tt.divisibility", 16]] for i in aligned_at}
        built = triton.compile(ASTSource(kernel, signature, constants, attrs), target=GPUTarget("cuda", 90, 32))
        moves = re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", built.asm["ptx"])
        found[f"weights {weights}, averages {averages}, {'aligned' if aligned else 'anywhere'}"] = {
            "spilled": spilled(built.asm["ptx"]), "shared": built.metadata.shared, "aligned": aligned,
            "bytes at once": sorted(int(width) * int(many or 1) // 8 for many, width in moves),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": build}[sys.argv[1]]()))
