"""How near a choice was: what a little noise changes was near, by the router's own word; and replay of every router."""

import pytest
import torch
from test_rounding import ROUNDINGS
from test_routers import FIRST, LAYER, MASK, SEED, TRIALS, B, E, S, context, logits, made
from torch import Tensor

from moetrain.config import load
from moetrain.moe.rounding import TokenRounding
from moetrain.moe.routers.replay import Replay, save_choices
from moetrain.moe.types import Router, taken

CASES = [(name, keys, {}) for name, keys in TRIALS if name != "replay"]
CASES += [("topk", {}, words) for words in ROUNDINGS if words["multiple"] == 3]
CASES += [(name, {}, ROUNDINGS[0]) for name in ("sinkhorn", "top_p", "random")]
NOISE, NEAR = 1e-4, 1e-3
SAMPLES, LENGTH = 12, 16


def router_of(name: str, keys: dict, words: dict, folder) -> tuple[Router, Tensor]:
    router, bias_E = made(name, keys, folder)
    return load(words, TokenRounding).around(router), bias_E


def batch() -> Tensor:
    """(T, E), in which each of every eight tokens is almost the next, and two of its experts are almost alike."""
    draw = torch.Generator().manual_seed(SEED)
    x_TE = 1.5 * torch.randn(SAMPLES * LENGTH, E, generator=draw, dtype=torch.float64)
    near = lambda like: like + 5e-5 * torch.rand(like.shape, generator=draw, dtype=torch.float64)  # noqa: E731
    x_TE[::8, 1], x_TE[::8, 3] = near(x_TE[::8, 0]), near(x_TE[::8, 2])
    x_TE[1::8] = near(x_TE[::8])
    return x_TE


@pytest.mark.parametrize(("name", "keys", "words"), CASES, ids=str)
def test_what_a_little_noise_changes_was_near(tmp_path, name, keys, words) -> None:
    router, bias_E = router_of(name, keys, words, tmp_path)
    ctx = context(sample_B=torch.arange(SAMPLES) + FIRST, position_S=torch.arange(LENGTH))
    x_TE, known = batch(), {"ctx": ctx, "layer": LAYER}
    margins_TE = router.margins(x_TE, bias_E, **known)
    assert margins_TE.shape == x_TE.shape
    assert (margins_TE >= 0).all()
    want_TE = taken(router(x_TE, bias_E, **known).ids_TK, num_experts=E)
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        noise_TE = NOISE * (2 * torch.rand(x_TE.shape, generator=draw, dtype=torch.float64) - 1)
        differs_TE = taken(router(x_TE + noise_TE, bias_E, **known).ids_TK, num_experts=E) != want_TE
        assert (margins_TE[differs_TE] < NEAR).all(), margins_TE[differs_TE].max()
    assert (margins_TE > NEAR).double().mean() > (0.05 if words else 0.5), "a word that says something"


@pytest.mark.parametrize(("name", "keys", "words"), CASES, ids=str)
def test_any_router_is_replayed_and_tells_its_own_choices(tmp_path, name, keys, words) -> None:
    router, bias_E = made(name, keys, tmp_path)
    rounding, x_TE = load(words, TokenRounding), logits().flatten(0, 1)
    whole, ctx = rounding.around(router), context(mask_BS=MASK if words else None)
    want = whole(x_TE, bias_E, ctx=ctx, layer=LAYER)
    other = want.ids_TK.view(B, S, -1).roll(1, 0)
    other = whole._rounded(want.scores_TE, other.flatten(0, 1), ctx, None) if words else other  # pyright: ignore
    other = torch.where(other, torch.arange(E), -1) if words else other.flatten(0, 1)
    for ids_TK in (want.ids_TK, other):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        save_choices(path, {4: {LAYER: ids_TK.view(B, S, -1)}}, first_sample={4: FIRST})
        replay = rounding.around(Replay(top_k=router.top_k, renormalize=False, path=str(path), inner=router))
        got = replay(x_TE, bias_E, ctx=ctx, layer=LAYER)
        assert got.own_TK is not None
        assert torch.equal(got.own_TK, want.ids_TK)
        assert torch.equal(got.ids_TK, ids_TK)
        again = whole.weigh(x_TE, want.scores_TE, ids_TK)
        assert torch.equal(got.weights_TK, again.weights_TK)
        assert torch.equal(got.scores_TE, want.scores_TE)
        margins = [r.margins(x_TE, bias_E, ctx=ctx, layer=LAYER) for r in (replay, whole)]
        assert words or torch.equal(*margins)
