"""Where libraries keep what they compile: below the run's folder, or ``run.cache``, so that two jobs never share it.

Their own places are in the home or the temporary folder: of a node that others use too, or of one that is small. What
the user's environment says comes first.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "PYTORCH_KERNEL_CACHE_PATH": "kernels",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
}
_ours: dict[str, str] = {}


def keep_in(folder: Path) -> None:
    """In this process and those that it starts; before anything is compiled."""
    for name, sub in _FOLDERS.items():
        if os.environ.get(name) == _ours.get(name):  # neither is there, or it is that of a sweep's job before
            os.environ[name] = _ours[name] = str(folder.expanduser().absolute() / sub)


@contextmanager
def unused() -> Iterator[None]:
    """While torch is imported, by which it makes a folder in the temporary one, and says so in the environment."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = os.sep  # a folder that is there already
    try:
        yield
    finally:
        del os.environ[name]
