"""Muon against its definition on whole matrices, written out; the state in bfloat16; the deal of the work."""

import pytest
import torch
from torch import Tensor

from moetrain.config import UserError, replace
from moetrain.optim import Kind, MuonConfig, OptimConfig, Optimizer, StateDType, check_saved, muon, work
from moetrain.optim.muon import newton_schulz

SHAPES = {
    "embedding.weight": (10, 6),
    "blocks.0.attention.q.weight": (8, 6),
    "blocks.0.attention.q.bias": (8,),
    "blocks.0.ffn.down.weight": (6, 9),
    "blocks.1.ffn_norm.weight": (6,),
    "blocks.1.moe.gate.weight": (3, 6),
    "blocks.1.moe.experts.gate_up": (3, 2, 5, 6),
    "blocks.1.moe.experts.down": (3, 6, 5),
    "blocks.1.shared.gate.weight": (1, 6),
    "blocks.1.shared.ffn.gate.weight": (4, 6),
}
MATRICES = ("q.weight", "ffn.down.weight", "gate_up", "experts.down", "ffn.gate.weight")


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def orthogonal(d: Tensor) -> Tensor:
    """One matrix, as the quintic's recipe has it."""
    x = d / (d.norm() + 1e-7)
    for _ in range(5):
        s = x.T @ x
        x = x @ (3.4445 * torch.eye(len(s), dtype=d.dtype) - 4.7750 * s + 2.0315 * s @ s)
    return x


@pytest.mark.parametrize("scale", [None, 0.25])
def test_five_updates_equal_muon_written_out(scale, monkeypatch) -> None:
    monkeypatch.setattr(muon, "_AT_ONCE", 100)  # several batches
    cfg = OptimConfig(kind=Kind.muon, weight_decay=0.3, muon=MuonConfig(lr_scale=2.0, momentum=0.9))
    params, truth = tensors(0), tensors(0)
    optimizer = Optimizer(cfg, params)
    adamw = Optimizer(replace(cfg, kind=Kind.adamw), {n: t.clone() for n, t in truth.items()})
    momentum = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    for step in range(1, 6):
        factor = None if scale is None else torch.tensor(scale)
        optimizer.step(tensors(step), lr=0.1, scale=factor)
        adamw.step(tensors(step), lr=0.1, scale=factor)
        for n, g in tensors(step).items():
            momentum[n] = 0.9 * momentum[n] + g * (scale or 1.0)
            ahead = g * (scale or 1.0) + 0.9 * momentum[n]
            for at in torch.cartesian_prod(*(torch.arange(k) for k in (*SHAPES[n][:-2], 1))).view(
                -1, len(SHAPES[n][:-2]) + 1
            ):
                if n.endswith(MATRICES):
                    i = tuple(at[:-1].tolist())
                    update = orthogonal(ahead[i]) * 0.2 * max(SHAPES[n][-2:]) ** 0.5
                    truth[n][i] = truth[n][i] * (1 - 0.2 * 0.3) - 0.2 * update
    for n, p in params.items():
        want = truth[n] if n.endswith(MATRICES) else adamw.adamw.params[n].detach()
        torch.testing.assert_close(p, want, rtol=0, atol=1e-12)
    assert set(optimizer.state()["momentum"]) == {n for n in SHAPES if n.endswith(MATRICES)}
    assert set(optimizer.state()["exp_avg"]) == {n for n in SHAPES if not n.endswith(MATRICES)}


@pytest.mark.parametrize("shape", [(3, 7, 20), (3, 20, 7), (2, 9, 9)])
def test_an_update_is_nearly_orthogonal_and_keeps_singular_vectors(shape) -> None:
    d = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    o = newton_schulz(d, steps=10)
    s = torch.linalg.svdvals(o)
    assert ((s > 0.65) & (s < 1.25)).all()
    u, _, vh = torch.linalg.svd(d, full_matrices=False)
    inner = u.mT @ o @ vh.mT
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-11)
    narrow = newton_schulz(d.bfloat16(), steps=5).double()
    assert (narrow - newton_schulz(d, steps=5)).norm() < 0.1 * narrow.norm()


def test_zeros_stay_zeros_and_experts_do_not_see_each_other() -> None:
    params, cfg = tensors(0), OptimConfig(kind=Kind.muon, weight_decay=0.0)
    before, grads = {n: t.clone() for n, t in params.items()}, tensors(1)
    grads["blocks.1.moe.experts.down"][1] = 0
    grads["blocks.1.moe.experts.gate_up"][2, :, 3] = 0
    Optimizer(cfg, params).step({n: g.clone() for n, g in grads.items()}, lr=0.1, scale=None)
    moved = {n: params[n] - before[n] for n in params}
    assert (moved["blocks.1.moe.experts.down"][1] == 0).all(), "an expert that nobody chose"
    assert (moved["blocks.1.moe.experts.gate_up"][2, :, 3] == 0).all()
    again, other = {n: t.clone() for n, t in before.items()}, {n: g.clone() for n, g in grads.items()}
    other["blocks.1.moe.experts.gate_up"][0, 1] *= -3
    Optimizer(cfg, again).step(other, lr=0.1, scale=None)
    same = again["blocks.1.moe.experts.gate_up"] == params["blocks.1.moe.experts.gate_up"]
    assert same[1:].all(), "other experts"
    assert same[0, 0].all(), "its gate projection, where up has another gradient"
    assert not same[0, 1].all()


def test_gates_are_turned_where_that_is_chosen() -> None:
    state = Optimizer(OptimConfig(kind=Kind.muon, muon=MuonConfig(gates=True)), tensors(0)).state()
    assert {"blocks.1.moe.gate.weight"} == {n for n in state["momentum"] if not n.endswith(MATRICES)}, "no vector"


@pytest.mark.parametrize("kind", Kind)
def test_state_in_bfloat16_is_the_rounded_state_and_resumes_bit_for_bit(kind) -> None:
    cfg = OptimConfig(kind=kind, state_dtype=StateDType.bfloat16)
    params, wide = tensors(0, torch.float32), tensors(0, torch.float32)
    optimizer, exact = Optimizer(cfg, params), Optimizer(replace(cfg, state_dtype=None), wide)
    for step in range(1, 4):
        for one in (optimizer, exact):
            one.step(tensors(step, torch.float32), lr=0.01, scale=torch.tensor(0.5))
        if step == 1:  # the update is made before its state is rounded
            for n, p in params.items():
                torch.testing.assert_close(p, wide[n], rtol=0, atol=1e-6)
            for k, averages in optimizer.state().items():
                for n, x in averages.items():
                    assert x.dtype is torch.bfloat16
                    torch.testing.assert_close(x.float(), exact.state()[k][n], rtol=2**-8, atol=0)
        if step == 2:
            again = {n: t.clone() for n, t in params.items()}
            resumed = Optimizer(cfg, again)
            for k, averages in resumed.state().items():
                for n, x in averages.items():
                    x.copy_(optimizer.state()[k][n])
            resumed.set_steps(2)
    resumed.step(tensors(3, torch.float32), lr=0.01, scale=torch.tensor(0.5))
    assert all(torch.equal(again[n], params[n]) for n in params)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"muon": {"ns_steps": 0}}, "optim.muon.ns_steps=0: has to be at least 1"),
        ({"muon": {"momentum": 1.0}}, "optim.muon.momentum=1.0: has to be at least 0 and below 1"),
        ({"muon": {"momentum": -0.1}}, "optim.muon.momentum=-0.1"),
        ({"muon": {"lr_scale": 0.0}}, "optim.muon.lr_scale=0.0: has to be above 0"),
        ({"muon": {"weight_decay": -1.0}}, "optim.muon.weight_decay=-1.0: a decay is not negative"),
        ({"beta2": 0.999, "state_dtype": StateDType.bfloat16}, "optim.beta2=0.999 with optim.state_dtype=bfloat16"),
    ],
)
def test_bad_keys_are_named(keys, says) -> None:
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        OptimConfig(**keys | ({"muon": MuonConfig(**keys["muon"])} if "muon" in keys else {}))


def test_a_checkpoint_of_another_optimizer_is_named(tmp_path) -> None:
    def saved(cfg: OptimConfig) -> dict:
        state = {f"optim.{k}.{n}": (x.shape, x.dtype) for k, v in optimizer(cfg).state().items() for n, x in v.items()}
        return state | {f"model.{n}": (torch.Size(s), torch.float32) for n, s in SHAPES.items()}

    def optimizer(cfg: OptimConfig) -> Optimizer:
        return Optimizer(cfg, tensors(0, torch.float32))

    adamw, turned = OptimConfig(), OptimConfig(kind=Kind.muon)
    narrow = replace(turned, state_dtype=StateDType.bfloat16)
    for cfg in (adamw, turned, narrow):
        check_saved(cfg, saved(cfg), tmp_path)
    for cfg, other, says in (
        (
            adamw,
            turned,
            r"keeps momentum of blocks.0.attention.q.weight, where optim.kind=adamw .* keeps exp_avg, exp_avg_sq",
        ),
        (
            turned,
            adamw,
            r"keeps exp_avg, exp_avg_sq of .*, where optim.kind=muon .* keeps momentum: restore the optim.kind",
        ),
        (turned, narrow, r"in bfloat16, optim.state_dtype=null keeps it in float32: set optim.state_dtype=bfloat16"),
        (narrow, turned, r"in float32, optim.state_dtype=bfloat16 keeps it in bfloat16: set optim.state_dtype=float32"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            check_saved(cfg, saved(other), tmp_path)
        assert "\n" not in str(caught.value)


def test_work_is_dealt_evenly_and_only_to_holders() -> None:
    shapes = [(1, 1, 8, 8)] * 8 + [(8, 2, 6, 8)]
    held = [[(n, 0, (0, 2 * r, 0), (1, 2, 8)) for n in range(8)] for r in range(4)]  # cut into rows over four ranks
    for r in range(4):
        held[r] += [(8, e, (0, 0, 0), (2, 6, 8)) for e in range(8) if e // 2 == r]  # two experts each
    found = [work.batches(held, shapes, rank=r, steps=5, at_once=2**20) for r in range(4)]
    assert all(len(batches) == 1 for batches in found)
    for r, (batch,) in enumerate(found):
        assert sorted(batch.mine[2, 6, 8]) == [(8, 2 * r), (8, 2 * r + 1)]
        assert len(batch.mine[1, 8, 8]) == 2
        for peer, (other,) in enumerate(found):
            assert batch.there.out_counts[peer] == other.there.into_counts[r]
            assert batch.back.out_counts[peer] == other.back.into_counts[r]
    alone = work.batches([[*held[0][8:]]], [*shapes[:8], (2, 2, 6, 8)], rank=0, steps=5, at_once=1)
    assert [batch.travels for batch in alone] == [False, False]
    with pytest.raises(RuntimeError, match="do not tile it"):
        work.batches(held[:3], shapes, rank=0, steps=5, at_once=1)
