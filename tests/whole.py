"""The whole tensors of a checkpoint, on one process."""

from pathlib import Path

import torch
from torch import Tensor

from moetrain import checkpoint
from moetrain.logical import Chunk, Logical


def newest(folder: Path) -> Path:
    """The newest committed checkpoint of a run folder."""
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None, f"{folder} has no committed checkpoint"
    return found


def tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of one checkpoint."""
    whole = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in checkpoint.read_index(path).items()}
    boxes = {n: Logical(tuple(t.shape), t.dtype, (Chunk((0,) * t.dim(), t),)) for n, t in whole.items()}
    checkpoint.load(path, boxes, group=None)
    return whole
