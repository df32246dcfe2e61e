"""What keeps steps alike: Python's garbage is collected at the same steps on all ranks, GPU memory comes in segments
that grow."""

import gc
import os

_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}


class Garbage:
    """Python's own collector stops a rank wherever its counters say, and all others wait for it. Here what is there
    after a life's first step is never looked at again, and the rest after every ``every``-th step of the run."""

    def __init__(self, every: int) -> None:
        """``every``: 0 leaves it to Python."""
        self.every, self._taken = every, False

    def after(self, step: int) -> None:
        if not self.every:
            return
        if not self._taken:
            self._taken = True
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % self.every == 0:
            gc.collect()

    def close(self) -> None:
        if self._taken:
            gc.enable()
            gc.unfreeze()


def set_allocator(settings: str | None) -> None:
    """Before anything is on a GPU: torch's settings of its allocator there, unless the user's environment has some."""
    if settings and not _VARIABLES & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = settings  # read with the first allocation
