"""AdamW's Triton kernel without a GPU: interpreted beside torch's operations, and built for a Hopper."""

import pytest
import torch
from triton_runs import need_triton, run

from moetrain.config import UserError
from moetrain.optim import OptimConfig, Optimizer, UpdateKernel

need_triton()
CASES = "triton_adamw_cases.py"


def test_interpreted_beside_torch() -> None:
    """Weights, averages, padding, skipped steps, runs that begin anywhere. Float32 may be off by its last bits, as
    torch fuses a product with a sum; of bfloat16 some may go to a neighbour for that."""
    found = run(CASES, "interpret", TRITON_INTERPRET="1")
    assert len(found) == 6
    for name, case in found.items():
        assert len(case) == 9
        for tensor, x in case.items():
            assert x["apart"] <= (8 if x["bits"] == 32 else 1), f"{name}: {tensor}: {x}"
            assert x["bits"] == 32 or x["different"] <= 0.01, f"{name}: {tensor}: {x}"


def test_built_for_hopper(tmp_path) -> None:
    """Nothing is spilled or shared, and what lies in order moves 8 and 16 bytes at once."""
    found = run(CASES, "compile", TRITON_CACHE_DIR=str(tmp_path))
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
