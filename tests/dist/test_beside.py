"""The shared expert is computed while rows travel, forward and backward; nothing else about a step changes."""

import pytest
import torch
from test_train import MODEL, config, trainer
from torch import Tensor

from moetrain import comm
from moetrain.comm import _Flight
from moetrain.job import Config

DISPATCHERS = {
    "dropless": {"kind": "dropless"},
    "hierarchical": {"kind": "hierarchical", "ranks_per_node": 2},
    "capacity": {"kind": "capacity", "factor": 1.0},
}
LAYOUTS = [{"ep": 4, "dp": 4}, {"ep": 4, "dp": 2, "tp": 2}]
"""What a layer does, in this order: rows set out, the expert is computed, they are there."""


def order(rank: int, world: int, cfg: Config) -> tuple[list[str], int]:
    """Of a step, what began and ended in the layers with experts; and how many there are."""
    run, seen = trainer(rank, world, cfg), []
    rights = {name: getattr(_Flight, name) for name in ("start", "land")}

    def noted(name: str):
        def call(*args):
            seen.append(name)
            return rights[name](*args)

        return call

    def around(module, args, result) -> None:
        seen.append("shared")
        result[0].register_hook(lambda g: seen.append("its gradient"))

    layers = [block.shared for block in run.model.blocks.values() if block.shared is not None]  # pyright: ignore
    for shared in layers:
        shared.register_forward_hook(around)
        shared.ffn.register_full_backward_hook(lambda *_: seen.append("of its input"))
    try:
        for name in rights:
            setattr(_Flight, name, noted(name))
        run.step()
    finally:
        for name, right in rights.items():
            setattr(_Flight, name, right)
    return seen, len(layers)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_rows_are_on_their_way_while_it_is_computed(ranks, small_corpus, tmp_path, dispatcher, layout) -> None:
    model = MODEL | {"moe": MODEL["moe"] | {"dispatcher": DISPATCHERS[dispatcher]}}
    cfg = config(small_corpus, tmp_path / "run", model=model, layout=layout)
    for seen, layers in ranks(4).run(order, cfg):
        micro_batches = cfg.train.batch // cfg.layout.dp // cfg.train.micro_batch
        early = ["start", "land"] if dispatcher == "hierarchical" else []  # within the nodes, before
        there = [*early, "start", "shared", "land"]
        back = ["start", "its gradient", "of its input", "land", *early]
        assert seen == (there * layers + back * layers) * micro_batches, seen


def sent_and_found(rank: int, world: int) -> list[Tensor]:
    from torch import distributed as dist

    found, x = [], torch.arange(6.0).view(3, 2) + 10 * rank
    send = [1, 2] if rank == 0 else [3, 0]
    recv = [1, 3] if rank == 0 else [2, 0]
    for beside in (None, lambda: None):
        x_ND = x.clone().requires_grad_()
        way = {"recv": recv, "send": send, "group": dist.group.WORLD}
        y_MD = comm.all_to_all(x_ND, **way) if beside is None else comm.all_to_all_beside(x_ND, beside, **way)
        y_MD.backward(y_MD.detach() ** 2)
        found += [y_MD.detach(), x_ND.grad]
    return found


def test_it_is_the_same_all_to_all(ranks) -> None:
    for y_MD, grad_ND, beside_MD, beside_grad_ND in ranks(2).run(sent_and_found):
        assert torch.equal(y_MD, beside_MD)
        assert torch.equal(grad_ND, beside_grad_ND)


def stops(rank: int, world: int) -> int:
    """A second forward of recompute may end in the middle: what is on its way is waited for."""
    from torch import distributed as dist

    x = torch.ones(4, 2, requires_grad=True)

    def beside() -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        comm.all_to_all_beside(x, beside, recv=None, send=None, group=dist.group.WORLD)
    total = torch.ones(1)
    dist.all_reduce(total)
    return int(total)


def test_what_is_on_its_way_lands_where_the_work_beside_it_ends_early(ranks) -> None:
    assert ranks(2).run(stops) == [2, 2]
