"""An MoE layer alone, forward and backward apart: TFLOP/s and activation memory of the ``torch`` backend at 4 shapes.

    python benchmarks/gpu_layer.py cuda "NVIDIA H200" [--small]

The whole layer is timed: gate, top-k, sort, gather, two grouped GEMMs, combine; only the experts' matmuls count as
flops, 6 T K D F forward and 12 backward. bf16 weights and inputs, random tokens routed by a random gate. Between two
timings the inputs rotate and the L2 is overwritten. Median of 20. Activation memory is what is allocated between the
start and the end of the forward, the result among it, weights and input not.
"""

import gc
import statistics
import sys

import torch
from gpu_results import SHAPES, failed, layer_cell, measured, record
from gpu_timing import Timer

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.kernels import Kernel
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Context
from moetrain.telemetry.hardware import peak_flops

REPEATS, WARMUP, INPUTS = 20, 5, 3


def layer_of(shape: tuple[int, ...], device: torch.device) -> MoE:
    _, D, F, E, K = shape
    with torch.device(device):
        layer = MoE(
            MoEConfig(num_experts=E, hidden=F, router=TopK(top_k=K, renormalize=K > 1), kernel=Kernel.torch),
            dim=D,
            layer=0,
        )
    layer.to(torch.bfloat16)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02)
    layer.bias_E.zero_()
    return layer


def measure(shape: tuple[int, ...], device: torch.device, *, repeats: int, warmup: int) -> dict:
    T, D, F, _, K = shape
    layer = layer_of(shape, device)
    inputs = [torch.randn(1, T, D, device=device, dtype=torch.bfloat16) for _ in range(INPUTS)]
    grads = [torch.randn(1, T, D, device=device, dtype=torch.bfloat16) for _ in range(INPUTS)]
    position_S = torch.arange(T, device=device)
    ctx = Context(
        step=0, micro_batch=0, sample_B=torch.zeros(1, dtype=torch.int64), position_S=position_S, routed_tokens=1.0
    )
    timer, forward, backward, held = Timer(device), [], [], 0
    for i in range(warmup + repeats):
        x = inputs[i % INPUTS].detach().requires_grad_()
        for p in layer.parameters():
            p.grad = None
        layer.begin_step(1)
        timer.flush()
        before = timer.allocated()
        start = timer.mark()
        y, _ = layer(x, {}, ctx)
        middle = timer.mark()
        held = timer.allocated() - before
        y.backward(grads[i % INPUTS])
        end = timer.mark()
        if i >= warmup:
            forward.append(timer.seconds(start, middle))
            backward.append(timer.seconds(middle, end))
    flops = 6 * T * K * D * F
    load_E = layer.load_ME[0].double()
    fwd, bwd = statistics.median(forward), statistics.median(backward)
    both = 3 * flops / (fwd + bwd) / 1e12
    peak = peak_flops(device, torch.bfloat16)
    return measured(
        both, "TFLOP/s forward and backward",
        forward=f"{flops / fwd / 1e12:.4g} TFLOP/s, {fwd * 1e3:.4g} ms",
        backward=f"{2 * flops / bwd / 1e12:.4g} TFLOP/s, {bwd * 1e3:.4g} ms",
        spread=f"{min(forward) * 1e3:.4g} to {max(forward) * 1e3:.4g} ms forward",
        **({"of_peak": f"{both * 1e12 / peak:.1%}"} if peak else {}),
        activations=f"{held / 2**30:.3f} GiB",
        max_violation=f"{(load_E.max() / load_E.mean() - 1).item():.2f}",
    )  # fmt: skip


def main(device: torch.device, name: str, *, small: bool) -> int:
    bad = 0
    for shape in SHAPES:
        used = (shape[0] // 256, shape[1] // 8, shape[2] // 8, shape[3] // 8, max(1, shape[4] // 4)) if small else shape
        repeats, warmup = (2, 1) if small else (REPEATS, WARMUP)
        try:
            cell = measure(used, device, repeats=repeats, warmup=warmup)
        except Exception as error:
            bad, cell = 1, failed(f"{type(error).__name__}: {error}")
        print(layer_cell(shape), "as", used, cell, flush=True)
        record(name, {layer_cell(shape): cell})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return bad


if __name__ == "__main__":
    sys.exit(main(torch.device(sys.argv[1]), sys.argv[2], small="--small" in sys.argv))
