"""The Triton kernels without a GPU: interpreted beside float64, and built for the GPU that they are written for."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import drawn
import pytest
import torch

from moetrain.config import UserError
from moetrain.kernels import Kernel, choose

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it has wheels for Linux alone)", allow_module_level=True)

if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7):
    pytest.skip("Triton 3.6's interpreter does not run with numpy 2.4", allow_module_level=True)

CASES = Path(__file__).with_name("triton_cases.py")


def run(*words: str, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, CASES, *words], env=os.environ | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_interpreted_beside_float64() -> None:
    """Forward and every gradient, to what F.grouped_mm is off by or less; the same bits again, and weights' gradients
    that were put off."""
    found = run("interpret", TRITON_INTERPRET="1")
    assert len(found) == 15
    for name, case in found.items():
        half = "float16" in name
        for i, error in enumerate(case["errors"]):
            assert error <= (1e-3 if half else 1e-6), f"{name}: result or gradient {i} is off by {error:.1e}"
            if half:
                assert error <= 1.2 * case["of grouped_mm"][i], f"{name}: {i}: {case}"
        assert case["replay"], name
        assert case.get("deferred", True), name


def test_built_for_hopper(tmp_path) -> None:
    """Nothing is spilled to memory, what is shared fits in 227 KiB, and tensor cores do the products."""
    found = run("compile", *["--all"] * drawn.ALL, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) >= 6
    for name, built in found.items():
        assert built["spilled"] == 0, f"{name}: {built}"
        assert built["shared"] <= 227 * 1024, f"{name}: {built}"
        assert built["wgmma"] >= 4, f"{name}: {built}"
        assert built["copies"] > 0, f"{name}: {built}"


def test_refused_where_it_cannot_run(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    at = {"device": torch.device("cpu"), "dtype": torch.float32, "dim": 64, "hidden": 64}
    with pytest.raises(UserError, match=r"kernel=triton: .*TRITON_INTERPRET=1.*; use model\.moe\.kernel=auto"):
        choose(Kernel.triton, **at)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(Kernel.triton, **at)[1] == "triton: asked for, interpreted"
    with pytest.raises(UserError, match=r"multiples of 32 \(dim 48, hidden 64\)"):
        choose(Kernel.triton, **at | {"dim": 48})
    with pytest.raises(UserError, match="interpreter multiplies bfloat16"):
        choose(Kernel.triton, **at | {"dtype": torch.bfloat16})
    with pytest.raises(UserError, match=r"do not take torch\.float64"):
        choose(Kernel.triton, **at | {"dtype": torch.float64})
