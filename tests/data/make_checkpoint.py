"""Frozen checkpoints of every format: their tensors in closed form. Run it to write the newest one (a new format only).

``python tests/data/make_checkpoint.py`` refuses to overwrite: what is on disk is what past versions wrote.
"""

from pathlib import Path

import torch
from torch import Tensor

from moetrain import checkpoint
from moetrain.checkpoint import Chunk, Logical

FOLDERS = [Path(__file__).parent / f"checkpoint-v{version}" / "step-00000003" for version in (1, 2)]
META = {"step": 3, "consumed_samples": 96, "loss": 2.5, "skipped": [[4, 8]], "note": "é"}

SHAPES = {
    "embedding.weight": ((24, 8), torch.float32),
    "layers.0.attention.wq.weight": ((8, 8), torch.bfloat16),
    "layers.0.moe.experts.w1": ((5, 6, 8), torch.bfloat16),
    "layers.0.moe.expert_bias": ((5,), torch.float64),
    "optim.exp_avg.layers.0.moe.experts.w1": ((5, 6, 8), torch.float32),
    "optim.exp_avg_sq.embedding.weight": ((24, 8), torch.float16),
    "optim.step": ((), torch.int64),
    "data.cursor": ((7,), torch.int32),
    "data.bytes": ((11,), torch.uint8),
    "layers.0.mask": ((3, 3), torch.bool),
    "layers.0.empty": ((0, 4), torch.float32),
}
OWNER_E = (1, 0, 1, 2, 0)
"""Whose expert is whose: the order in which the experts' boxes are described."""


def value(name: str) -> Tensor:
    """Element i of tensor number n is (13 i + 7 n) mod 127, in quarters and of either sign where the dtype has them."""
    shape, dtype = SHAPES[name]
    number = list(SHAPES).index(name)
    cells = (13 * torch.arange(torch.Size(shape).numel()) + 7 * number) % 127
    if dtype == torch.bool:
        return (cells % 2 == 1).reshape(shape)
    return ((cells - 63) / 4 if dtype.is_floating_point else cells).to(dtype).reshape(shape)


def logical(name: str, tensor: Tensor) -> Logical:
    """The tensor in the boxes in which it was saved: experts by owner and cut in two, wide tensors by rows."""
    shape, dtype = SHAPES[name]
    boxes: list[tuple[slice, ...]] = [()]
    if ".experts." in name:
        order = sorted(range(len(OWNER_E)), key=lambda e: OWNER_E[e])
        boxes = [(slice(e, e + 1), slice(cut, cut + 3)) for e in order for cut in (0, 3)]
    elif shape[:1] == (24,):
        boxes = [(slice(at, min(at + 10, 24)),) for at in range(0, 24, 10)]
    chunks = tuple(Chunk(tuple(s.start for s in box) + (0,) * (len(shape) - len(box)), tensor[box]) for box in boxes)
    return Logical(shape, dtype, chunks)


if __name__ == "__main__":
    checkpoint.save(FOLDERS[-1], {name: logical(name, value(name)) for name in SHAPES}, META, group=None)
