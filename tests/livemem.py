"""Bytes of tensors that are alive: between steps by looking at all, during a step by watching them come and go."""

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain import comm


def alive() -> int:
    """Bytes of every storage that a tensor of this process has, each counted once."""
    gc.collect()
    sizes = {}
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor) and x.device.type != "meta":
            local = getattr(x, "_local_tensor", x)  # a DTensor's own storage claims the global size
            storage = local.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


class Peak(TorchDispatchMode):
    """Inside it, ``most`` is the largest sum of bytes of the storages that operations have made and not yet dropped.

    What gloo's reduce-scatter copies for itself is not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}
        self._blind = False

    def __enter__(self):
        resize = self._resize = torch.UntypedStorage.resize_

        def watched(storage, size):
            resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)

        torch.UntypedStorage.resize_ = watched  # FSDP2 frees gathered weights by resizing their storage
        reduce_scatter = self._reduce_scatter = comm.reduce_scatter

        def unseen(*args, **kwargs):
            self._blind = True  # gloo copies its input, NCCL does not
            try:
                return reduce_scatter(*args, **kwargs)
            finally:
                self._blind = False

        comm.reduce_scatter = unseen
        return super().__enter__()

    def __exit__(self, *args) -> None:
        torch.UntypedStorage.resize_ = self._resize
        comm.reduce_scatter = self._reduce_scatter
        super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in [] if self._blind else tree_leaves(out):
            if isinstance(x, torch.Tensor) and not hasattr(x, "_local_tensor") and x.device.type != "meta":
                storage = x.untyped_storage()
                if storage._cdata not in self._sizes:
                    weakref.finalize(storage, self._drop, storage._cdata)
                    self._set(storage._cdata, storage.nbytes())
        return out

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.most = max(self.most, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
