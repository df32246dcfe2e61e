"""Every dispatcher x ep degree against the plain-loop reference: outputs and every gradient, float64, exact routing."""

from dataclasses import replace
import itertools
from functools import cache

import pytest
import reference
import torch
from drawn import drawn
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import counter
from moetrain.config import OPTIONS
from moetrain.kernels import Kernel
from moetrain.layouts import Layout
from moetrain.mesh import Mesh
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.placement.types import Grid
from moetrain.moe.routers.topk import Score, TopK
from moetrain.moe.types import Context

B, S, D, F, E, K = 12, 12, 16, 28, 8, 2
DISPATCHERS = {name: cls() for name, cls in OPTIONS["dispatcher"].items()}
DISPATCHERS["capacity, nothing dropped"] = OPTIONS["dispatcher"]["capacity"](factor=float(E))
DISPATCHERS["capacity, much dropped"] = OPTIONS["dispatcher"]["capacity"](factor=0.5)
ROUTERS = {
    "softmax": TopK(top_k=K),
    "sigmoid": TopK(top_k=K, score=Score.sigmoid, scale=2.5),
    "top-3, weights as they are": TopK(top_k=3, renormalize=False),
}


def full(name: str, *shape: int, std: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor that depends on its name only."""
    box = torch.empty(shape, dtype=dtype)
    counter.fill_normal_(box, shape=shape, offsets=(0,) * len(shape), key=counter.key(7, name), std=std)
    return box


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x_BSD = full("x", B, S, D, std=1.0, dtype=dtype)
    x_BSD[0] += 3 * full("skew", D, dtype=dtype)  # one sequence crowds a few experts
    return {
        "x": x_BSD,
        "gate": full("gate", E, D, dtype=dtype),
        "gate_up": full("gate_up", E, 2, F, D, dtype=dtype),
        "down": full("down", E, D, F, dtype=dtype),
        "bias": full("bias", E, std=0.05, dtype=dtype),
        "g": full("g", B, S, D, dtype=dtype),
    }


@cache
def truth(router_name: str, dispatcher_name: str) -> dict[str, Tensor]:
    router, dispatcher = ROUTERS[router_name], DISPATCHERS[dispatcher_name]
    t = tensors()
    leaves = {n: t[n].requires_grad_() for n in ("x", "gate", "gate_up", "down")}
    y, load_E, dropped = reference.moe(
        t["x"], t["gate"], t["gate_up"], t["down"], top_k=router.top_k, score=router.score.value,
        renormalize=router.renormalize, scale=router.scale, bias_E=t["bias"],
        factor=getattr(dispatcher, "factor", None),
    )  # fmt: skip
    (y * t["g"]).sum().backward()
    found = {"y": y.detach(), "load": load_E, "dropped": torch.tensor(dropped)}
    return found | {f"grad {n}": leaf.grad for n, leaf in leaves.items()}  # pyright: ignore


def layer_on(
    rank: int, world: int, ep: int, etp: int, router: TopK, dispatcher, kernel: Kernel, dtype: torch.dtype
) -> dict:
    mesh = Mesh.build(Layout(dp=world, ep=ep, etp=etp), rank=rank, world=world, device=torch.device("cpu"))
    cfg = MoEConfig(num_experts=E, hidden=F, router=router, dispatcher=dispatcher, kernel=kernel)
    layer = MoE(cfg, dim=D, layer=0).to(dtype)
    at, group = mesh.index("moe", "edp", "ep"), mesh.group("moe", "ep", "etp")
    layer.place(Grid(mesh.layout.edp, ep), etp=etp, rank=at, group=group)
    layer.to(dtype)
    t = tensors(dtype)
    owned = layer.placement.slots_of(layer.rank)
    start = mesh.index("moe", "etp") * layer.width
    real = slice(start, start + layer.width), slice(0, max(0, min(layer.width, F - start)))
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.zero_()  # what pads the width
        layer.gate.weight.copy_(t["gate"])
        layer.bias_E.copy_(t["bias"])
        layer.experts.gate_up[:, :, real[1]] = t["gate_up"][owned][:, :, real[0]]
        layer.experts.down[:, :, real[1]] = t["down"][owned][:, :, real[0]]
    mine = slice(rank * B // world, (rank + 1) * B // world)
    x = t["x"][mine].clone().requires_grad_()
    ctx = Context(step=0, micro_batch=0, sample_B=torch.arange(B)[mine], position_S=torch.arange(S), routed_tokens=1.0)
    y, _ = layer(x, {}, ctx)
    (y * t["g"][mine]).sum().backward()
    grads = {n: torch.zeros_like(t[n]) for n in ("gate_up", "down")}
    grads["gate_up"][owned, :, real[0]] = layer.experts.gate_up.grad[:, :, real[1]]
    for e, g in zip(owned, layer.experts.down.grad, strict=True):
        grads["down"][e, :, real[0]] = g[:, real[1]]
    assert layer.experts.down.grad[:, :, real[1].stop :].abs().sum() == 0, "padding gets no gradient"
    return {
        "y": y.detach(), "grad x": x.grad, "grad gate": layer.gate.weight.grad, "load": layer.load_ME[0],
        "dropped": layer.dropped_ME.sum(), "grad gate_up": grads["gate_up"], "grad down": grads["down"],
    }  # fmt: skip


def together(parts: list[dict]) -> dict:
    """What all ranks found: tokens concatenated, gradients and counts summed."""
    return {n: torch.cat([p[n] for p in parts]) if n in ("y", "grad x") else sum(p[n] for p in parts) for n in parts[0]}


def compare(got: dict, want: dict, tolerance: float) -> None:
    for name, expected in want.items():
        if not expected.is_floating_point():
            assert torch.equal(got[name].long(), expected.long()), name
            continue
        error = (got[name].double() - expected).norm() / expected.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance}"


GRIDS = {1: [(1, 1)], 2: [(1, 1), (2, 1), (1, 2)], 3: [(1, 3)], 4: [(2, 1), (4, 1), (2, 2)]}


PLACES = [(world, *grid) for world, grids in GRIDS.items() for grid in grids]


@pytest.mark.parametrize(
    ("place", "router", "name"), drawn(itertools.product(PLACES, ROUTERS, DISPATCHERS), 24, of="dispatchers"), ids=str
)
def test_every_dispatcher_ep_and_etp_equals_the_reference(ranks, place, router, name) -> None:
    world, ep, etp = place
    want = truth(router, name)
    assert (want["dropped"] > 0) == ("much" in name or name == "capacity"), "the case drops what its name says"
    words = ep, etp, ROUTERS[router], DISPATCHERS[name], Kernel.auto, torch.float64
    compare(together(ranks(world).run(layer_on, *words)), want, 1e-12)


IN_NODES = [(4, 2, 4, 1), (4, 2, 1, 4), (4, 2, 2, 2), (8, 2, 8, 1), (8, 4, 4, 2), (8, 4, 2, 4), (8, 2, 4, 1), (8, 8, 8, 1)]


@pytest.mark.parametrize("place", drawn(IN_NODES, 4, of="nodes"), ids=str)
def test_hierarchical_in_nodes_equals_the_reference(ranks, place) -> None:
    world, node, ep, etp = place
    hierarchical = OPTIONS["dispatcher"]["hierarchical"](ranks_per_node=node)
    words = ep, etp, ROUTERS["sigmoid"], hierarchical, Kernel.auto, torch.float64
    compare(together(ranks(world).run(layer_on, *words)), truth("sigmoid", "dropless"), 1e-12)


def test_grouped_mm_equals_the_reference_in_float32(ranks) -> None:
    router = ROUTERS["softmax"]
    for name, dispatcher in DISPATCHERS.items():
        want = truth("softmax", name)
        got = together(ranks(2).run(layer_on, 2, 1, router, dispatcher, Kernel.torch, torch.float32))
        compare(got, want, 2e-6)


def empty_ranks(rank: int, world: int) -> list[float]:
    """All tokens go to expert 0: three of four ranks compute nothing, forward and backward."""
    mesh = Mesh.build(Layout(dp=world, ep=world), rank=rank, world=world, device=torch.device("cpu"))
    layer = MoE(MoEConfig(num_experts=E, hidden=F, router=TopK(top_k=1, renormalize=False)), dim=D, layer=0)
    layer.place(Grid(1, world), etp=1, rank=rank, group=mesh.group("moe", "ep"))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(full("w", *p.shape, dtype=torch.float32))
        layer.bias_E.zero_()
        layer.bias_E[0] = 10.0
    x = full(f"x{rank}", 2, S, D, dtype=torch.float32)
    ctx = Context(step=0, micro_batch=0, sample_B=torch.arange(2), position_S=torch.arange(S), routed_tokens=1.0)
    y, _ = layer(x, {}, ctx)
    y.square().sum().backward()
    assert layer.load_ME[0].tolist() == [2 * S] + [0] * (E - 1)
    return [p.grad.abs().sum().item() for p in layer.experts.parameters()]  # pyright: ignore


def test_ranks_without_tokens_do_not_hang_and_have_zero_gradients(ranks) -> None:
    first, *others = ranks(4).run(empty_ranks)
    assert min(first) > 0
    assert others == [[0.0, 0.0]] * 3


def masked(rank: int, world: int, dispatcher) -> list[Tensor]:
    """The same real tokens, with and without padding rows that hold NaN."""
    mesh = Mesh.build(Layout(dp=world, ep=world), rank=rank, world=world, device=torch.device("cpu"))
    layer = MoE(MoEConfig(num_experts=E, hidden=F, dispatcher=dispatcher), dim=D, layer=0)
    layer.place(Grid(1, world), etp=1, rank=rank, group=mesh.group("moe", "ep"))
    with torch.no_grad():
        for n, p in layer.named_parameters():
            p.copy_(full(n, *p.shape, dtype=torch.float32))
        layer.bias_E.zero_()
    x = full(f"x{rank}", 3, S, D, dtype=torch.float32)
    base = Context(step=0, micro_batch=0, sample_B=torch.arange(3), position_S=torch.arange(S), routed_tokens=1.0)
    mask_BS = torch.ones(3, S, dtype=torch.bool)
    mask_BS[1] = False
    mask_BS[2, 9:] = False
    x[~mask_BS] = torch.nan
    x.requires_grad_()
    y, _ = layer(x, {}, replace(base, mask_BS=mask_BS))
    assert layer.load_ME[0].sum() == K * mask_BS.sum(), "padding is not routed"
    y[mask_BS].square().sum().backward()
    grads = [x.grad[mask_BS], *[p.grad for p in layer.experts.parameters()]]  # pyright: ignore
    assert all(g.isfinite().all() for g in grads), "padding reaches nobody"
    return [y[mask_BS].detach(), y[~mask_BS].detach()]


@pytest.mark.parametrize("name", DISPATCHERS)
def test_padding_is_masked_from_everything(ranks, name) -> None:
    for real, padding in ranks(2).run(masked, DISPATCHERS[name]):
        assert real.isfinite().all()
        assert padding.abs().max() == 0
