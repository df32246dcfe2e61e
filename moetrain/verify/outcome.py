"""What one step leaves behind for a comparison: every rank writes its part, anybody reads the whole.

FOLDER/tensors    a checkpoint: grad.NAME, weight.NAME (after the update), buffer.NAME, load.LAYER, and the numbers
FOLDER/choices    one file a rank: experts chosen (where choices were replayed: those that it would have chosen), the
                  scores of all, and how near each was to be chosen, or not to be
FOLDER/replicas   only where two ranks hold the same box and not the same bits: each rank's own
"""

import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetrain import checkpoint, comm, counter
from moetrain.checkpoint.wire import Wire
from moetrain.job import Config, batch_at
from moetrain.logical import Chunk, Logical
from moetrain.mesh import Mesh
from moetrain.moe.placement.types import FREE
from moetrain.moe.types import Balance
from moetrain.train import Seen, StepResult, Trainer
from moetrain.verify.tokens import synthetic
from moetrain.world import World

_STIR = 0.1
"""How far what starts as a constant (norms at 1, biases at 0) is moved: a wrong slice of a constant is a right one."""


def record(cfg: Config, world: World, folder: Path, *, like: Mesh | None) -> Mesh:
    """One step of ``cfg`` on synthetic samples, written to ``folder``. Collective; every rank of ``world`` calls it.

    ``like``: a mesh of an earlier record in the same world, whose groups are used again. Returns this one's.
    """
    trainer = _trainer(cfg, world, like)
    _stir(trainer)
    seen = Seen()
    result = trainer.step(seen=seen)
    tensors = _tensors(trainer, seen, result)
    summed = torch.cat([result.loss[None].double(), result.dropped[None].double(), result.balance_J.double()])
    loss, dropped, *balance = comm.all_reduce_(summed, group=trainer.all_ranks).tolist()
    agreed = _agree(tensors, _summed_over(trainer), list(seen.grads), world)
    meta = {
        "layout": str(trainer.mesh.layout), "world": world.size, "dtype": cfg.train.dtype.value,
        "samples": trainer.consumed, "seq_len": cfg.train.seq_len, "order": agreed["order"],
        "summed_over": agreed["summed_over"],
        "numbers": {"loss": loss, "grad norm": result.norm.item(), "dropped": dropped}
        | {f"balance {name}": x for name, x in zip(_terms(trainer), balance, strict=True)},
    }  # fmt: skip
    if agreed["torn"]:
        _write_replicas(tensors, agreed["torn"], folder / "replicas", rank=world.rank)
    _write_choices(seen, trainer, folder / "choices")
    checkpoint.save(folder / "tensors", tensors, meta, group=world.host_group)
    comm.barrier(world.host_group)
    return trainer.mesh


def _trainer(cfg: Config, world: World, like: Mesh | None) -> Trainer:
    return Trainer(cfg, world, synthetic(cfg), like=like)


def _tensors(trainer: Trainer, seen: Seen, result: StepResult) -> dict[str, Logical]:
    """This rank's boxes of everything that is compared."""
    held = {n.removeprefix("model."): x for n, x in trainer.tensors().items() if n.startswith("model.")}
    found = {f"grad.{n}": trainer.describe(n, g) for n, g in seen.grads.items()}
    for name, logical in held.items():
        found[f"{'weight' if name in seen.grads else 'buffer'}.{name}"] = logical
    for layer, load_E in zip(trainer.cfg.model.moe_layers, result.load_LE, strict=True):
        found[f"load.{layer}"] = Logical(tuple(load_E.shape), load_E.dtype, (Chunk((0,), load_E),))
    return found


def _summed_over(trainer: Trainer) -> dict[str, str]:
    """Name -> in plain words, the ranks that the parameter's gradient is declared to be summed over."""
    return {name: held.summed_over for name, held in trainer.plan.items()}


def _stir(trainer: Trainer) -> None:
    """Move norms, biases, and where a balance term has them the expert bias and the last load off their constants."""
    steered = {
        f"blocks.{x.layer}.moe.bias_E"
        for x in trainer.model.moe_layers()
        if any(type(term).bias is not Balance.bias for term in x.cfg.balance.values())
    }
    for full, logical in trainer.tensors().items():
        name = full.removeprefix("model.")
        if full != name and (name.endswith(("norm.weight", ".bias")) or name in steered):
            for chunk in logical.chunks:
                noise = torch.empty_like(chunk.tensor)
                counter.fill_normal_(
                    noise, shape=logical.shape, offsets=chunk.offsets, std=_STIR * (0.1 if name in steered else 1.0),
                    key=counter.key("stir", trainer.cfg.seed, name),
                )  # fmt: skip
                chunk.tensor.add_(noise)
        elif name.endswith("lagged_E"):
            for chunk in logical.chunks:
                chunk.tensor.copy_(torch.arange(chunk.tensor.numel()) * 7 % 5)
    if (mover := trainer.mover) is not None:  # owners by one load, replicas by another, as if they travelled for free
        for x in (mover.settled_LE, mover.loads_WLE):
            x.copy_(((torch.arange(x.numel()) * 5 + x.dim()) % 13).view_as(x) ** 3)
        mover.costs = FREE
        mover.restore(trainer.steps, trainer.optimizer)


def _terms(trainer: Trainer) -> list[str]:
    return list(trainer.cfg.model.moe.terms) if trainer.cfg.model.moe_layers else []


def _agree(tensors: dict[str, Logical], summed_over: dict[str, str], order: list[str], world: World) -> dict[str, Any]:
    """What all ranks know together: the order of parameters, their groups, and boxes whose holders differ."""
    sums = [
        (name, chunk.offsets, tuple(chunk.tensor.shape), zlib.crc32(_bytes(chunk.tensor)))
        for name, logical in tensors.items()
        for chunk in logical.chunks
        if chunk.tensor.numel()
    ]

    def lead(ranks: list[dict[str, Any]]) -> dict[str, Any]:
        found: dict[tuple, set[int]] = {}
        for rank in ranks:
            for name, offsets, sizes, crc32 in rank["sums"]:
                found.setdefault((name, tuple(offsets), tuple(sizes)), set()).add(crc32)
        return {
            "order": sorted(dict.fromkeys(name for rank in ranks for name in rank["order"]), key=_place),
            "summed_over": {k: v for rank in reversed(ranks) for k, v in rank["summed_over"].items()},
            "torn": [list(box) for box, crcs in found.items() if len(crcs) > 1],
        }

    mine = {"sums": sums, "order": order, "summed_over": summed_over}
    return Wire(world.host_group).together(lambda: mine, lead)


def _place(name: str) -> tuple[int, int]:
    """Where a parameter comes in the model; within a block, as torch lists them."""
    first, _, rest = name.partition(".")
    return ("embedding", "blocks", "norm", "head").index(first), int(rest.split(".")[0]) if first == "blocks" else 0


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_replicas(tensors: dict[str, Logical], torn: list[list], folder: Path, *, rank: int) -> None:
    mine = {}
    for name, offsets, sizes in torn:
        for chunk in tensors[name].chunks if name in tensors else ():
            if list(chunk.offsets) == list(offsets) and list(chunk.tensor.shape) == list(sizes):
                mine[f"{name}[{','.join(map(str, offsets))}]"] = chunk.tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    if mine:
        save_file(mine, folder / f"rank-{rank:05d}.safetensors")


def _write_choices(seen: Seen, trainer: Trainer, folder: Path) -> None:
    assert seen.positions_S is not None
    t, mesh = trainer.cfg.train, trainer.mesh
    share = batch_at(t, 0) // mesh.layout.dp
    first = mesh.index("dense", "dp") * share
    part = {"samples": torch.arange(first, first + share), "positions": seen.positions_S.cpu()}
    for layer in seen.ids[0]:
        part[f"ids.{layer}"] = torch.cat([ids[layer] for ids in seen.ids]).to("cpu", torch.int32).contiguous()
        part[f"scores.{layer}"] = torch.cat([scores[layer] for scores in seen.scores]).cpu().contiguous()
        part[f"margins.{layer}"] = torch.cat([margins[layer] for margins in seen.margins]).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(part, folder / f"rank-{mesh.rank:05d}.safetensors")


class Outcome:
    """What ``record`` left in ``folder``, put together from all ranks, a few tensors at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = checkpoint.read_meta(folder / "tensors")
        self.index = checkpoint.read_index(folder / "tensors")

    @property
    def numbers(self) -> dict[str, float]:
        return self.meta["numbers"]

    @property
    def parameters(self) -> list[str]:
        """Names in the order of the model."""
        return self.meta["order"]

    @property
    def layers(self) -> list[int]:
        """MoE layers."""
        return sorted(int(n.removeprefix("load.")) for n in self.index if n.startswith("load."))

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Name -> the whole tensor."""
        wanted = {n: torch.empty(self.index[n][0], dtype=self.index[n][1]) for n in names}
        boxes = {n: Logical(tuple(x.shape), x.dtype, (Chunk((0,) * x.dim(), x),)) for n, x in wanted.items()}
        checkpoint.load(self.folder / "tensors", boxes, group=None)
        return wanted

    def choices(self, layer: int) -> tuple[Tensor, Tensor]:
        """(samples, S, K) expert ids and (samples, S, E) scores of all ranks, without padding of the sequence."""
        ids_BSK, scores_BSE, _ = self._of_tokens(layer)
        return ids_BSK, scores_BSE

    def margins(self, layer: int) -> Tensor:
        """(samples, S, E) how near each choice was to another (``Router.margins``), likewise."""
        return self._of_tokens(layer)[2]

    def _of_tokens(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        ids_BSK = scores_BSE = margins_BSE = torch.empty(0)
        B, S = self.meta["samples"], self.meta["seq_len"]
        for path in sorted((self.folder / "choices").iterdir()):
            with safe_open(path, "pt") as part:
                if f"ids.{layer}" not in part.keys():  # noqa: SIM118 (safe_open is no mapping)
                    continue
                ids, scores, margins = (part.get_tensor(f"{what}.{layer}") for what in ("ids", "scores", "margins"))
                if ids_BSK.numel() == 0:
                    ids_BSK = torch.full((B, S, ids.shape[-1]), _NOBODY, dtype=torch.int64)
                    scores_BSE, margins_BSE = (torch.zeros(B, S, x.shape[-1], dtype=x.dtype) for x in (scores, margins))
                real = part.get_tensor("positions") < S
                at = part.get_tensor("samples")[:, None], part.get_tensor("positions")[real]
                ids_BSK[at], scores_BSE[at] = ids[:, real].long(), scores[:, real]
                margins_BSE[at] = margins[:, real]
        if ids_BSK.numel() == 0 or (ids_BSK == _NOBODY).any():
            raise ValueError(
                f"layer {layer}: no rank recorded the choices of some tokens (layout {self.meta['layout']})"
            )
        return ids_BSK, scores_BSE, margins_BSE

    @cached_property
    def replicas(self) -> dict[str, list[tuple[int, tuple[int, ...], Tensor]]]:
        """Name -> (rank, offsets, what that rank holds there), for boxes whose holders do not agree to the bit."""
        found: dict[str, list[tuple[int, tuple[int, ...], Tensor]]] = {}
        folder = self.folder / "replicas"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            rank = int(path.stem.removeprefix("rank-"))
            with safe_open(path, "pt") as part:
                for key in part.keys():  # noqa: SIM118
                    name, _, offsets = key.removesuffix("]").partition("[")
                    at = tuple(int(x) for x in offsets.split(",") if x)
                    found.setdefault(name, []).append((rank, at, part.get_tensor(key)))
        return found


_NOBODY = -2
