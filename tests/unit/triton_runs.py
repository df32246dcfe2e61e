"""How Triton's kernels are tested where there is no GPU: in processes of their own, and built for a Hopper."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def need_triton() -> None:
    """Skips the module that calls it, and says why."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed here (it has wheels for Linux alone)", allow_module_level=True)
    if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("Triton 3.6's interpreter does not run with numpy 2.4", allow_module_level=True)


def run(cases: str, *words: str, **environment: str) -> dict:
    """What ``cases``, a file beside this one, prints; Triton is told by the environment, at its import, how to run."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(cases), *words], env=os.environ | environment, capture_output=True,
        text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def spilled(ptx: str) -> int:
    """Bytes of registers that sm_90's assembler stores in memory."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    done = subprocess.run(
        [ptxas, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", "/dev/stdin"], input=ptx, capture_output=True, text=True
    )
    found = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert found, done.stderr
    return int(found[1])
