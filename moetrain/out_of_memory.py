"""Where memory ran out: which keys of this config lower what a rank holds, in one line; what a GPU held."""

import re
from pathlib import Path

import torch

from moetrain.job import Config, DType
from moetrain.parallel.data import Accumulate
from moetrain.parallel.recompute import Mode
from moetrain.world import World

_WORDS = re.compile(r"can't allocate memory|not enough memory|out of memory|cannot allocate memory", re.IGNORECASE)


def ran_out(error: BaseException) -> bool:
    """On a GPU or on the host; Python's own, or torch's, which on a CPU is a RuntimeError like any other."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None)


def hint(cfg: Config, world: World) -> str:
    """What this config leaves to lower, what changes no number first."""
    kept = _snapshot(cfg, world)
    t, held = cfg.train, []
    if cfg.recompute.mode is Mode.none:
        held.append("recompute.mode=selective (or full)")
    elif cfg.recompute.mode is Mode.selective:
        held.append("recompute.mode=full")
    if not cfg.recompute.loss_rows:
        held.append("recompute.loss_rows=1024")
    if cfg.sharding.accumulate is Accumulate.local and t.batch > t.micro_batch:
        held.append("sharding.accumulate=sharded")
    low = [f"sharding.{part}=3" for part in ("dense", "experts") if getattr(cfg.sharding, part) < 3]
    held.append(" ".join(low) if low else "more ranks, or more of them in layout.ep, .tp or .cp")
    other = []
    if t.micro_batch > 1:
        other.append(f"train.micro_batch={t.micro_batch // 2}")
    if cfg.optim.state_dtype is None:
        other.append("optim.state_dtype=bfloat16")
    if cfg.optim.weight_dtype is None and t.dtype is DType.bfloat16:
        other.append("optim.weight_dtype=bfloat16")
    changed = f"; what changes the run: {', '.join(other)}" if other else ""
    config = cfg.run.folder / "config.yaml"
    return (
        f"out of memory. What lowers it, the same run: {', '.join(held)}{changed}. `moetrain memory --config {config}` "
        f"says what holds it{f', {kept} what held it here' if kept else ''}"
    )


def _snapshot(cfg: Config, world: World) -> Path | None:
    """With ``trace.memory``, what a GPU held and who allocated it, into the run folder."""
    if not cfg.trace.memory or world.device.type != "cuda":
        return None
    path = cfg.run.folder / f"memory-rank-{world.rank}.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception:  # what went wrong first is what is told
        return None
    return path
