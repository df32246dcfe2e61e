"""Choices of expert, compared before any number is: where two runs send a token elsewhere, nothing after it compares.

Two runs that add in another order may choose differently where two scores are almost equal. Such a near-tie is no
difference between the runs: it is counted, and the comparison runs again with the reference's choices replayed. In
that second run every choice that the other run *would* have made is compared, each after the same choices as the
reference's in all layers before. In the first run, only layers up to the first that differs can be judged: what a
token meets later is no longer the same.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.config import UserError, replace
from moetrain.job import Config
from moetrain.moe.routers.replay import Replay, save_choices
from moetrain.moe.routers.topk import TopK, top_k
from moetrain.verify.outcome import Outcome

NEAR_TIE = 1e-5
"""Scores closer than this may fall either way."""


@dataclass(frozen=True)
class Choices:
    """``near_ties``: tokens whose set of experts differs at a gap under ``NEAR_TIE``; ``wrong``: the first above."""

    tokens: int  # compared, over all layers
    near_ties: int = 0
    widest: float = 0.0  # gap of those
    wrong: str | None = None  # layer, sample, position, gap
    gap: float = 0.0  # of it


def compare(other: Outcome, reference: Outcome, *, replayed: bool) -> Choices:
    """``replayed``: ``other`` ran on the reference's choices; judge those that its own scores would have made."""
    tokens, near_ties, widest = 0, 0, 0.0
    if missing := sorted(set(reference.layers) ^ set(other.layers)):
        return Choices(0, wrong=f"layer {missing[0]} is an MoE layer in only one of the two", gap=torch.inf)
    for layer in reference.layers:
        want_BSK, scores_BSE = reference.choices(layer)
        got_BSK, own_BSE = other.choices(layer)
        if got_BSK.shape != want_BSK.shape:
            shapes = f"{list(got_BSK.shape)} against {list(want_BSK.shape)}"
            return Choices(tokens, near_ties, widest, f"layer {layer}: choices of {shapes}", torch.inf)
        if replayed:
            got_BSK = top_k(own_BSE.flatten(0, 1), got_BSK.shape[-1]).view_as(got_BSK)
        tokens += want_BSK.shape[0] * want_BSK.shape[1]
        at, gap_N = _gaps(want_BSK, got_BSK, scores_BSE)
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


def _gaps(want_BSK: Tensor, got_BSK: Tensor, scores_BSE: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2) sample and position of tokens whose sets differ, and how far apart those experts are in ``scores``.

    The gap of a token is between the best that the other run left out and the worst that it took instead.
    """
    differs_BS = (want_BSK.sort(-1).values != got_BSK.sort(-1).values).any(-1)
    at = differs_BS.nonzero()
    want_NK, got_NK, scores_NE = want_BSK[differs_BS], got_BSK[differs_BS], scores_BSE[differs_BS].double()
    lost_NK = ~(want_NK[:, :, None] == got_NK[:, None, :]).any(-1)
    new_NK = ~(got_NK[:, :, None] == want_NK[:, None, :]).any(-1)
    best_N = _pick(scores_NE, want_NK).masked_fill(~lost_NK, -torch.inf).amax(-1)
    worst_N = _pick(scores_NE, got_NK).masked_fill(~new_NK, torch.inf).amin(-1)
    return at, (best_N - worst_N).abs()


def _pick(scores_NE: Tensor, ids_NK: Tensor) -> Tensor:
    """Scores of the chosen; -inf where fewer than K were chosen, which is never a near-tie."""
    return scores_NE.gather(-1, ids_NK.clamp_min(0)).masked_fill(ids_NK < 0, -torch.inf)


def keep(outcome: Outcome, path: Path) -> None:
    """Write the choices of ``outcome``'s step to ``path`` for ``replay``."""
    table = {layer: outcome.choices(layer)[0] for layer in outcome.layers}
    save_choices(path, {0: table}, first_sample={0: 0})


def can_replay(cfg: Config) -> bool:
    """Whether the router's weights are a function of scores and choices that ``Replay`` knows."""
    return type(cfg.model.moe.router) is TopK


def replay(cfg: Config, path: Path) -> Config:
    """``cfg`` with the choices at ``path`` in place of its router's; weights stay its own."""
    router = cfg.model.moe.router
    if type(router) is not TopK:
        raise UserError(f"choices of the router {getattr(router, 'kind', '?')!r} cannot be replayed: only topk's can")
    swapped = Replay(
        top_k=router.top_k, score=router.score, renormalize=router.renormalize, scale=router.scale, path=str(path)
    )
    return replace(cfg, model=replace(cfg.model, moe=replace(cfg.model.moe, router=swapped)))
