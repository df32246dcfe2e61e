"""bf16 on a CPU takes paths of its own: each against float64, about as close as plain torch in bf16."""

import pytest
import torch
import torch.nn.functional as F

from moetrain.kernels import grouped, reference
from moetrain.model.attend import Visible
from moetrain.model.attention import Attention, QKNorm
from moetrain.model.layers import RMSNorm, Rope, RopeConfig, rotate
from moetrain.model.loss import summed, summed_of_head
from moetrain.moe.types import Rows

COUNTS = {"ragged": [37, 0, 90, 1], "all to one": [0, 128, 0, 0], "none": [0, 0, 0, 0], "even": [32] * 4}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_swiglu(counts, dtype) -> None:
    """Forward and every gradient; rows past the last offset hold NaN and reach nobody."""
    generator = torch.Generator().manual_seed(3)
    real, tail, S, D, F_ = sum(counts), 5, len(counts), 32, 48
    x = torch.randn(real + tail, D, generator=generator)
    x[real:] = torch.nan
    leaves = [x, torch.rand(real + tail, generator=generator)]
    leaves += [torch.randn(S, 2, F_, D, generator=generator) * 0.2, torch.randn(S, D, F_, generator=generator) * 0.2]
    index = torch.arange(real + tail)
    offsets = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    g = torch.randn(real + tail, D, generator=generator)
    g[real:] = 0
    found = []
    for backend, at in ((reference.swiglu, torch.float64), (grouped.swiglu, dtype)):
        x_ND, weights_M, gate_up, down = (t.to(dtype).to(at).requires_grad_() for t in leaves)
        y = backend(Rows(x_ND, index, index[:, None], offsets, weights_M), gate_up, down)
        grads = torch.autograd.grad(y[:real], (x_ND, weights_M, gate_up, down), g[:real].to(at), allow_unused=True)
        found.append([y[:real], *[None if t is None else (t[:real] if n < 2 else t) for n, t in enumerate(grads)]])
    for want, got in zip(*found, strict=True):
        if want is not None and want.numel():
            assert got is not None
            assert got.isfinite().all()
            assert error(got, want) < (1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_attention_and_norms() -> None:
    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        layer = Attention(64, num_heads=4, num_kv_heads=4, head_dim=16, qk_norm=QKNorm.head, qkv_bias=False, eps=1e-5)
        norm = RMSNorm(64, eps=1e-5)
        for p in (*layer.parameters(), *norm.parameters()):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        layer, norm = layer.double(), norm.double()
        x = torch.randn(3, 40, 64, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_()
        rope = tuple(t.to(dtype) for t in Rope(RopeConfig(), head_dim=16)(torch.arange(40)))
        visible = Visible.build(pieces=((0, 40),), length=40, documents_BP=None, device=torch.device("cpu"), rows=3)
        y = layer(norm(x), rope, visible)
        y.backward(torch.randn(y.shape, generator=generator).to(dtype))
        return [y, x.grad, norm.weight.grad, *[p.grad for p in layer.parameters()]]  # pyright: ignore

    for want, got in zip(run(torch.float64), run(torch.bfloat16), strict=True):
        assert error(got, want) < 3e-2
    for want, got in zip(run(torch.float64), run(torch.float32), strict=True):
        assert error(got, want) < 3e-6


def test_rms_norm_gradients_are_exact() -> None:
    norm = RMSNorm(6, eps=1e-5).double()
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-5))


def test_cross_entropy_of_narrow_logits() -> None:
    logits = (torch.randn(4, 50, 600) * 3).to(torch.bfloat16)
    targets = torch.randint(600, (4, 50))
    targets[1, :7] = -100
    wide, narrow = logits.double().requires_grad_(), logits.clone().requires_grad_()
    want, got = summed(wide, targets), summed(narrow, targets)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (want * 0.01).backward()
    (got * 0.01).backward()
    assert error(narrow.grad, wide.grad) < 4e-3  # pyright: ignore
    assert narrow.grad[1, :7].abs().max() == 0  # pyright: ignore


def test_cross_entropy_of_the_head() -> None:
    x, weight = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    targets = torch.randint(11, (2, 6))
    targets[1, :2] = -100
    leaves = (x.requires_grad_(), weight.requires_grad_())
    want, got = summed(F.linear(*leaves), targets), summed_of_head(*leaves, targets)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(0.01 * loss, leaves) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_rotation_s_gradient() -> None:
    rope, x = Rope(RopeConfig(), head_dim=6)(torch.arange(3)), torch.randn(2, 3, 2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rope), (x.requires_grad_(),))
    torch.testing.assert_close(rotate(x, rope).norm(dim=-1), x.norm(dim=-1))
