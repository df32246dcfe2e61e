"""Weights in bfloat16: rounding is right on average, exact where it can be; the update is AdamW's, in any pieces."""

import math

import pytest
import torch
from torch import Tensor

from moetrain import counter
from moetrain.config import UserError, replace
from moetrain.logical import Chunk, Logical
from moetrain.optim import OptimConfig, Optimizer, StateDType, pieces, rounding

BF16 = StateDType.bfloat16
EVERY = torch.arange(65536).to(torch.int16)
"""All that 16 random bits can be."""


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    x = x.clone()
    rounding.round_(x, bits)
    assert torch.equal(x.bfloat16().float().nan_to_num(nan=1.0), x.nan_to_num(nan=1.0)), "bfloat16 represents it"
    return x


def test_the_mean_over_all_bits_is_the_number_itself() -> None:
    """Of normal and subnormal numbers of both signs, to the last bit of float64; and only neighbours come out."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(64, generator=generator) * 10.0 ** torch.randint(-44, 38, (64,), generator=generator)
    for x in [*numbers, torch.tensor(1.5e-42), torch.tensor(-1e-45), torch.tensor(3.389e38), torch.tensor(0.02)]:
        found = rounded(x.expand(65536).contiguous(), EVERY).double()
        assert found.mean().item() == x.double().item(), x
        assert len(found.unique()) <= 2, x


def test_what_bfloat16_represents_never_changes() -> None:
    """Every one of the 65,536 there are: zeros, subnormals, infinities and NaNs too."""
    x = EVERY.view(torch.bfloat16).float()
    for bits in (0, 1, 255, 32767, -32768, -1):
        after = rounded(x, torch.full_like(EVERY, bits))
        assert torch.equal(after.isnan(), x.isnan())
        assert torch.equal(after.view(torch.int32)[~x.isnan()], x.view(torch.int32)[~x.isnan()])


def test_no_number_becomes_infinite() -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([3.4e38, -3.4e38, torch.finfo(torch.float32).max, torch.inf, -torch.inf])
    for bits in (0, -1):
        found = rounded(x, torch.full((5,), bits, dtype=torch.int16))
        assert found.tolist() == [largest, -largest, largest, torch.inf, -torch.inf]


def test_random_bits_are_even_and_independent() -> None:
    """Of neighbours, of names, of steps: no correlation beyond five standard deviations."""
    n = 2**18
    run = rounding.Run(0, 0, 0, 0, 1, n)

    def drawn(seed: int, step: int, name: str) -> Tensor:
        bits = rounding.bits(run, key=rounding.key(seed, step, name), device=torch.device("cpu"))[0]
        return (bits.to(torch.int32) & 0xFFFF).double() / 65536 - 0.5 + 2.0**-17

    first, others = drawn(0, 1, "a"), [drawn(0, 2, "a"), drawn(1, 1, "a"), drawn(0, 1, "b")]
    assert abs(first.mean()) < 5 * math.sqrt(1 / 12 / n)
    assert abs(first.square().mean() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    for other in (*others, first.roll(1), first.roll(2), first.roll(4)):
        assert abs((first * other).mean()) < 5 / 12 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(24,), (7, 5), (6, 8), (3, 2, 5, 6), (4, 3, 12)], ids=str)
def test_any_cut_draws_the_same_bits(shape) -> None:
    """Boxes of a logical tensor, padded storage, several boxes in one storage, runs cut small."""
    key = rounding.key(3, 5, "w")
    index = torch.arange(math.prod(shape)).view(shape)
    truth = (counter.mixed(index >> 2, key=key) >> ((index & 3) * 16)).to(torch.int16)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        offsets = [int(torch.randint(0, n, (), generator=generator)) for n in shape]
        sizes = [int(torch.randint(1, n - o + 1, (), generator=generator)) for n, o in zip(shape, offsets, strict=True)]
        within = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        storage = torch.zeros([n + 1 for n in sizes], dtype=torch.int16)  # a row and a column of padding
        box = storage[tuple(slice(n) for n in sizes)]
        chunks = [Chunk(tuple(offsets), box)]
        if len(shape) > 2:  # as experts are: each a box
            chunks = [Chunk((offsets[0] + i, *offsets[1:]), box[i : i + 1]) for i in range(sizes[0])]
        for run in rounding.runs(Logical(shape, torch.bfloat16, tuple(chunks)), storage):
            for part in run.cut(12):
                assert part.numel <= 12
                part.of(storage).copy_(rounding.bits(part, key=key, device=torch.device("cpu")))
        assert torch.equal(box, truth[within])
        assert storage.count_nonzero() <= box.numel(), "padding is left alone"


def test_experts_that_follow_one_another_are_one_run() -> None:
    storage = torch.zeros(4, 2, 8, 16)

    def of(ids: list[int]) -> Logical:
        chunks = tuple(Chunk((e, 0, 0, 0), storage[i : i + 1]) for i, e in enumerate(ids))
        return Logical((9, 2, 8, 16), torch.bfloat16, chunks)

    assert len(rounding.runs(of([3, 4, 5, 6]), storage)) == 1
    assert len(rounding.runs(of([0, 1, 7, 8]), storage)) == 2
    part = Logical((9, 2, 32, 16), torch.bfloat16, tuple(Chunk((e, 0, 8, 0), storage[e : e + 1]) for e in range(4)))
    assert rounding.runs(part, storage) == [rounding.Run(0, 128, 128, 512, 8, 128)]


NAMES = ("blocks.0.attention.q.weight", "blocks.0.ffn_norm.weight", "blocks.0.moe.experts.down")
SHAPES = ((33, 17), (29,), (3, 10, 7))


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in zip(NAMES, SHAPES, strict=True)}


def grads(step: int) -> dict[str, Tensor]:
    return {n: g * 10.0 ** (step % 3 - 2) for n, g in tensors(100 + step).items()}


@pytest.mark.parametrize("state", [None, BF16])
def test_the_mean_of_many_seeds_is_the_update_in_float64(state) -> None:
    """An update of 1/200 of the spacing, which rounding to nearest would lose altogether."""
    start = {n: torch.full_like(t, 1.0 + 2**-7) for n, t in tensors(0).items()}
    cfg, lr, seeds = OptimConfig(state_dtype=state, weight_decay=0.1), 2.0**-7 / 200, 600
    sums = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in start.items()}
    for seed in range(seeds):
        weights = {n: t.bfloat16() for n, t in start.items()}
        Optimizer(cfg, weights, seed=seed).step(grads(0), lr=lr, scale=None, step=7)
        for n in NAMES:
            sums[n] += weights[n].double()
    every, want = torch.cat([s.flatten() for s in sums.values()]) / seeds, []
    for n in NAMES:
        g = grads(0)[n].double()
        decay = 0.0 if "norm" in n else lr * 0.1
        want.append((start[n].double() * (1 - decay) - lr * g / (g.abs() + cfg.eps)).flatten())
    moved, expected = every - (1.0 + 2**-7), torch.cat(want) - (1.0 + 2**-7)
    sign = expected.sign()
    chance = 2.0**-7 * math.sqrt(1 / 200 / seeds / len(every))  # of the mean of all: each rounds away with 1/200
    assert (moved * sign).mean().item() == pytest.approx((expected * sign).mean().item(), abs=5 * chance)
    assert expected.abs().max() < 2.0**-8 / 50


def written_out(cfg: OptimConfig, start: dict[str, Tensor], *, seed: int, steps: int) -> dict[str, Tensor]:
    """In float64, rounded where something is stored."""
    weights = {n: t.double() for n, t in start.items()}
    m, v = ({n: torch.zeros_like(t, dtype=torch.float64) for n, t in start.items()} for _ in range(2))
    narrow = torch.float32 if cfg.state_dtype is None else cfg.state_dtype.torch
    for step in range(steps):
        for n, g in grads(step).items():
            g = g.double() * 0.5
            m[n] = cfg.beta1 * m[n] + (1 - cfg.beta1) * g
            v[n] = cfg.beta2 * v[n] + (1 - cfg.beta2) * g * g
            hat = m[n] / (1 - cfg.beta1 ** (step + 1)), v[n] / (1 - cfg.beta2 ** (step + 1))
            w = weights[n] * (1 - (0 if "norm" in n else 1e-2 * cfg.weight_decay)) - 1e-2 * hat[0] / (
                hat[1].sqrt() + cfg.eps
            )
            m[n], v[n] = m[n].float().to(narrow).double(), v[n].float().to(narrow).double()
            if cfg.weight_dtype is BF16:
                logical = Logical(tuple(w.shape), torch.float32, (Chunk((0,) * w.dim(), w.float()),))
                w = rounding.rounded(w.float(), logical, key=rounding.key(seed, step, n)).double()
            weights[n] = w
    return weights


@pytest.mark.parametrize("weight", [None, BF16])
@pytest.mark.parametrize("state", [None, BF16])
def test_updates_are_those_written_out(weight, state) -> None:
    """Float32 to its rounding; in bfloat16 a number that rounding moves over the edge goes to the neighbour."""
    cfg = OptimConfig(state_dtype=state, weight_dtype=weight, weight_decay=0.3)
    start = {n: t.to(torch.float32 if weight is None else torch.bfloat16) for n, t in tensors(0).items()}
    want = written_out(cfg, start, seed=4, steps=6)
    weights = {n: t.clone() for n, t in start.items()}
    optimizer = Optimizer(cfg, weights, seed=4)
    for step in range(6):
        optimizer.step(grads(step), lr=1e-2, scale=torch.tensor(0.5, dtype=torch.float64), step=step)
    for n in NAMES:
        apart = (weights[n].double() - want[n]).abs()
        if weight is None:
            assert apart.max() < (1e-6 if state is None else 2e-4), n  # an average over the edge: 2^-9 of an update
            assert (apart > 1e-6).double().mean() < 0.02, n
        else:
            assert (apart > 0).double().mean() < 0.02, n
            assert (apart <= 2.0**-7 * want[n].abs()).all(), n
    assert {x.dtype for x in optimizer.state()["exp_avg"].values()} == {torch.float32 if state is None else BF16.torch}


@pytest.mark.parametrize("weight", [None, BF16])
def test_pieces_of_any_size_and_a_skip_flag_give_the_same_bits(monkeypatch, weight) -> None:
    """One element more in a vector, or fewer, moves none; on a GPU a flag decides, where the host does not know it."""
    cfg = OptimConfig(state_dtype=BF16, weight_dtype=weight)

    def after(most: int, skip: list[bool] | None = None) -> list[Tensor]:
        monkeypatch.setattr(pieces, "_ON_CPU", most)
        weights = {n: t.to(torch.float32 if weight is None else torch.bfloat16) for n, t in tensors(0).items()}
        optimizer = Optimizer(cfg, weights, seed=1)
        for step in range(4):
            flag = None if skip is None else torch.tensor(skip[step])
            optimizer.adamw.step(grads(step), lr=1e-2, scale=torch.tensor(0.3), skip=flag, step=step)
        return [*weights.values(), *(x for kind in optimizer.state().values() for x in kind.values())]

    want = after(2**16)
    for most in (4, 20, 64, 300):
        assert all(torch.equal(a, b) for a, b in zip(after(most), want, strict=True)), most
    flagged = after(2**16, [False, False, False, False])
    for a, b in zip(flagged, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype is torch.bfloat16 else 1e-6, atol=1e-6)
    frozen = after(64, [True] * 4)
    start = {n: t.to(torch.float32 if weight is None else torch.bfloat16) for n, t in tensors(0).items()}
    assert all(torch.equal(a, b) for a, b in zip(frozen, start.values(), strict=False))
    assert not any(x.count_nonzero() for x in frozen[3:]), "averages too"


def test_weights_are_kept_in_no_less_than_is_computed_in() -> None:
    cfg = replace(OptimConfig(), weight_dtype=BF16)
    cfg.check_weights(torch.bfloat16)
    for compute in (torch.float32, torch.float64):
        with pytest.raises(UserError, match=r"optim\.weight_dtype=bfloat16 with train\.dtype=float.*no less than"):
            cfg.check_weights(compute)
    with pytest.raises(UserError, match=r"optim\.weight_dtype=float32 with train\.dtype=float64"):
        replace(OptimConfig(), weight_dtype=StateDType.float32).check_weights(torch.float64)
