"""The truth: one expert after the other with plain matmuls, any dtype. One host sync a call, to split the rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import deferred
from moetrain.moe.rows import ends_on_host, gather, gather_sum
from moetrain.moe.types import Rows
from moetrain.rerun import rerun


def swiglu(rows: Rows, gate_up_S2FD: Tensor, down_SDF: Tensor, *, again: bool = False) -> Tensor:
    """See ``kernels/__init__.py``."""
    x_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    ends = ends_on_host(rows.offsets_S, num_rows=x_MD.shape[0])
    parts, start = [], 0
    for end, gate_up_2FD, down_DF in zip(ends, gate_up_S2FD, down_SDF, strict=True):
        gate_MF, up_MF = (deferred.linear(x_MD[start:end], w_FD) for w_FD in gate_up_2FD)
        parts.append(rerun(_down, gate_MF, up_MF, rows.weights_M[start:end, None], down_DF, on=again))
        start = end
    parts.append(x_MD.new_zeros(x_MD.shape[0] - start, x_MD.shape[1]))
    return gather_sum(torch.cat(parts), rows.index_M, rows.back_NJ, ragged=rows.ragged)


def _down(gate_MF: Tensor, up_MF: Tensor, weights_M1: Tensor, down_DF: Tensor) -> Tensor:
    return deferred.linear(F.silu(gate_MF) * up_MF * weights_M1.to(gate_MF.dtype), down_DF)
