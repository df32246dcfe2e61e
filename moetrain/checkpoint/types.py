"""What callers get back, a load's ``Report``, and what may be handed in: ``Logical`` tensors of these dtypes."""

from dataclasses import dataclass
from typing import Any

import torch

from moetrain.logical import Logical

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""Name on disk -> dtype."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Report:
    """What a load did, over all ranks of the group; names are sorted. ``missing`` were allowed to be."""

    meta: dict[str, Any]
    restored: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def check(name: str, logical: Logical) -> None:
    """Raises ``ValueError`` if the boxes of ``logical`` do not fit its shape and dtype."""
    if logical.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name}: {logical.dtype} cannot be saved: use one of {', '.join(DTYPES)}")
    if "[" in name or name in ("", "__metadata__"):
        raise ValueError(f"{name!r} cannot name a tensor: '[' separates a name from its box in the files")
    for chunk in logical.chunks:
        sizes = tuple(chunk.tensor.shape)
        if chunk.tensor.dtype != logical.dtype:
            raise ValueError(f"{name}: a chunk is {chunk.tensor.dtype}, the tensor {logical.dtype}")
        if not len(chunk.offsets) == len(sizes) == len(logical.shape) or any(
            offset < 0 or offset + size > whole
            for offset, size, whole in zip(chunk.offsets, sizes, logical.shape, strict=True)
        ):
            raise ValueError(f"{name}: box {list(chunk.offsets)} + {list(sizes)} is not inside {list(logical.shape)}")
