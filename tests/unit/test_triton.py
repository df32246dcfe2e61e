"""The Triton kernels without a GPU: interpreted beside float64, and built for the GPU that they are written for."""

import drawn
import pytest
import torch
from triton_runs import need_triton, run

from moetrain.config import UserError
from moetrain.kernels import Kernel, choose, fused

need_triton()
CASES = "triton_cases.py"


def test_interpreted_beside_float64() -> None:
    """Forward and every gradient, to what F.grouped_mm is off by or less; the same bits again, and weights' gradients
    that were put off. In float8 beside its emulation: where a sum in another order makes the next float8 number of a
    factor, that is off by 2^-3."""
    found = run(CASES, "interpret", TRITON_INTERPRET="1")
    assert len(found) == 18
    for name, case in found.items():
        half = "float16" in name
        for i, error in enumerate(case["errors"]):
            assert error <= (1e-3 if half or "float8" in name else 1e-6), (
                f"{name}: result or gradient {i} is off by {error:.1e}"
            )
            if half:
                assert error <= 1.2 * case["of grouped_mm"][i], f"{name}: {i}: {case}"
        assert case["replay"], name
        assert case.get("deferred", True), name


def test_built_for_hopper(tmp_path) -> None:
    """Nothing is spilled to memory, what is shared fits in 227 KiB, tensor cores do the products, float8 ones too."""
    found = run(CASES, "compile", *["--all"] * drawn.ALL, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) >= 9
    for name, built in found.items():
        assert built["spilled"] == 0, f"{name}: {built}"
        assert built["shared"] <= 227 * 1024, f"{name}: {built}"
        assert built["wgmma"] >= 4, f"{name}: {built}"
        assert built["copies"] > 0, f"{name}: {built}"
        assert built["float8"] == ("'BLOCK_K': 128" in name) * built["wgmma"], f"{name}: {built}"


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
    wide = at | {"dim": 128, "hidden": 256, "fp8_tile": 128}
    assert choose(Kernel.triton, **wide)[1] == "triton: asked for, float8 e4m3 in tiles of 128"
    with pytest.raises(
        UserError, match=r"with fp8_tile=128: .*multiples \(dim 64, hidden 64\); use model\.moe\.kernel=auto"
    ):
        choose(Kernel.triton, **at | {"fp8_tile": 128})
    with pytest.raises(UserError, match="float8 in tiles of 128"):
        choose(Kernel.triton, **wide | {"fp8_tile": 64})
    monkeypatch.setattr(fused, "unfit", lambda **known: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"compute capability 8\.9 or more"):
        choose(Kernel.triton, **wide | {"device": torch.device("cuda", 0)})
