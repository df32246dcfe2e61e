"""Experts in float8: every number beside float64 made of a list of all float8 numbers, and within what e4m3 rounds."""

import itertools

import pytest
import torch
from torch import Tensor

from moetrain import deferred
from moetrain.cli.compose import compose
from moetrain.config import UserError
from moetrain.kernels import Kernel, choose, float8, grouped, reference
from moetrain.moe.dispatchers.allgather import AllGather
from moetrain.moe.dispatchers.capacity import Capacity
from moetrain.moe.dispatchers.dropless import Dropless
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.rows import inverse
from moetrain.moe.types import Context, Rows
from moetrain.verify.session import make_reference

# e4m3 without infinities: 8 steps in each power of two from 2^-6 to 2^8, of which the last is none, 7 below
NORMAL = [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)][:-1]
NUMBERS = [0.0, *(m * 2.0**-9 for m in range(1, 8)), *NORMAL]
COUNTS = {
    "ragged": [37, 0, 90, 1, 100],
    "all to one": [0, 130, 0],
    "first and last empty": [0, 60, 41, 0],
    "no rows": [0, 0],
}


def nearest(x: float) -> float:
    """By looking at all of them; of two as near, the one with an even last bit."""
    near = sorted(NUMBERS, key=lambda n: (abs(abs(x) - n), NUMBERS.index(n) % 2))[0]
    return near if x >= 0 else -near


def rounded(tile_X: Tensor) -> Tensor:
    """A tile in plain Python: the least power of two that brings its largest number to 448 or less."""
    most = max((abs(x) for x in tile_X.flatten().tolist()), default=0.0)
    exponent = -117
    while most > 448 * 2.0**exponent:
        exponent += 1
    scaled = [nearest(x / 2.0**exponent) * 2.0**exponent for x in tile_X.flatten().tolist()]
    return torch.tensor(scaled, dtype=torch.float64).view(tile_X.shape)


def truth(x: Tensor, high: int, wide: int) -> Tensor:
    """Every tile of the last two dimensions of a (..., P, Q) for itself."""
    found = x.double().clone()
    P, Q = x.shape[-2:]
    for at in itertools.product(*map(range, x.shape[:-2])):
        for p, q in itertools.product(range(0, P, high), range(0, Q, wide)):
            here = (*at, slice(p, p + high), slice(q, q + wide))
            found[here] = rounded(found[here])
    return found


def test_numbers() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(float8.E4M3).double()
    assert sorted(every[every >= 0].unique().tolist()) == NUMBERS
    assert len(NUMBERS) == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rounding_is_that_of_the_list(dtype) -> None:
    """Ties, numbers below e4m3's normal ones, outliers, zeros, the largest and the least; a short last tile."""
    torch.manual_seed(0)
    x = torch.randn(12, 21) * torch.logspace(-4, 4, 21)
    x[1] = 0
    x[2, 3] = 1e30  # beside which the others are 0
    x[3, :8] = torch.tensor([448.0, 17, 19, 21, 23, 25, 27, 29]) * 2.0**-30  # halfway between two
    x[4] = 1e-37
    x[5, :8] = torch.tensor([449.0, 447.9, 464, 1, -448, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9])
    x = x.to(dtype)
    got = float8.rounded_rows(x, 8)
    assert got.dtype is dtype
    assert torch.equal(got.double(), truth(x, 1, 8))
    w = torch.randn(2, 2, 11, 21).to(dtype)
    assert torch.equal(float8.rounded_blocks(w, 8).double(), truth(w, 8, 8))


def test_what_is_rounded_is_values_times_powers_of_two() -> None:
    x = torch.randn(5, 48)
    values, scale = float8.quantize_rows(x, 16)
    assert values.dtype is torch.float8_e4m3fn
    assert scale.shape == (5, 3)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert torch.equal(values.float() * scale.repeat_interleave(16, -1), float8.rounded_rows(x, 16))
    values, scale = float8.quantize_blocks(x, 16)
    assert scale.shape == (1, 3)
    assert torch.equal(values.t().float(), float8.quantize_blocks(x.t(), 16)[0].float()), "the same both ways"


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(bad) -> None:
    x = torch.ones(3, 16)
    x[1, 2] = bad
    got = float8.rounded_rows(x, 8)
    assert got[1, :8].isnan().all()
    assert got[[0, 2]].eq(1).all()
    assert got[1, 8:].eq(1).all()


def case(counts: list[int], *, dim: int, hidden: int, top_k: int = 1) -> tuple[dict[str, Tensor], Rows]:
    E, M = len(counts), sum(counts)
    ids_M = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))[torch.randperm(M)]
    order_M = ids_M.argsort(stable=True)
    t = {
        "x": torch.randn(M // top_k, dim), "weights": torch.rand(M) + 0.5, "g": torch.randn(M // top_k, dim),
        "gate_up": torch.randn(E, 2, hidden, dim) * 0.3, "down": torch.randn(E, dim, hidden) * 0.3,
    }  # fmt: skip
    t = {n: v.double() for n, v in t.items()}
    offsets_S = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    return t, Rows(t["x"], order_M // top_k, inverse(order_M).view(-1, top_k), offsets_S, t["weights"])


def compute(backend, t: dict[str, Tensor], rows: Rows, dtype: torch.dtype, **how) -> dict[str, Tensor]:
    leaves = {n: t[n].to(dtype, copy=True).requires_grad_() for n in ("x", "weights", "gate_up", "down")}
    rows = Rows(leaves["x"], rows.index_M, rows.back_NJ, rows.offsets_S, leaves["weights"])
    later = how.pop("later", False)
    queue: deferred.Queue = []
    with deferred.splittable(later):
        y = backend(rows, leaves["gate_up"] * 1, leaves["down"] * 1, **how)
    with deferred.into(queue if later else None):
        y.backward(t["g"].to(dtype), retain_graph=later)
    assert len(queue) == 2 * later
    deferred.run(queue)
    return {"y": y.detach()} | {n: x.grad for n, x in leaves.items()}  # pyright: ignore


def by_hand(t: dict[str, Tensor], rows: Rows, tile: int) -> dict[str, Tensor]:
    """Forward and backward of one row after the other, in float64, with tiles by ``truth``."""
    found = {n: torch.zeros_like(v) for n, v in t.items() if n != "g"} | {"y": torch.zeros_like(t["x"])}
    ends = [0, *rows.offsets_S.tolist()]
    w1, w2 = truth(t["gate_up"], tile, tile), truth(t["down"], tile, tile)

    def q(v: Tensor) -> Tensor:
        return truth(v[None], 1, tile)[0]

    for e, (start, end) in enumerate(itertools.pairwise(ends)):
        for m in range(start, end):
            n, s = int(rows.index_M[m]), t["weights"][m]
            gate, up = w1[e, 0] @ q(t["x"][n]), w1[e, 1] @ q(t["x"][n])
            slope = gate.sigmoid()
            a, g = gate * slope * up, t["g"][n]
            found["y"][n] += w2[e] @ q(a * s)
            d_scaled = w2[e].T @ q(g)
            d_a = d_scaled * s
            d_gate, d_up = d_a * up * (slope + gate * slope * (1 - slope)), d_a * gate * slope
            found["weights"][m] = d_scaled @ a
            found["x"][n] += w1[e, 0].T @ q(d_gate) + w1[e, 1].T @ q(d_up)
            found["down"][e] += g[:, None] * (a * s)[None]
            found["gate_up"][e] += torch.stack([d_gate, d_up])[:, :, None] * t["x"][n]
    return found


@pytest.mark.parametrize("name", COUNTS)
def test_forward_and_every_gradient_beside_plain_loops(name) -> None:
    """In float64: not near what float8 should make, but that. Gate and up, 20 wide, do not share a tile."""
    torch.manual_seed(1)
    counts = [n // 6 * 2 for n in COUNTS[name]]  # every number is looked up in a list
    t, rows = case(counts, dim=24, hidden=20, top_k=2)
    got = compute(lambda *a, **k: float8.swiglu(8, *a, **k), t, rows, torch.float64)
    for n, want in by_hand(t, rows, 8).items():
        torch.testing.assert_close(got[n], want, rtol=1e-12, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")
    for how in ({"again": True}, {"later": True}):
        again = compute(lambda *a, **k: float8.swiglu(8, *a, **k), t, rows, torch.float64, **how)
        assert all(torch.equal(again[n], x) for n, x in got.items()), how


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_within_what_e4m3_rounds(dtype) -> None:
    """|Q(x) - x| is at most 2^-4 |x|, or 2^-10 of the scale: of the forward and of the gradient of x, number by number;
    the gradient of the weights is not rounded."""
    torch.manual_seed(2)
    S, I, O, M, tile = 3, 96, 40, 50, 32  # noqa: E741
    x, g = torch.randn(M, I) * torch.logspace(-3, 2, I), torch.randn(M, O)
    w, ends = torch.randn(S, O, I), [20, 20, 50]
    x, g, w = (v.to(dtype).requires_grad_() for v in (x, g, w))
    y = float8._product(x, w, offsets_S=torch.tensor(ends, dtype=torch.int32), ends=ends, tile=tile)
    y.backward(g)

    def off(v: Tensor, high: int) -> Tensor:
        blocks = v.detach().double().abs()
        most = torch.nn.functional.max_pool2d(blocks.view(1, -1, *v.shape[-2:]), (high, tile), ceil_mode=True)
        most = most.repeat_interleave(high, -2).repeat_interleave(tile, -1)[..., : v.shape[-2], : v.shape[-1]]
        return (blocks * 2**-4).maximum(most.view(v.shape) / 224 * 2**-10)

    unit = torch.finfo(dtype).eps
    for slot, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        if start == end:
            assert w.grad[slot].eq(0).all()  # pyright: ignore
            continue
        x_, g_, w_ = x[start:end].detach().double(), g[start:end].detach().double(), w[slot].detach().double()
        e_x, e_g, e_w = off(x[start:end], 1), off(g[start:end], 1), off(w, tile)[slot]
        for got, (a, e_a), (b, e_b) in (
            (y[start:end], (x_, e_x), (w_.T, e_w.T)),
            (x.grad[start:end], (g_, e_g), (w_, e_w)),  # pyright: ignore
        ):
            sums = unit * ((a.abs() + e_a) @ (b.abs() + e_b))
            limit = e_a @ b.abs() + a.abs() @ e_b + e_a @ e_b + sums
            assert ((got.detach().double() - a @ b).abs() <= limit).all()
            far = (got.detach().double() - a @ b).norm() / (a @ b).norm()
            assert 0.005 < far < 0.06, "it is rounded, by some 2^-5"
        want = g_.T @ x_
        far = (w.grad[slot].double() - want).norm()  # pyright: ignore
        assert far <= 2 * unit * want.norm()


def test_bfloat16_holds_what_float8_makes() -> None:
    """The emulation multiplies the very numbers that a tensor core does, so that only float32 sums differ."""
    torch.manual_seed(3)
    x = (torch.randn(64, 256) * torch.logspace(-30, 30, 64)[:, None]).bfloat16()
    values, scale = float8.quantize_rows(x, 128)
    assert torch.equal(
        float8.rounded_rows(x, 128).double(), values.double() * scale.double().repeat_interleave(128, -1)
    )
    assert torch.equal(float8.rounded_rows(x, 128), float8.rounded_rows(x.float(), 128).bfloat16())


@pytest.mark.parametrize("dispatcher", [Dropless(), Capacity(factor=0.7), AllGather()], ids=lambda d: type(d).__name__)
def test_a_layer_is_near_that_without_float8(dispatcher) -> None:
    found = []
    for tile in (16, 0):
        torch.manual_seed(4)
        layer = MoE(MoEConfig(num_experts=6, hidden=48, fp8_tile=tile, dispatcher=dispatcher), dim=32, layer=0)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape) * 0.3)
        x = torch.randn(2, 24, 32).requires_grad_()
        mask_BS = torch.arange(24)[None] < torch.tensor([24, 19])[:, None]
        y, _ = layer(x, {}, Context(0, 0, torch.arange(2), torch.arange(24), 48.0, mask_BS=mask_BS))
        y.backward(torch.randn(2, 24, 32))
        found.append([y.detach(), x.grad, *[p.grad for p in layer.parameters()]])
    for a, b in zip(*found, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert 1e-3 < error < 0.15, "two or three roundings of 2^-4 at most, one after the other"


def test_rows_do_not_know_of_one_another() -> None:
    """What a row becomes does not depend on which others its expert has, nor on their order, which layouts decide."""
    torch.manual_seed(5)
    t, rows = case([40, 24], dim=32, hidden=32)
    whole = compute(lambda *a, **k: float8.swiglu(16, *a, **k), t, rows, torch.float64)
    turned = torch.cat([torch.arange(39, -1, -1), torch.arange(40, 64)])
    index_M = rows.index_M[turned]
    t2 = t | {"weights": t["weights"][turned]}
    rows2 = Rows(t["x"], index_M, inverse(index_M)[:, None], rows.offsets_S, t2["weights"])
    other = compute(lambda *a, **k: float8.swiglu(16, *a, **k), t2, rows2, torch.float64)
    for n in ("y", "x"):
        torch.testing.assert_close(other[n], whole[n], rtol=1e-14, atol=1e-14)
    for n in ("gate_up", "down"):
        torch.testing.assert_close(other[n], whole[n], rtol=1e-12, atol=1e-12)


def test_errors_beside_those_of_bfloat16() -> None:
    """Against plain float64 in the whole layer: the weights' gradients too, which see rounded activations."""
    torch.manual_seed(6)
    t, rows = case([64, 0, 64], dim=128, hidden=128)
    want = compute(reference.swiglu, t, rows, torch.float64)
    for backend, limit in ((grouped.swiglu, 0.01), (lambda *a, **k: float8.swiglu(128, *a, **k), 0.08)):
        got = compute(backend, t, rows, torch.bfloat16)
        errors = {n: ((got[n].double() - want[n]).norm() / want[n].norm()).item() for n in want}
        assert max(errors.values()) < limit, errors
        assert got["gate_up"][1].abs().sum() == 0, "an expert without rows has a gradient of zero"


def test_choice_and_refusals() -> None:
    at = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "dim": 64, "hidden": 64, "fp8_tile": 32}
    assert choose(Kernel.auto, **at)[1] == "torch: float8 e4m3 in tiles of 32, emulated in torch.bfloat16"
    with pytest.raises(UserError, match=r"kernel=reference has no float8: use model\.moe\.kernel=auto or fp8_tile=0"):
        choose(Kernel.reference, **at)
    with pytest.raises(UserError, match=r"fp8_tile=32: torch\.float16 does not hold every float8 number"):
        choose(Kernel.auto, **at | {"dtype": torch.float16})
    float8.check(128, hidden=200, etp=1)
    float8.check(0, hidden=200, etp=2)
    float8.check(64, hidden=128, etp=2)
    with pytest.raises(UserError, match=r"does not divide the 100 .*use another layout\.etp or model\.moe\.hidden=256"):
        float8.check(128, hidden=200, etp=2)


def test_float32_layouts_are_not_compared(tmp_path) -> None:
    """Before any rank starts."""
    cfg = compose(["experiment=verified", "model.moe.fp8_tile=8"])
    with pytest.raises(UserError, match=r"fp8_tile=8 with train\.dtype=float32: .*--dtype float64 or bfloat16"):
        make_reference(cfg, None, tmp_path)  # pyright: ignore
