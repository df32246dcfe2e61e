"""Grouped GEMM through torch's own ``F.grouped_mm``: no host sync, the same call on CPU and GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.rows import gather
from moetrain.moe.types import Rows


def unfit(*, dtype: torch.dtype, dim: int, hidden: int) -> str | None:
    """Why ``F.grouped_mm`` cannot compute this, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"F.grouped_mm does not take {dtype}"
    multiple = 16 // dtype.itemsize  # its strides have to be multiples of 16 bytes, on CPUs too
    if dim % multiple or hidden % multiple:
        return f"F.grouped_mm needs widths that are multiples of {multiple} in {dtype} (dim {dim}, hidden {hidden})"
    return None


def swiglu(rows: Rows, gate_up_S2FD: Tensor, down_SDF: Tensor) -> Tensor:
    """See ``kernels/__init__.py``. The combine weight multiplies the hidden row, which is narrower than y."""
    x_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    gate_up_SDG = gate_up_S2FD.flatten(1, 2).transpose(1, 2)
    gate_MF, up_MF = F.grouped_mm(x_MD, gate_up_SDG, offs=rows.offsets_S).chunk(2, dim=-1)
    hidden_MF = F.silu(gate_MF) * up_MF * rows.weights_M[:, None].to(x_MD.dtype)
    return F.grouped_mm(hidden_MF, down_SDF.transpose(1, 2), offs=rows.offsets_S)
