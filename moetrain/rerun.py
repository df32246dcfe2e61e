"""Results that backward computes again rather than finds kept (activation checkpointing, arXiv 1604.06174).

What a first run has to tell the second travels in the arguments: modules keep nothing of a micro-batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def rerun(fn: Callable[..., Any], *args: Any, on: bool = True) -> Any:
    """``fn(*args)``; if ``on``, only the arguments are kept: backward runs it again, up to the last result it needs.

    No generator's state is restored: random numbers are functions of the arguments.
    """
    if not on or not torch.is_grad_enabled():
        return fn(*args)
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)


def remake(make: Callable[[Tensor], Tensor], use: Callable[[Tensor], Any], x: Tensor) -> Any:
    """``use(make(x))``, which keeps x where ``use`` would keep what was made: backward makes it again, for all uses.

    For a result that is quickly made and widely used: ``use`` itself is not run again.
    """
    made = make(x)
    if not torch.is_grad_enabled():
        return use(made)
    hooks = _Made(make, x, made.untyped_storage()._cdata)
    with saved_tensors_hooks(hooks.pack, hooks.unpack):
        return use(made)


class _Made:
    """What autograd holds of a made tensor: how to lay a view over it when it is there again."""

    def __init__(self, make: Callable[[Tensor], Tensor], x: Tensor, storage: int) -> None:
        self.make, self.x, self.storage = make, x, storage
        self.waiting, self.made = 0, None

    def pack(self, kept: Tensor) -> Tensor | tuple:
        if kept.untyped_storage()._cdata != self.storage:
            return kept.detach()
        self.waiting += 1
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(self, packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.made is None:
            with torch.no_grad():
                self.made = self.make(self.x)
        made = self.made
        self.waiting -= 1
        if self.waiting <= 0:  # below 0 in a second backward, which makes it for each use
            self.made = None
        return made.as_strided(*packed)
