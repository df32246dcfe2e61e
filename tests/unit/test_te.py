"""The transformer-engine backend without a GPU: what it asks for, by a stand-in that computes what the source says."""

import ast
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from test_float8 import COUNTS, case, compute

from moetrain.config import UserError
from moetrain.kernels import Kernel, choose, reference, te

AT = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "dim": 64, "hidden": 64}


def general_grouped_gemm(
    A, B, out, quantization_params, out_dtype, layout="TN", m_splits=None, gelu=False, grad=False, accumulate=False,
    bias=None, use_bias=False, use_split_accumulator=False, D_dtype=None, single_output=False,
):  # fmt: skip
    """As in 2.11 to 2.18, in bfloat16: a slot without rows leaves nothing of one output, and zeros in its own."""
    assert len(A) == len(B) == len(quantization_params) == len(m_splits)
    assert all(isinstance(n, int) for n in m_splits)
    assert all(x.is_contiguous() and x.dtype is out_dtype for x in (*A, *B, *out))
    outs = list(out[0][: sum(m_splits)].split(m_splits)) if single_output else out
    for a, b, o in zip(A, B, outs, strict=True):
        o.copy_((b.t() if layout[1] == "T" else b) @ (a.t() if layout[0] == "T" else a))
    return out, None, None


@pytest.fixture
def there(monkeypatch) -> None:
    """A stand-in for the library, of release 2.18."""
    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.cpp_extensions"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].general_grouped_gemm = general_grouped_gemm  # pyright: ignore
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "2.18.0" if n == "transformer-engine" else known(n))
    te._grouped_gemm.cache_clear()
    yield
    te._grouped_gemm.cache_clear()


@pytest.mark.parametrize("name", COUNTS)
def test_forward_and_every_gradient_beside_float64(there, name) -> None:
    torch.manual_seed(0)
    t, rows = case(COUNTS[name], dim=24, hidden=40)
    want = compute(reference.swiglu, t, rows, torch.float64)
    found = [compute(te.swiglu, t, rows, torch.float64, **how) for how in ({}, {"again": True}, {"later": True})]
    for got in found:
        for n, expected in want.items():
            torch.testing.assert_close(got[n], expected, rtol=1e-12, atol=1e-12)


def test_absent_old_or_broken_is_one_line(there, monkeypatch) -> None:
    assert choose(Kernel.te, **AT)[1] == "te: asked for"
    with pytest.raises(UserError, match=r"kernel=te: .*, and this is a CPU; use model\.moe\.kernel=auto"):
        choose(Kernel.te, **AT | {"device": torch.device("cpu")})
    with pytest.raises(UserError, match=r"in bfloat16 alone, not in torch\.float32"):
        choose(Kernel.te, **AT | {"dtype": torch.float32})
    with pytest.raises(UserError, match="kernel=te has no float8"):
        choose(Kernel.te, **AT | {"fp8_tile": 32})
    del sys.modules["transformer_engine.pytorch.cpp_extensions"].general_grouped_gemm
    te._grouped_gemm.cache_clear()
    with pytest.raises(UserError, match=r"transformer-engine 2\.18\.0 cannot be imported \(cannot import name"):
        choose(Kernel.te, **AT)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.10.1")
    with pytest.raises(UserError, match=r"is 2\.10\.1, and its grouped GEMM is called as it is in 2\.11 to 2\.18"):
        choose(Kernel.te, **AT)

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"not installed \(pip install 'moetrain\[te\]'\)"):
        choose(Kernel.te, **AT)


def test_the_library_takes_what_the_stand_in_takes() -> None:
    found = importlib.util.find_spec("transformer_engine")
    if found is None or found.origin is None:
        pytest.skip("transformer-engine is not installed here: its source is not looked at")
    source = Path(found.origin).parent / "pytorch/cpp_extensions/gemm.py"
    [theirs] = [
        n for n in ast.parse(source.read_text()).body if getattr(n, "name", "") == "general_grouped_gemm"
    ]  # fmt: skip
    assert isinstance(theirs, ast.FunctionDef)
    assert [a.arg for a in theirs.args.args] == list(inspect.signature(general_grouped_gemm).parameters)
