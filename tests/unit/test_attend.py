"""Attention by pieces, documents, windows against a dense mask in float64: values, gradients, work, memory, replay."""

import inspect
import subprocess
import sys
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.model import attend as module
from moetrain.model import blocked
from moetrain.model.attend import Visible, attend

CPU = torch.device("cpu")


def zigzag(cp: int, rank: int, length: int) -> tuple[tuple[int, int], ...]:
    if cp == 1:
        return ((0, length),)
    size = length // (2 * cp)
    return tuple((c * size, (c + 1) * size) for c in (rank, 2 * cp - 1 - rank))


def documents(B: int, P: int, mean: int | None, generator: torch.Generator) -> Tensor | None:
    """Random lengths; the last row is one document, the row before it has documents of one token."""
    if mean is None:
        return None
    begins_BP = torch.rand(B, P, generator=generator) < 1 / mean
    begins_BP[-1] = False
    begins_BP[-2, P // 3 : P // 3 + 4] = True
    return begins_BP.long().cumsum(1)


def leaves(B: int, H: int, G: int, P: int, d: int, generator: torch.Generator) -> list[Tensor]:
    """q, k, v and the output's gradient, of whole rows, float64."""
    return [torch.randn(B, n, P, d, dtype=torch.float64, generator=generator) for n in (H, G, G, H)]


def mask(P: int, documents_BP: Tensor | None, window: int) -> Tensor:
    """(B or 1, P, P): whether a query sees a key."""
    at = torch.arange(P)
    seen = (at[:, None] >= at)[None]
    if window:
        seen = seen & (at[:, None] - at < window)
    if documents_BP is not None:
        seen = seen & (documents_BP[:, :, None] == documents_BP[:, None, :])
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, documents_BP: Tensor | None, window: int = 0) -> Tensor:
    seen, ratio = mask(q.shape[2], documents_BP, window), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


def backward(fn, t: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """y, dq, dk, dv of fn(q, k, v), laid out as a model lays them out."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).to(dtype).requires_grad_() for x in t[:3])
    y = fn(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), t[3].to(dtype))]


def ranks(
    t: list[Tensor], documents_BP: Tensor | None, cp: int, dtype: torch.dtype, fn=attend, window: int = 0
) -> list[Tensor]:
    """y, dq, dk, dv of whole rows from the pieces of each of cp ranks."""
    found = [torch.zeros_like(x, dtype=dtype) for x in (t[3], *t[:3])]
    P = t[0].shape[2]
    for rank in range(cp):
        pieces = zigzag(cp, rank, P)
        visible = plan(pieces, P, documents_BP, window)
        at = torch.cat([torch.arange(*piece) for piece in pieces])
        mine = [t[0][:, :, at], t[1], t[2], t[3][:, :, at]]
        y, d_q, d_k, d_v = backward(lambda q, k, v, visible=visible: fn(q, k, v, visible), mine, dtype)
        found[0][:, :, at], found[1][:, :, at] = y, d_q
        found[2] += d_k
        found[3] += d_v
    return found


def plan(
    pieces: tuple[tuple[int, int], ...], length: int, documents_BP: Tensor | None = None, window: int = 0
) -> Visible:
    return Visible.build(pieces=pieces, length=length, documents_BP=documents_BP, device=CPU, rows=3, window=window)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1.0)).item()


@pytest.mark.parametrize("mean", [None, 1, 20, 150], ids=lambda n: f"documents of {n}")
@pytest.mark.parametrize(("cp", "P"), [(1, 391), (2, 392), (3, 390), (4, 392), (4, 8), (1, 1)])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_equals_a_dense_mask(monkeypatch, cp, P, G, mean) -> None:
    monkeypatch.setattr(blocked, "_SCORES", 3 * 128 * 200)  # some blocks go head by head, some all at once
    generator = torch.Generator().manual_seed(P + cp)
    documents_BP, t = documents(3, P, mean, generator), leaves(3, 4, G, P, 8, generator)
    want = backward(lambda *qkv: dense(*qkv, documents_BP), t, torch.float64)
    for name, got, expected in zip(
        ("y", "dq", "dk", "dv"), ranks(t, documents_BP, cp, torch.float64), want, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    for got, expected in zip(ranks(t, documents_BP, cp, torch.float32), want, strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("window", [1, 6, 127, 128, 129, 300, 391, 1000])
@pytest.mark.parametrize("mean", [None, 20, 150], ids=lambda n: f"documents of {n}")
@pytest.mark.parametrize(("cp", "P"), [(1, 391), (2, 392), (4, 392), (4, 8), (1, 1)])
def test_a_window_equals_a_dense_mask(monkeypatch, cp, P, mean, window) -> None:
    monkeypatch.setattr(blocked, "_SCORES", 3 * 128 * 200)
    generator = torch.Generator().manual_seed(P + cp + window)
    documents_BP, t = documents(3, P, mean, generator), leaves(3, 4, 2, P, 8, generator)
    want = backward(lambda *qkv: dense(*qkv, documents_BP, window), t, torch.float64)
    if window < P and mean is None:
        whole = dense(*t[:3], None)
        assert error(whole, want[0]) > 1e-6, "the window is not seen"
    for name, got, expected in zip(
        ("y", "dq", "dk", "dv"), ranks(t, documents_BP, cp, torch.float64, window=window), want, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    for got, expected in zip(ranks(t, documents_BP, cp, torch.float32, window=window), want, strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize(
    ("cp", "mean", "window"),
    [(1, None, 0), (1, 60, 0), (2, None, 0), (2, 60, 0), (1, None, 50), (1, 60, 50), (2, None, 50), (2, 60, 50)],
)
@pytest.mark.parametrize("G", [4, 1])
def test_bf16_is_as_close_as_torch(cp, mean, window, G) -> None:
    generator = torch.Generator().manual_seed(7)
    documents_BP, P = documents(2, 320, mean, generator), 320
    t = [x.to(torch.bfloat16).double() for x in leaves(2, 4, G, P, 16, generator)]
    seen = mask(P, documents_BP, window)

    def torch_s(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)

    want = backward(lambda *qkv: dense(*qkv, documents_BP, window), t, torch.float64)
    theirs = backward(torch_s, t, torch.bfloat16)
    mine = ranks(t, documents_BP, cp, torch.bfloat16, window=window)
    for got, their, expected in zip(mine, theirs, want, strict=True):
        assert error(got, expected) <= 1.5 * error(their, expected)


@pytest.mark.parametrize("window", [0, 65])
def test_whole_rows_across_documents_are_torch_s_own_bits(window) -> None:
    generator = torch.Generator().manual_seed(1)
    t = leaves(2, 4, 2, 65, 8, generator)
    visible = plan(((0, 65),), 65, window=window)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mine = backward(lambda q, k, v: attend(q, k, v, visible), t, dtype)
        torch_s = backward(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), t, dtype
        )
        of_both = 1 if dtype is torch.bfloat16 else 4  # bf16 has a backward of its own
        for a, b in zip(mine[:of_both], torch_s[:of_both], strict=True):
            assert torch.equal(a, b)


def test_long_rows_in_bf16_go_by_blocks(monkeypatch) -> None:
    """The same gradients, from blocks that do not hold a whole row's scores."""
    generator = torch.Generator().manual_seed(2)
    t = leaves(2, 4, 4, 300, 16, generator)
    want = backward(lambda *qkv: dense(*qkv, None), t, torch.float64)
    for limit, count in ((300, 1), (299, 3)):
        monkeypatch.setattr(module, "_UNBLOCKED", limit)
        visible = plan(((0, 300),), 300)
        assert len(visible.blocks) == count
        for got, expected in zip(backward(lambda *x, of=visible: attend(*x, of), t, torch.bfloat16), want, strict=True):
            assert error(got, expected) < 1e-2


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize(("length", "window"), [(64, 0), (4096, 0), (4096, 300)])
def test_ranks_have_the_same_work(cp, length, window) -> None:
    visible = [plan(zigzag(cp, rank, length), length, window=window) for rank in range(cp)]
    pairs = [of.pairs() for of in visible]
    assert sum(pairs) == mask(length, None, window).sum()
    scores = [sum(block.scores for block in of.blocks) for of in visible]
    for counts in (pairs, scores):
        assert max(counts) <= 1.1 * sum(counts) / cp
    halves = [plan((at,), length) for at in zigzag(2, 0, length)]
    assert halves[1].pairs() > 6 * halves[0].pairs(), "pairs() sees what zigzag is for"


@pytest.mark.parametrize("cp", [1, 2])
def test_work_is_that_of_the_window(cp) -> None:
    for length in (1024, 8192):
        visible = [plan(zigzag(cp, rank, length), length, window=256) for rank in range(cp)]
        scores = sum(block.scores for of in visible for block in of.blocks)
        assert scores <= length * (256 + 127) < length * length / 2


def test_the_blocks_are_what_is_computed(monkeypatch) -> None:
    """Scores made in the forward, counted at the matmul; with short documents, far fewer than of whole rows."""
    generator, made = torch.Generator().manual_seed(3), []
    baddbmm = torch.baddbmm

    def counted(*args, **kwargs) -> Tensor:
        scores = baddbmm(*args, **kwargs)
        made.append(scores.numel())
        return scores

    monkeypatch.setattr(torch, "baddbmm", counted)
    B, H, P = 2, 2, 2048
    counts = []
    short = (torch.rand(B, P, generator=generator) < 1 / 64).long().cumsum(1)
    for documents_BP, window in ((None, 0), (short, 0), (None, 256)):
        q, k, v, _ = leaves(B, H, 1, P, 8, generator)
        made.clear()
        for rank in range(2):
            visible = plan(zigzag(2, rank, P), P, documents_BP, window)
            expected = sum(block.scores * (B if block.row is None else 1) for block in visible.blocks)
            attend(q[:, :, : P // 2].float(), k.float(), v.float(), visible)
            assert sum(made) == expected * H
            counts.append(expected)
            made.clear()
    assert sum(counts[:2]) < 1.15 * B * P * (P + 1) / 2
    assert sum(counts[2:4]) < sum(counts[:2]) / 3
    assert sum(counts[4:]) < sum(counts[:2]) / 2.5


def test_a_replay_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    documents_BP, t = documents(2, 512, 80, generator), leaves(2, 4, 2, 512, 16, generator)
    for dtype in (torch.float32, torch.bfloat16):
        for a, b in zip(ranks(t, documents_BP, 2, dtype), ranks(t, documents_BP, 2, dtype), strict=True):
            assert torch.equal(a, b)


MEMORY = """
import re, sys, torch
from moetrain.model.attend import Visible, attend
torch.set_num_threads(1)

def peak(P):
    documents_BP = (torch.rand(2, P, generator=torch.Generator().manual_seed(0)) < 1 / 500).long().cumsum(1)
    visible = Visible.build(pieces=((0, P),), length=P, documents_BP=documents_BP, device=torch.device("cpu"),
                            rows=2)
    q, k, v = (torch.randn(2, P, n, 16).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    attend(q, k, v, visible).sum().backward()
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

base = peak(256)
print(*(peak(int(P)) - base for P in sys.argv[1:]))  # ascending: the peak of a process never falls
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_linear_in_the_length() -> None:
    command = [sys.executable, "-c", MEMORY, "4096", "16384"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    short, long = map(int, out.split())
    assert short > 2 * 4096 * (4 + 2 + 2) * 16 * 4 / 1024, "less than q, k and v: not measured"
    assert long < 4.6 * short, f"{short} KiB at 4,096 positions, {long} KiB at 16,384"


def test_a_piece_by_torch_s_lower_right_mask() -> None:
    """What a GPU computes without documents, in the form a CPU gives it."""
    generator = torch.Generator().manual_seed(5)
    t = leaves(2, 4, 2, 48, 8, generator)
    want = backward(lambda *qkv: dense(*qkv, None), t, torch.float64)
    for got, expected in zip(ranks(t, None, 3, torch.float64, module._by_piece), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flag", [True, False], ids=["grouped kernel", "repeated key heads"])
@pytest.mark.parametrize(("mean", "window"), [(1, 0), (7, 0), (40, 0), *product((None, 7, 40), (1, 5, 33))])
@pytest.mark.parametrize("cp", [1, 2, 3])
def test_the_tables_of_the_variable_length_kernel(monkeypatch, cp, mean, window, flag) -> None:
    """The kernel has no CPU form: in its place, its definition, segment by segment."""
    signature = inspect.signature(pytest.importorskip("torch.nn.attention.varlen").varlen_attn)

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_k: Tensor, most_q: int, most_k: int, **kwargs
    ) -> Tensor:
        signature.bind(q, k, v, at_q, at_k, most_q, most_k, **kwargs)
        left, right = kwargs["window_size"]
        assert (left, right) == (window - 1, 0)
        assert kwargs.get("enable_gqa", False) or q.shape[1] == k.shape[1]
        assert at_q.dtype == at_k.dtype == torch.int32
        assert (at_q[-1], at_k[-1]) == (len(q), len(k))
        found = []
        for (a, b), (c, e) in zip(pairwise(at_q.tolist()), pairwise(at_k.tolist()), strict=True):
            assert (b - a <= e - c, b - a <= most_q, 0 < e - c <= most_k) == (True, True, True)
            last, at = torch.arange(b - a)[:, None] + e - c - (b - a), torch.arange(e - c)
            seen = (at <= last) & ((left < 0) | (at >= last - left))
            y = F.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in (q[a:b], k[c:e], v[c:e])), attn_mask=seen, enable_gqa=True
            )
            found.append(y.transpose(0, 1))
        return torch.cat(found)

    def old(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)) -> Tensor:
        return kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    def new(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False) -> Tensor:
        return kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size, enable_gqa=enable_gqa)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=new if flag else old))
    generator = torch.Generator().manual_seed(6)
    documents_BP, t = documents(3, 60, mean, generator), leaves(3, 4, 2, 60, 8, generator)

    def by_segment(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(module.world, "on_cpu", lambda at: False)
            on_gpu = plan(visible.pieces, visible.length, documents_BP, window)
        assert len(on_gpu.packed) == len(visible.pieces)
        return module._by_segment(q, k, v, on_gpu)

    want = backward(lambda *qkv: dense(*qkv, documents_BP, window), t, torch.float64)
    found = ranks(t, documents_BP, cp, torch.float64, by_segment, window)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_variable_length_kernel_gets_no_keys_before_a_window(monkeypatch) -> None:
    """A piece at the end of a long row: what it does not see is in segments without queries."""
    monkeypatch.setattr(module.world, "on_cpu", lambda at: False)
    packed = plan(((900, 1000),), 1000, window=50).packed[0]
    assert packed.most == (100, 851)
    assert packed.queries_N.tolist() == [0, 0, 100, 100, 200, 200, 300]
    assert packed.keys_N.tolist() == [0, 851, 1000, 1851, 2000, 2851, 3000]
