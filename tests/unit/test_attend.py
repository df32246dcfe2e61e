"""Attention by pieces and documents against a dense mask in float64: values, gradients, work, memory, replay."""

import inspect
import subprocess
import sys
from itertools import pairwise
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


def dense(q: Tensor, k: Tensor, v: Tensor, documents_BP: Tensor | None) -> Tensor:
    P, ratio = q.shape[2], q.shape[1] // k.shape[1]
    seen = torch.ones(P, P, dtype=torch.bool).tril()[None]
    if documents_BP is not None:
        seen = seen & (documents_BP[:, :, None] == documents_BP[:, None, :])
    k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


def backward(fn, t: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """y, dq, dk, dv of fn(q, k, v), laid out as a model lays them out."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).to(dtype).requires_grad_() for x in t[:3])
    y = fn(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), t[3].to(dtype))]


def ranks(t: list[Tensor], documents_BP: Tensor | None, cp: int, dtype: torch.dtype, fn=attend) -> list[Tensor]:
    """y, dq, dk, dv of whole rows from the pieces of each of cp ranks."""
    found = [torch.zeros_like(x, dtype=dtype) for x in (t[3], *t[:3])]
    P = t[0].shape[2]
    for rank in range(cp):
        pieces = zigzag(cp, rank, P)
        visible = Visible.build(pieces=pieces, length=P, documents_BP=documents_BP, device=CPU)
        at = torch.cat([torch.arange(*piece) for piece in pieces])
        mine = [t[0][:, :, at], t[1], t[2], t[3][:, :, at]]
        y, d_q, d_k, d_v = backward(lambda q, k, v, visible=visible: fn(q, k, v, visible), mine, dtype)
        found[0][:, :, at], found[1][:, :, at] = y, d_q
        found[2] += d_k
        found[3] += d_v
    return found


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


@pytest.mark.parametrize(("cp", "mean"), [(1, None), (1, 60), (2, None), (2, 60)])
@pytest.mark.parametrize("G", [4, 1])
def test_bf16_is_as_close_as_torch(cp, mean, G) -> None:
    generator = torch.Generator().manual_seed(7)
    documents_BP, P = documents(2, 320, mean, generator), 320
    t = [x.to(torch.bfloat16).double() for x in leaves(2, 4, G, P, 16, generator)]
    seen = torch.ones(1, P, P, dtype=torch.bool).tril()
    if documents_BP is not None:
        seen = seen & (documents_BP[:, :, None] == documents_BP[:, None, :])

    def torch_s(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)

    want = backward(lambda *qkv: dense(*qkv, documents_BP), t, torch.float64)
    theirs = backward(torch_s, t, torch.bfloat16)
    for got, their, expected in zip(ranks(t, documents_BP, cp, torch.bfloat16), theirs, want, strict=True):
        assert error(got, expected) <= 1.5 * error(their, expected)


def test_whole_rows_across_documents_are_torch_s_own_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    t = leaves(2, 4, 2, 65, 8, generator)
    visible = Visible.build(pieces=((0, 65),), length=65, documents_BP=None, device=CPU)
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
        visible = Visible.build(pieces=((0, 300),), length=300, documents_BP=None, device=CPU)
        assert len(visible.blocks) == count
        for got, expected in zip(backward(lambda *x, of=visible: attend(*x, of), t, torch.bfloat16), want, strict=True):
            assert error(got, expected) < 1e-2


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("length", [64, 4096])
def test_ranks_have_the_same_work(cp, length) -> None:
    visible = [
        Visible.build(pieces=zigzag(cp, rank, length), length=length, documents_BP=None, device=CPU)
        for rank in range(cp)
    ]
    pairs = [of.pairs() for of in visible]
    assert sum(pairs) == length * (length + 1) // 2
    scores = [sum(block.scores for block in of.blocks) for of in visible]
    for counts in (pairs, scores):
        assert max(counts) <= 1.1 * sum(counts) / cp
    halves = [Visible.build(pieces=(at,), length=length, documents_BP=None, device=CPU) for at in zigzag(2, 0, length)]
    assert halves[1].pairs() > 6 * halves[0].pairs(), "pairs() sees what zigzag is for"


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
    for documents_BP in (None, (torch.rand(B, P, generator=generator) < 1 / 64).long().cumsum(1)):
        q, k, v, _ = leaves(B, H, 1, P, 8, generator)
        made.clear()
        for rank in range(2):
            visible = Visible.build(pieces=zigzag(2, rank, P), length=P, documents_BP=documents_BP, device=CPU)
            expected = sum(block.scores * (B if block.row is None else 1) for block in visible.blocks)
            attend(q[:, :, : P // 2].float(), k.float(), v.float(), visible)
            assert sum(made) == expected * H
            counts.append(expected)
            made.clear()
    assert sum(counts[:2]) < 1.15 * B * P * (P + 1) / 2
    assert sum(counts[2:]) < sum(counts[:2]) / 3


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
    visible = Visible.build(pieces=((0, P),), length=P, documents_BP=documents_BP, device=torch.device("cpu"))
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
@pytest.mark.parametrize("mean", [1, 7, 40])
@pytest.mark.parametrize("cp", [1, 2, 3])
def test_the_tables_of_the_variable_length_kernel(monkeypatch, cp, mean, flag) -> None:
    """The kernel has no CPU form: in its place, its definition, segment by segment."""
    signature = inspect.signature(pytest.importorskip("torch.nn.attention.varlen").varlen_attn)

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_k: Tensor, most_q: int, most_k: int, **kwargs
    ) -> Tensor:
        signature.bind(q, k, v, at_q, at_k, most_q, most_k, **kwargs)
        assert kwargs["window_size"] == (-1, 0)
        assert kwargs.get("enable_gqa", False) or q.shape[1] == k.shape[1]
        assert at_q.dtype == at_k.dtype == torch.int32
        assert (at_q[-1], at_k[-1]) == (len(q), len(k))
        found = []
        for (a, b), (c, e) in zip(pairwise(at_q.tolist()), pairwise(at_k.tolist()), strict=True):
            assert (b - a <= e - c, b - a <= most_q, 0 < e - c <= most_k) == (True, True, True)
            seen = torch.ones(b - a, e - c, dtype=torch.bool).tril(e - c - (b - a))
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
    assert documents_BP is not None
    start_BP = module.document_starts(documents_BP)

    def by_document(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        packed = tuple(module._pack(start_BP, piece, CPU) for piece in visible.pieces)
        return module._by_document(q, k, v, Visible(visible.pieces, visible.length, (), visible.start_BS, packed))

    want = backward(lambda *qkv: dense(*qkv, documents_BP), t, torch.float64)
    for got, expected in zip(ranks(t, documents_BP, cp, torch.float64, by_document), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
