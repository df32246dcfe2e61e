"""What this rank holds of every tensor of the run, as boxes of logical tensors: global names, expert ids, no ranks."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import comm
from moetrain.logical import Chunk, Logical
from moetrain.model.transformer import Transformer
from moetrain.parallel.plan import Held, Plan


def parameters(model: Transformer, plan: Plan) -> dict[str, Logical]:
    """Name -> this rank's boxes of a parameter. Storage is shared: writing a box writes the parameter."""
    return {name: describe(model, plan, name, local(p)) for name, p in model.named_parameters()}


def buffers(model: Transformer) -> dict[str, Logical]:
    """Name -> what is saved besides parameters: the balance terms' state, the same on every rank."""
    return {name: Logical(tuple(b.shape), b.dtype, (Chunk((0,) * b.dim(), b),)) for name, b in model.named_buffers()}


def describe(model: Transformer, plan: Plan, name: str, box: Tensor) -> Logical:
    """``box`` lies where the local shard of parameter ``name`` lies: the parameter, its gradient, optimizer state.

    What lies past the logical shape is padding of this layout: zeros that nobody saves.
    """
    held, offsets = plan[name], list(_offsets(model.get_parameter(name)))
    first = offsets[0]
    offsets[held.dim] += held.start
    box = _without_padding(held, offsets, box)
    if not box.numel():
        return Logical(held.shape, box.dtype, ())
    if held.ids is None:
        return Logical(held.shape, box.dtype, (Chunk(tuple(offsets), box),))
    mine = held.ids[first : first + box.shape[0]]
    chunks = tuple(Chunk((e, *offsets[1:]), box[i : i + 1]) for i, e in enumerate(mine))
    return Logical(held.shape, box.dtype, chunks)


def unpadded(model: Transformer, plan: Plan, name: str, box: Tensor) -> Tensor:
    """``box``, which lies where the local shard of parameter ``name`` lies, without this layout's padding."""
    held, offsets = plan[name], list(_offsets(model.get_parameter(name)))
    offsets[held.dim] += held.start
    return _without_padding(held, offsets, box)


def _without_padding(held: Held, offsets: list[int], box: Tensor) -> Tensor:
    room = [max(0, min(n, whole - at)) for n, whole, at in zip(box.shape, held.shape, offsets, strict=True)]
    if held.ids is not None:
        room[0] = box.shape[0]
    return box[tuple(slice(n) for n in room)]


def local(p: Tensor) -> Tensor:
    """This rank's storage of a parameter or gradient."""
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


def _offsets(p: Tensor) -> tuple[int, ...]:
    if not isinstance(p, DTensor):
        return (0,) * p.dim()
    chunks = p.__create_chunk_list__()  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(chunks[0].offsets) if chunks else (0,) * p.dim()


def grads(model: Transformer) -> dict[str, Tensor]:
    """Name -> this rank's storage of the gradient; raises where one is missing: always a bug, never zero."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if missing := [name for name, g in found.items() if g is None]:
        raise RuntimeError(f"no gradient reached {', '.join(missing)}")
    return {name: local(g) for name, g in found.items() if g is not None}


def sum_copies_(grads: dict[str, Tensor], plan: Plan) -> None:
    """After the last backward: sum what several ranks hold alike, one all-reduce for each group and dtype."""
    together: dict[tuple, list[Tensor]] = {}
    for name, g in grads.items():
        if plan[name].group is not None:
            together.setdefault((plan[name].group, g.dtype), []).append(g)
    for (group, _), tensors in together.items():
        flat = comm.all_reduce_(torch.cat([g.flatten() for g in tensors]), group=group)
        for g, summed in zip(tensors, flat.split([g.numel() for g in tensors]), strict=True):
            g.copy_(summed.view_as(g))
