"""What is about to run, in a few lines: ranks and groups, the model, backends and why, memory, corpora, the folder."""

import torch

from moetrain import __version__, kernels
from moetrain.layouts import Layout, groups
from moetrain.model.flops import size
from moetrain.model.transformer import ModelConfig
from moetrain.parallel import state
from moetrain.train import Trainer
from moetrain.world import Communication, World, on_cpu

_MIB = 2**20


def describe(trainer: Trainer) -> list[str]:
    cfg, world = trainer.cfg, trainer.world
    moe = cfg.model.moe
    sizes = {"dim": cfg.model.dim, "hidden": -(-moe.hidden // trainer.mesh.layout.etp), "fp8_tile": moe.fp8_tile}
    _, why = kernels.choose(moe.kernel, device=world.device, dtype=trainer.dtype, **sizes)
    if moe.router.fused:
        why += f", {kernels.routing.check(device=world.device, dtype=trainer.dtype)}"
    over = f" over {world.backend} ({_why(world, cfg.train.communication)})" if world.backend else ""
    lines = [
        f"moetrain {__version__}, torch {torch.__version__}, {world.size} rank(s) on {world.device.type}{over}, "
        f"layout {trainer.mesh.layout}",
        f"{size(cfg.model)}; {_layers(cfg.model)}; kernel {why}{'; dense parts compiled' * cfg.train.compile}",
        *_across(trainer.mesh.layout, world),
    ]
    if trainer.pipeline:
        sizes = ", ".join(str(len(stage.layers)) for stage in trainer.pipeline.stages)
        lines.append(f"pipeline {cfg.pipeline.schedule}: {len(trainer.pipeline.stages)} stages of {sizes} layers")
    lines += [_optimizer(trainer), _memory(trainer)]
    lines += [found.words for found in moe.depends_on_layout if cfg.model.moe_layers]
    for name, corpus in trainer.data.corpora.items():
        lines.append(
            f"corpus {name}: {len(corpus.train):,} training tokens, {len(corpus.valid):,} held out, "
            f"fingerprint {corpus.fingerprint[:16]}"
        )
    return [*lines, f"run folder {cfg.run.folder}"]


def _why(world: World, asked: Communication) -> str:
    if asked is not Communication.auto:
        return "asked for"
    if world.backend == "nccl":
        return "each rank has a GPU of its own"
    return "no GPU" if on_cpu(world.device) else "ranks share GPUs"


def _across(layout: Layout, world: World) -> list[str]:
    """Which groups cross nodes, where there are several, each with as many ranks as this one."""
    node = world.local_size
    if node >= world.size:
        return []
    if world.size % node:
        return [f"ranks do not fill nodes of {node} evenly: who crosses them is not known here"]
    found = groups(layout, node)
    cross = [
        f"{g.name} ({g.size}{'' if g.across == g.count else f', {g.across} of {g.count}'})" for g in found if g.across
    ]
    within = [f"{g.name} ({g.size})" for g in found if g.size > 1 and not g.across]
    words = [f"across nodes: {', '.join(cross)}"] if cross else []
    words += [f"within a node: {', '.join(within)}"] if within else []
    return [f"{world.size // node} nodes of {node} ranks; {'; '.join(words) or 'no group'}"]


def _optimizer(trainer: Trainer) -> str:
    kept = next(trainer.model.parameters()).dtype
    rounded = ", rounded stochastically" if trainer.optimizer.adamw.rounds else ""
    return f"{trainer.optimizer.words}; weights in {str(kept).removeprefix('torch.')}{rounded}"


def _memory(trainer: Trainer) -> str:
    """What this rank keeps between steps, counted. The peak of a step takes a dry run of some seconds to foretell, and
    a start does not wait for that."""
    weights = sum(state.local(p).nbytes for p in trainer.model.parameters())
    kept = sum(x.nbytes for storage in trainer.optimizer.state().values() for x in storage.values())
    mib = [f"{n / _MIB:,.1f}" for n in (weights, kept)]
    return (
        f"memory of rank {trainer.world.rank} between steps: {mib[0]} MiB of weights, {mib[1]} MiB of optimizer state; "
        f"`moetrain memory` foretells a step's peak"
    )


def _layers(cfg: ModelConfig) -> str:
    """The MoE layers in words: how many of which numbers."""
    moes = cfg.moe_configs
    if not moes:
        return "no MoE layer"
    experts, top_k = _span([moe.num_experts for moe in moes]), _span([moe.router.top_k for moe in moes])
    early, extra = cfg.moe.per_layer, cfg.moe.zero_computation
    more = f" ({extra} more, of zero computation)" if str(extra) else ""
    first = f" (before step {early.early_steps}: {early.early_top_k} in the first)" if early.early_steps else ""
    return f"{len(moes)} MoE layers of {experts} experts{more}, top-{top_k}{first}"


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
