"""One tensor of the run, whoever holds it: the boxes of it that lie on this rank. What init, optimizer state and
checkpoints are keyed by: a global name and global indices, never a rank."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class DTypeName(Enum):
    """Base of the choices of a config that name one of torch's dtypes."""

    @property
    def torch(self) -> torch.dtype:
        return getattr(torch, self.value)


@dataclass(frozen=True)
class Chunk:
    """A box of a logical tensor: ``tensor`` is this rank's storage, read and written in place."""

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Logical:
    """``chunks`` are this rank's boxes, possibly none; several ranks may hold the same box."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
