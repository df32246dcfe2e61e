"""Choices of expert, compared before any number is: where two runs send a token elsewhere, nothing after it compares.

Two runs that add in another order may choose differently where two scores are almost equal. Such a near-tie is no
difference between the runs: it is counted, and the comparison runs again with the reference's choices replayed. In
that second run every choice that the other run's router *would* have made is compared, each after the same choices as
the reference's in all layers before. In the first run, only layers up to the first that differs can be judged: what a
token meets later is no longer the same. How near a choice was is the router's word (``Router.margins``).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.config import replace
from moetrain.job import Config
from moetrain.moe.routers.replay import Replay, save_choices
from moetrain.moe.types import taken
from moetrain.verify.outcome import Outcome

NEAR_TIE = 1e-5
"""A choice with less of a margin than this may fall either way."""


@dataclass(frozen=True)
class Choices:
    """``near_ties``: tokens whose set of experts differs at a gap under ``NEAR_TIE``; ``wrong``: the first above."""

    tokens: int  # compared, over all layers
    near_ties: int = 0
    widest: float = 0.0  # gap of those
    wrong: str | None = None  # layer, sample, position, gap
    gap: float = 0.0  # of it


def compare(other: Outcome, reference: Outcome, *, replayed: bool) -> Choices:
    """``replayed``: ``other`` ran on the reference's choices, and left those that it would have made."""
    tokens, near_ties, widest = 0, 0, 0.0
    if missing := sorted(set(reference.layers) ^ set(other.layers)):
        return Choices(0, wrong=f"layer {missing[0]} is an MoE layer in only one of the two", gap=torch.inf)
    for layer in reference.layers:
        (want_BSK, _), (got_BSK, _) = reference.choices(layer), other.choices(layer)
        if got_BSK.shape[:2] != want_BSK.shape[:2]:
            shapes = f"{list(got_BSK.shape)} against {list(want_BSK.shape)}"
            return Choices(tokens, near_ties, widest, f"layer {layer}: choices of {shapes}", torch.inf)
        tokens += want_BSK.shape[0] * want_BSK.shape[1]
        at, gap_N = _gaps(want_BSK, got_BSK, reference.margins(layer))
        if not len(gap_N):
            continue
        over = (~(gap_N < NEAR_TIE)).nonzero().flatten()
        if len(over):
            n = int(over[0])
            where = f"layer {layer}, sample {int(at[n, 0])}, position {int(at[n, 1])}"
            return Choices(tokens, near_ties, widest, where, float(gap_N[n]))
        near_ties, widest = near_ties + len(gap_N), max(widest, float(gap_N.max()))
        if not replayed:
            break
    return Choices(tokens, near_ties, widest)


def _gaps(want_BSK: Tensor, got_BSK: Tensor, margins_BSE: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2) sample and position of tokens whose sets differ, and the widest margin of an expert in only one."""
    want_BSE, got_BSE = (taken(ids_BSK, num_experts=margins_BSE.shape[-1]) for ids_BSK in (want_BSK, got_BSK))
    differs_BSE = want_BSE != got_BSE
    gap_BS = margins_BSE.double().masked_fill(~differs_BSE, -torch.inf).amax(-1)
    differs_BS = differs_BSE.any(-1)
    return differs_BS.nonzero(), gap_BS[differs_BS]


def keep(outcome: Outcome, path: Path) -> None:
    """Write the choices of ``outcome``'s step to ``path`` for ``replay``."""
    table = {layer: outcome.choices(layer)[0] for layer in outcome.layers}
    save_choices(path, {0: table}, first_sample={0: 0})


def replay(cfg: Config, path: Path) -> Config:
    """``cfg`` with the choices at ``path`` in place of its router's; weights stay its own, and so does what it notes of
    the choices that it would have made."""
    moe = cfg.model.moe
    swapped = Replay(top_k=moe.router.top_k, renormalize=False, path=str(path), inner=moe.router)
    return replace(cfg, model=replace(cfg.model, moe=replace(moe, router=swapped)))
