"""A router's choice, its weights and the order of rows by target in few launches (``triton_routing.py``): choices and
order have the bits of torch's path; weights are as near to float64. Nothing here waits for the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moetrain.config import UserError
from moetrain.kernels import fused


@dataclass(frozen=True)
class Groups:
    """A token chooses within the ``most`` of ``count`` runs of experts whose ``best`` scores add up to most."""

    count: int
    most: int
    best: int  # 1 or 2: a sum of more has an order


def check(*, device: torch.device, dtype: torch.dtype) -> str:
    """What is said of it at a run's start; raises ``UserError`` where it cannot run. ``dtype``: what is computed in."""
    why = fused.unfit_at(device)
    if why is None and dtype is torch.float64:
        why = "the Triton kernels route in float32, not in float64"
    if why:
        raise UserError(f"model.moe.router.fused=true: {why}; use model.moe.router.fused=false")
    return "routing triton: asked for" + ", interpreted" * fused.interpreted()


def choose(steering_TE: Tensor, bias_E: Tensor, k: int, *, groups: Groups | None = None) -> Tensor:
    """(T, E), (E,) float32 -> (T, k) int64: the highest of their sum, in that order, ties to the lower id."""
    (T, E), g = steering_TE.shape, groups or Groups(1, 1, 1)
    ids_TK = steering_TE.new_empty(T, k, dtype=torch.int64)
    width = _power_of_2(E)
    high = max(1, 4096 // width)
    _start(
        "choose_kernel", T, high, steering_TE.detach().contiguous(), bias_E, ids_TK, T, E, k, g.count, g.most,
        GROUPED=groups is not None, BEST=g.best, WIDTH=width, GROUPS=_power_of_2(g.count), BLOCK_T=high,
    )  # fmt: skip
    return ids_TK


def weigh(scores_TE: Tensor, ids_TK: Tensor, *, normed: bool, scale: float) -> Tensor:
    """(T, E), (T, K) -> (T, K): the scores of these ids, each divided by their sum if ``normed``, times ``scale``."""
    return _Weigh.apply(scores_TE, ids_TK, normed, scale)  # pyright: ignore[reportReturnType]


def order(keys_N: Tensor, *, num_keys: int) -> tuple[Tensor, Tensor]:
    """(N,) int64 in [0, num_keys) -> a stable argsort and its inverse."""
    N = keys_N.numel()
    order_N, back_N = torch.empty_like(keys_N), torch.empty_like(keys_N)
    block = 256
    counts = keys_N.new_empty(num_keys, -(-N // block), dtype=torch.int32)
    _start("count_kernel", N, block, keys_N, counts, N, num_keys, BINS=_power_of_2(num_keys + 1), BLOCK_N=block)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    _start("place_kernel", N, block, keys_N, counts, ends, order_N, back_N, N, BLOCK_N=block, PART=16)
    return order_N, back_N


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores_TE: Tensor, ids_TK: Tensor, normed: bool, scale: float) -> Tensor:
        scores_TE, ids_TK = scores_TE.contiguous(), ids_TK.contiguous()
        ctx.save_for_backward(scores_TE, ids_TK)
        ctx.normed, ctx.scale = normed, scale
        (T, E), K, weights_TK = scores_TE.shape, ids_TK.shape[1], scores_TE.new_empty(ids_TK.shape)
        _start("weigh_kernel", T, 128, scores_TE, ids_TK, weights_TK, scale, T, E, K, NORMED=normed, BLOCK_T=128)
        return weights_TK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_TK: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        scores_TE, ids_TK = ctx.saved_tensors
        (T, E), K, d_scores_TE = scores_TE.shape, ids_TK.shape[1], torch.empty_like(scores_TE)
        width = _power_of_2(E)
        high = max(1, 4096 // width)
        _start(
            "weigh_grad_kernel", T, high, g_TK.contiguous(), scores_TE, ids_TK, d_scores_TE, ctx.scale, T, E, K,
            NORMED=ctx.normed, WIDTH=width, BLOCK_T=high,
        )  # fmt: skip
        return d_scores_TE, None, None, None


def _start(name: str, rows: int, high: int, *args: Any, **constants: Any) -> None:
    """A program for every ``high`` of ``rows``."""
    if rows == 0 or isinstance(args[0], FakeTensor):  # a dry run's: what is allocated counts, nothing is computed
        return
    from moetrain.kernels import triton_routing  # Triton takes a while to import, and may not be there

    getattr(triton_routing, name)[(-(-rows // high),)](*args, **constants)


def _power_of_2(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
