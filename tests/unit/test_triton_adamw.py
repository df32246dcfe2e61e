"""AdamW's Triton kernel without a GPU: interpreted beside torch's operations, and built for a Hopper."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.config import UserError
from moetrain.optim import OptimConfig, Optimizer, UpdateKernel

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it has wheels for Linux alone)", allow_module_level=True)

if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7):
    pytest.skip("Triton 3.6's interpreter does not run with numpy 2.4", allow_module_level=True)

CASES = Path(__file__).with_name("triton_adamw_cases.py")


def run(word: str, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, CASES, word], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_interpreted_beside_torch() -> None:
    """Weights, averages, padding, skipped steps, runs that begin anywhere. Float32 may be off by its last bits, as
    torch fuses a product with a sum; of bfloat16 some may go to a neighbour for that."""
    found = run("interpret", TRITON_INTERPRET="1")
    assert len(found) == 6
    for name, case in found.items():
        assert len(case) == 9
        for tensor, x in case.items():
            assert x["apart"] <= (8 if x["bits"] == 32 else 1), f"{name}: {tensor}: {x}"
            assert x["bits"] == 32 or x["different"] <= 0.01, f"{name}: {tensor}: {x}"


def test_built_for_hopper(tmp_path) -> None:
    """Nothing is spilled or shared, and what lies in order moves 8 and 16 bytes at once."""
    found = run("compile", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 8
    for name, built in found.items():
        assert built["spilled"] == built["shared"] == 0, f"{name}: {built}"
        if built["aligned"]:
            wide = [n for n in built["bytes at once"] if n >= 8]
            assert len(wide) == 14, f"{name}: four loads and three stores of two groups of four elements: {built}"


def test_refused_where_it_cannot_run(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cfg = OptimConfig(kernel=UpdateKernel.triton)
    with pytest.raises(UserError, match=r"optim\.kernel=triton: .*TRITON_INTERPRET=1.*; use optim\.kernel=auto"):
        Optimizer(cfg, {"w": torch.zeros(4)})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Optimizer(cfg, {"w": torch.zeros(4)}).words == "AdamW: triton, asked for, interpreted"
    with pytest.raises(UserError, match="does not update float64"):
        Optimizer(cfg, {"w": torch.zeros(4, dtype=torch.float64)})
