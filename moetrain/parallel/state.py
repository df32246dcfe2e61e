"""What this rank holds of every tensor of the run, as boxes of logical tensors: global names, expert ids, no ranks."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.logical import Chunk, Logical
from moetrain.model.transformer import Transformer
from moetrain.moe.layer import MoE


def parameters(model: Transformer) -> dict[str, Logical]:
    """Name -> this rank's boxes of a parameter. Storage is shared: writing a box writes the parameter."""
    return {name: describe(model, name, local(p)) for name, p in model.named_parameters()}


def buffers(model: Transformer) -> dict[str, Logical]:
    """Name -> what is saved besides parameters: the balance terms' state, the same on every rank."""
    return {name: Logical(tuple(b.shape), b.dtype, (Chunk((0,) * b.dim(), b),)) for name, b in model.named_buffers()}


def describe(model: Transformer, name: str, box: Tensor) -> Logical:
    """``box`` lies where the local shard of parameter ``name`` lies: the parameter, its gradient, optimizer state."""
    p = model.get_parameter(name)
    offsets = _offsets(p)
    if ".moe.experts." in name:
        layer = model.blocks[name.split(".")[1]].moe
        assert isinstance(layer, MoE)
        owned = layer.placement.slots_of(layer.rank)
        mine = owned[offsets[0] : offsets[0] + box.shape[0]]
        chunks = tuple(Chunk((e, *offsets[1:]), box[i : i + 1]) for i, e in enumerate(mine))
        return Logical((model.cfg.moe.num_experts, *p.shape[1:]), box.dtype, chunks if box.numel() else ())
    if name in ("embedding", "head"):  # rows past the vocabulary are padding of this layout
        rows = max(0, min(box.shape[0], model.cfg.vocab_size - offsets[0]))
        chunks = (Chunk(offsets, box[:rows]),) if rows else ()
        return Logical((model.cfg.vocab_size, *p.shape[1:]), box.dtype, chunks)
    return Logical(tuple(p.shape), box.dtype, (Chunk(offsets, box),) if box.numel() else ())


def local(p: Tensor) -> Tensor:
    """This rank's storage of a parameter or gradient."""
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


def zero_padding_(model: Transformer) -> None:
    """Rows past the vocabulary hold zeros: they are never looked up, and decay must not grow them from garbage."""
    for name in ("embedding", "head"):
        p: nn.Parameter | None = getattr(model, name)
        if p is not None:
            box = local(p)
            box[max(0, model.cfg.vocab_size - _offsets(p)[0]) :] = 0


def _offsets(p: Tensor) -> tuple[int, ...]:
    if not isinstance(p, DTensor):
        return (0,) * p.dim()
    chunks = p.__create_chunk_list__()  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(chunks[0].offsets) if chunks else (0,) * p.dim()


def grad_is_missing(model: Transformer) -> list[str]:
    """Names of trained parameters whose gradient is None after a backward: always a bug, never zero."""
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
