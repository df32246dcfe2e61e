"""The dense parts: RMSNorm, rotary positions, SwiGLU. Weights are cast to the activations' dtype at use."""

import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import comm, compiling, deferred
from moetrain.config import UserError, config
from moetrain.model import dense


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv 1910.07467); with a ``group``, over its ranks' dimensions together, each of
    which is held equally often."""

    group: ProcessGroup | None = None

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        weight = self.weight.to(x.dtype)
        if self.group is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            dims = x.shape[-1] * self.group.size()
            mean = (
                comm.all_sum(wide.square().sum(-1, keepdim=True), group=self.group) / dims
            )  # copies of a dimension cancel
            return (wide * (mean + self.eps).rsqrt() * weight).to(x.dtype)
        if x.device.type != "cpu":
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """torch has no fused kernel on a CPU: the same in float32 or wider, with few passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        normal = x * scale  # float32 or wider, as the scale is
        d_weight = (g * normal).flatten(0, -2).sum(0)
        gw = weight * g if g.dtype == scale.dtype else weight.to(scale.dtype) * g
        along = (gw * normal).mean(-1, keepdim=True)
        return gw.sub_(normal.mul_(along)).mul_(scale).to(x.dtype), d_weight.to(weight.dtype), None


class Linear(nn.Module):
    """y = x W^T (+ b), the weight stored "out, in"."""

    def __init__(self, dim_in: int, dim_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        self.bias = nn.Parameter(torch.empty(dim_out)) if bias else None

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return deferred.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202): dense layers and shared experts.

    With a ``group``, each rank has a slice of the hidden width.
    """

    group: ProcessGroup | None = None
    compiled: bool = False

    def __init__(self, dim: int, *, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = Linear(dim, hidden), Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); in a ``group``, S is gathered before and this rank's shard after."""
        if compiling.active(self.compiled):
            swiglu = compiling.compiled(dense.swiglu)
            y_BSD = swiglu(x_BSD, self.gate.weight, self.up.weight, self.down.weight)
        else:
            y_BSD = self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))
        return comm.scatter_sum(y_BSD, dim=1, group=self.group)


class Scaling(Enum):
    none = "none"
    linear = "linear"
    yarn = "yarn"


@config
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), stretched by ``factor``: ``linear`` (2306.15595), ``yarn`` (2309.00071)."""

    theta: float = 10000.0
    scaling: Scaling = Scaling.none
    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(f"model.rope.factor={self.factor}: positions are stretched by 1 or more")


class Rope(nn.Module):
    """Positions -> (cos, sin) tables; no parameters."""

    def __init__(self, cfg: RopeConfig, *, head_dim: int) -> None:
        super().__init__()
        self.cfg, self.head_dim = cfg, head_dim

    def forward(self, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) -> two (S, head_dim) float64 tables, of what multiplies an element and what its partner in the other
        half; YaRN's attention factor included (its eq. 22)."""
        angle_SH = position_S.double()[:, None] * self.frequencies(position_S.device)
        stretch = self.cfg.scaling is Scaling.yarn and self.cfg.factor > 1
        factor = 0.1 * math.log(self.cfg.factor) + 1.0 if stretch else 1.0
        cos_SH, sin_SH = angle_SH.cos() * factor, angle_SH.sin() * factor
        return torch.cat([cos_SH, cos_SH], dim=-1), torch.cat([-sin_SH, sin_SH], dim=-1)

    def frequencies(self, device: torch.device) -> Tensor:
        """(head_dim / 2,) float64 radians a position."""
        cfg, half = self.cfg, self.head_dim // 2
        freq_H = cfg.theta ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        if cfg.scaling is Scaling.none:
            return freq_H
        if cfg.scaling is Scaling.linear:
            return freq_H / cfg.factor
        # YaRN: dimensions that turn often in the original length are kept, slow ones interpolated, a ramp between
        low, high = (self._dimension(beta) for beta in (cfg.beta_fast, cfg.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.head_dim - 1)
        ramp_H = (torch.arange(half, device=device, dtype=torch.float64) - low) / max(high - low, 0.001)
        keep_H = 1 - ramp_H.clamp(0, 1)
        return freq_H * keep_H + freq_H / cfg.factor * (1 - keep_H)

    def _dimension(self, rotations: float) -> float:
        """The dimension that turns ``rotations`` times within the original length."""
        turns = self.cfg.original_length / (rotations * 2 * math.pi)
        return self.head_dim * math.log(turns) / (2 * math.log(self.cfg.theta))


def rotate(x_BSHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """(B, S, heads, d) rotated by its position, halves paired as in Llama's published weights."""
    return _Rotate.apply(x_BSHd, *(t.to(x_BSHd.dtype)[:, None, :] for t in rope))  # pyright: ignore


class _Rotate(torch.autograd.Function):
    """Passes over whole rows: over halves of heads, an elementwise kernel has 16 numbers at a time or so."""

    @staticmethod
    def forward(ctx, x_BSHd: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S1d, sin_S1d)
        return _turn(x_BSHd, cos_S1d, sin_S1d)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_BSHd: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos_S1d, sin_S1d = ctx.saved_tensors
        return _turn(g_BSHd, cos_S1d, -sin_S1d), None, None


def _turn(x_BSHd: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
    a, b = x_BSHd.chunk(2, dim=-1)
    return torch.cat([b, a], dim=-1).mul_(sin_S1d).add_(x_BSHd * cos_S1d)
