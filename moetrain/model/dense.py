"""The dense parts of a block as functions of tensors, so that they can be compiled: all of a rank alone between two
collectives. Weights are cast to the activations' dtype at use, like those of ``layers.py``, which are the same sums."""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, Tensor | None]
"""(O, I) and (O,) or None, of a ``Linear``."""


def project(
    x_BSD: Tensor, norm_D: Tensor | None, projections: tuple[Weights, Weights, Weights],
    norms: tuple[Tensor, Tensor] | None, cos_Sd: Tensor, sin_Sd: Tensor, *, eps: float, whole_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(B, S, D) -> q (B, S, H, d), k and v (B, S, G, d), rotated; ``norm_D`` None: x is normed already.

    ``norms`` are those of q and k: of each head, or ``whole_norms``, of all heads together.
    """
    h_BSD = x_BSD if norm_D is None else rms_norm(x_BSD, norm_D, eps)
    q, k, v = (linear(h_BSD, *weights) for weights in projections)
    if norms is not None and whole_norms:
        q, k = (rms_norm(t, norm, eps) for t, norm in zip((q, k), norms, strict=True))
    q, k, v = (t.unflatten(-1, (-1, cos_Sd.shape[1])) for t in (q, k, v))
    if norms is not None and not whole_norms:
        q, k = (rms_norm(t, norm, eps) for t, norm in zip((q, k), norms, strict=True))
    return rotated(q, cos_Sd, sin_Sd), rotated(k, cos_Sd, sin_Sd), v


def close(x_BSD: Tensor, y_BSHd: Tensor, out: Weights, norm_D: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """What attention adds to x, and the norm of that sum, which the FFN takes."""
    x_BSD = x_BSD + linear(y_BSHd.flatten(2), *out)
    return x_BSD, rms_norm(x_BSD, norm_D, eps)


def swiglu(x_BSD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    return linear(F.silu(linear(x_BSD, gate_FD)) * linear(x_BSD, up_FD), down_DF)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.to(x.dtype)).to(x.dtype)


def rotated(x_BSHd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    a, b = x_BSHd.chunk(2, dim=-1)
    cos_S1d, sin_S1d = (t.to(x_BSHd.dtype)[:, None, :] for t in (cos_Sd, sin_Sd))
    return torch.cat([b, a], dim=-1) * sin_S1d + x_BSHd * cos_S1d
