"""torch.compile: a function of tensors becomes a few kernels, which are made at its first call (``train.compile``).

What is compiled is a function, not a module: hooks, sharded storage and collectives stay outside, and layers whose
shapes are alike share what was compiled. Calls without gradients (validation) run as they are written.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.config import UserError

_FORMS = 64
"""Shapes, dtypes and strides that a function may be compiled for, in one process."""


def check(device: torch.device) -> None:
    """Raise ``UserError`` where nothing can be compiled here: known before anything is imported or begun."""
    rule = "train.compile=true"
    if device.type != "cpu":
        if importlib.util.find_spec("triton") is None:
            raise UserError(f"{rule} needs Triton on a GPU, which is not installed: set train.compile=false")
        wanted = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
        if not any(shutil.which(name) for name in wanted):
            raise UserError(
                f"{rule} needs a C compiler for Triton, and there is no {' or '.join(wanted)} here: install one, set "
                f"CC, or set train.compile=false"
            )
        return
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{rule} needs a C++ compiler, and there is no {compiler} here: install it, set CXX to another, or set "
            f"train.compile=false"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise UserError(
            f"{rule} needs Python's headers, and there is no {header}: install them (python3-dev), or set "
            f"train.compile=false"
        )


def active(on: bool) -> bool:
    """Whether what may be compiled is to be, now: validation, which wants no gradients, would compile all anew."""
    return on and torch.is_grad_enabled()


def any_rows(*tensors: Tensor) -> None:
    """Their first dimension is another one each time: what is compiled takes any."""
    for x in tensors:
        torch._dynamo.maybe_mark_dynamic(x, 0)  # pyright: ignore[reportPrivateImportUsage]


@functools.cache
def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` compiled. No break of its graph is allowed: what cannot be compiled is an error, not a slow path that
    nobody hears of."""
    import torch._dynamo  # takes a second or two
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = max(_FORMS, torch._dynamo.config.recompile_limit)
    if not torch.cuda.is_available():
        inductor.compile_threads = 1  # else each rank starts processes, for the one kernel that a graph has here
    return torch.compile(fn, fullgraph=True, dynamic=False)
