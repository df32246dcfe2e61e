"""The routing kernels without a GPU: interpreted beside torch's path, built for the GPU they are written for."""

import pytest
import torch
from triton_runs import need_triton, run

from moetrain.config import UserError
from moetrain.kernels import routing
from moetrain.moe.routers.group_limited import GroupLimited

need_triton()
CASES = "routing_cases.py"


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run(CASES, "interpret", TRITON_INTERPRET="1")


def test_choices_are_those_of_the_torch_path(interpreted) -> None:
    """Ties and what is not a number too; weights are as near to float64, and a second run has the same bits."""
    assert len(interpreted["routers"]) == 30
    for name, found in interpreted["routers"].items():
        assert found["choices"], name
        assert found["again"] and found["replay"], name  # noqa: PT018
        assert found["off by"] <= 4 * 2**-23, f"{name}: {found}"
        assert found["weights"] <= 1.01 * found["of torch"], f"{name}: {found}"
        assert found["gradient"] <= 1e-6, f"{name}: {found}"


def test_the_order_is_that_of_a_stable_sort(interpreted) -> None:
    assert len(interpreted["orders"]) == 25
    assert all(interpreted["orders"].values()), interpreted["orders"]


def test_a_layer_is_the_same(interpreted) -> None:
    assert len(interpreted["layers"]) == 5
    for name, found in interpreted["layers"].items():
        assert found["choices"], name
        assert max(found["errors"]) < 2e-6, f"{name}: {found}"


def test_built_for_hopper(tmp_path) -> None:
    found = run(CASES, "compile", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 8
    assert not any(found.values()), found


def test_refused_where_it_cannot_run(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"fused=true: .*TRITON_INTERPRET=1.*; use model\.moe\.router\.fused=false"):
        routing.check(device=cpu, dtype=torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert routing.check(device=cpu, dtype=torch.bfloat16) == "routing triton: asked for, interpreted"
    with pytest.raises(UserError, match="not in float64"):
        routing.check(device=cpu, dtype=torch.float64)
    with pytest.raises(UserError, match=r"best 3 \(top_k=6 / max_groups=2\): the kernel adds up 2 at most"):
        GroupLimited(top_k=6, num_groups=4, max_groups=2, fused=True).check(num_experts=32)
