"""train.compile: the same steps, gradients and refusals, compiled by the C++ compiler that is here."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drawn import drawn
from test_recompute import EVERY_PART, FULL, outcome
from test_train import MODEL, TRAIN, close, config, curve, error, trainer

from moetrain import compiling
from moetrain.config import UserError, replace
from moetrain.job import Config, check
from moetrain.kernels import activation, grouped, reference
from moetrain.layouts import Layout
from moetrain.model.loss import _widened
from moetrain.moe.types import Rows


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """Of all tests here: what one has compiled, another finds. Skips where nothing can be compiled, and says why."""
    try:
        compiling.check(torch.device("cpu"))
    except UserError as e:
        pytest.skip(str(e))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(cfg: Config) -> Config:
    return replace(cfg, train=replace(cfg.train, compile=True))


def counted(rank: int, world: int, cfg: Config, folder: Path) -> tuple[list[list[float]], int]:
    """The curve, and how many graphs were compiled for it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = curve(rank, world, cfg)
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


CASES: dict[str, dict] = {
    "a norm of each head, dense and shared FFNs": {},
    "a norm of all heads, biases, documents": {
        "model": MODEL | {"qk_norm": "full", "qkv_bias": True, "tie_embeddings": True}, "documents": True,
    },
    "every part recomputed": {"recompute": EVERY_PART},
    "all recomputed": {"recompute": FULL},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_the_code_as_it_is_written(small_corpus, tmp_path, name) -> None:
    groups = dict(CASES[name])
    if groups.pop("documents", False):
        groups["data"] = {"corpora": {"small": {"path": str(small_corpus)}}, "mask_documents": True}
    cfg = config(small_corpus, tmp_path / "run", **groups)
    _, want = outcome(trainer(0, 1, cfg))
    run = trainer(0, 1, compiled(cfg))
    _, got = outcome(run)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for key, value in want.items():
        assert error(got[key], value) < 1e-12, key
    run.step(replay=True)  # raises where the second run of a step has other bits


LAYOUTS: list[dict] = [{"dp": 2}, {"dp": 1, "tp": 2, "ep": 2}, {"dp": 1, "cp": 2, "etp": 2}, {"dp": 1, "pp": 2}]


@pytest.mark.parametrize("layout", drawn(LAYOUTS, 2, of="compiled layouts"), ids=str)
def test_two_ranks_are_the_run_of_one_that_is_not_compiled(ranks, small_corpus, tmp_path, layout) -> None:
    want = curve(0, 1, config(small_corpus, tmp_path / "one"))
    cfg = compiled(config(small_corpus, tmp_path / "two", layout=layout))
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    for got, graphs in ranks(2).run(counted, cfg, folder):
        assert graphs > 0
        close(got, want)


def rows(sizes: list[int], dtype: torch.dtype) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(len(sizes))
    M, D, F, S = sum(sizes), 32, 48, len(sizes)
    leaf = [
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((M, D), (M,), (S, 2, F, D), (S, D, F))
    ]
    offsets_S = torch.tensor(sizes).cumsum(0).int()
    index_M = torch.arange(M)
    return Rows(leaf[0], index_M, index_M[:, None], offsets_S, leaf[1]), leaf[2], leaf[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_any_number_of_rows_are_as_near_the_truth(dtype) -> None:
    """Several calls with other counts, slots with no row, one and two among them: one compiled form for all."""
    for sizes in ([5, 0, 9, 2], [1, 7, 3, 4], [0, 0, 40, 1], [1, 0, 0, 0]):
        found = {}
        for name, dt in (("truth", torch.float64), ("plain", dtype), ("compiled", dtype)):
            at, gate_up, down = rows(sizes, dtype)
            leaves = [t.detach().to(dt).requires_grad_() for t in (at.x_ND, at.weights_M, gate_up, down)]
            at = Rows(leaves[0], at.index_M, at.back_NJ, at.offsets_S, leaves[1])
            if name == "truth":
                y = reference.swiglu(at, leaves[2], leaves[3])
            else:
                y = grouped.swiglu(at, leaves[2], leaves[3], compiled=name == "compiled")
            (y * torch.linspace(-1, 1, y.numel(), dtype=dt).view_as(y)).sum().backward()
            found[name] = [y.detach(), *(t.grad for t in leaves)]
        for plain, mine, truth in zip(found["plain"], found["compiled"], found["truth"], strict=True):
            assert error(mine, truth) <= max(1.2 * error(plain, truth), 4 * torch.finfo(dtype).eps), sizes
    functions = 2 if dtype is torch.float32 else 1  # there backward is one, too
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == functions, "one form for any number of rows"


def test_the_compiled_loss_is_the_loss() -> None:
    logits = torch.randn(12, 40, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 40, (12,)).index_fill(0, torch.tensor([3]), -100)
    want = _widened(logits, targets)
    (d_want,) = torch.autograd.grad(want, logits)
    got = compiling.compiled(_widened)(logits, targets)
    (d_got,) = torch.autograd.grad(got, logits)
    assert error(got, want) < 1e-6
    assert error(d_got, d_want) < 1e-3


def test_a_backward_written_by_hand_is_autograd_s() -> None:
    both, weights = torch.randn(6, 8, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    leaves = both.requires_grad_(), weights.requires_grad_()
    y, d = activation.weighted(*leaves), torch.randn(6, 4, dtype=torch.float64)
    y.backward(d)
    d_both, again, d_weights = activation.weighted_backward(both.detach(), d, weights.detach())
    for got, want in ((d_both, both.grad), (again, y), (d_weights, weights.grad)):
        assert want is not None
        assert error(got, want) < 1e-14


def test_schedules_that_put_weight_gradients_off_are_refused(small_corpus, tmp_path) -> None:
    cfg = compiled(config(small_corpus, tmp_path / "run", pipeline={"schedule": "zbv"}, train=TRAIN | {"batch": 16}))
    cfg = replace(cfg, layout=Layout(dp=1, pp=2), model=replace(cfg.model, num_layers=4))
    with pytest.raises(UserError, match="pipeline.schedule=zbv: a compiled backward has its weight gradients in it"):
        check(cfg, world=2)


def test_without_a_compiler_there_is_one_line(monkeypatch, tmp_path, capsys) -> None:
    from moetrain.cli.main import main

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["train", "train.compile=true", "train.device=cpu", f"run.dir={tmp_path / 'runs'}"]
    assert main(argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 1, said
    name = "clang++" if sys.platform == "darwin" else "g++"
    assert f"train.compile=true needs a C++ compiler, and there is no {name} here" in said[0]
    assert not (tmp_path / "runs").exists()
