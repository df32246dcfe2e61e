"""The driver's library of two GPUs that are not there, compiled of tests/unit/fake_nvml.c, for nvidia-ml-py to load."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "unit" / "fake_nvml.c"


def environment(folder: Path, **more: str) -> dict[str, str]:
    """That of a process which finds the library; skips the test where it cannot be made or loaded."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to make a libnvidia-ml.so.1 with")
    if find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed: pip install 'moetrain[gpu]'")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", SOURCE], check=True)
    return os.environ | {"LD_LIBRARY_PATH": str(folder)} | more
