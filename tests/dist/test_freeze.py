"""Frozen parameters: they and their state keep every bit, the others move as if alone, under every layout."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import whole
from drawn import drawn
from test_train import STEPS, close, config, curve, trainer

from moetrain.config import UserError, load, replace
from moetrain.job import Config, check
from moetrain.layouts import Layout
from moetrain.optim import grad_norm
from moetrain.parallel import state
from moetrain.train import Seen

GATES = ["*.moe.gate.*", "blocks.1.*", "embedding.*"]
OPTIM = {"lr": 1e-2, "warmup": 2, "clip": 0.5, "freeze": GATES}
LAYOUTS = {
    "folded": Layout(dp=1, cp=2, tp=2, ep=2, etp=2),
    "replicas": Layout(dp=4, ep=2, replicate=2),
    "stages": Layout(pp=2, dp=2, ep=2),  # whose second has nothing that is frozen but the gate of block 2
}


def start(cfg: Config) -> dict[str, torch.Tensor]:
    run = trainer(0, 1, replace(cfg, layout=Layout(dp=1)))
    return {n: state.local(p).clone() for n, p in run.model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_others_move_as_if_the_frozen_were_put_back_after_each_step(small_corpus, tmp_path, kind) -> None:
    cfg = config(small_corpus, tmp_path / "run", optim=OPTIM | {"kind": kind, "clip": 0.0})
    run, free = trainer(0, 1, cfg), trainer(0, 1, replace(cfg, optim=replace(cfg.optim, freeze=[])))
    first = start(cfg)
    frozen = {n for n in first if cfg.optim.frozen(n)}
    assert {n.split(".")[0] for n in frozen} == {"embedding", "blocks"}
    for _ in range(STEPS):
        seen = Seen()
        norm = run.step(seen=seen).norm
        moving = [g for n, g in seen.grads.items() if n not in frozen]
        torch.testing.assert_close(norm, grad_norm(moving, group=None, like=norm))
        free.step()
        for n, p in free.model.named_parameters():
            if n in frozen:
                state.local(p).copy_(first[n])
    free_weights = dict(free.model.named_parameters())
    for n, p in run.model.named_parameters():
        assert torch.equal(p, first[n] if n in frozen else free_weights[n]), n
        assert torch.equal(p, first[n]) == (n in frozen), n
    for states in run.optimizer.state().values():
        assert all(bool(x.any()) != (n in frozen) for n, x in states.items())


@pytest.mark.parametrize(("kind", "name"), drawn(itertools.product(["adamw", "muon"], LAYOUTS), 3, of="frozen"))
def test_every_layout_freezes_alike(ranks, small_corpus, tmp_path, kind, name) -> None:
    cfg = config(small_corpus, tmp_path / "one", optim=OPTIM | {"kind": kind})
    want, first = curve(0, 1, cfg), start(cfg)
    layout = replace(cfg, layout=LAYOUTS[name], run=replace(cfg.run, name="layout"))
    close(ranks(4).run(curve, layout)[0], want)
    saved, found = (whole.tensors(whole.newest(c.run.folder)) for c in (cfg, layout))
    assert saved.keys() == found.keys()
    for n, x in found.items():
        torch.testing.assert_close(x, saved[n], rtol=1e-9, atol=1e-9)
        kept, _, parameter = n.removeprefix("optim.").partition(".")
        if parameter in first and cfg.optim.frozen(parameter):
            frozen = first[parameter][: len(x)] if kept == "model" else torch.zeros_like(x)
            assert torch.equal(x, frozen), n


def test_only_the_bias_learns_and_a_checkpoint_goes_on_frozen(ranks, small_corpus, tmp_path) -> None:
    """Rebalance a trained router: ``freeze=["*"]`` over what an unfrozen run has saved, and unfrozen again."""
    cfg = config(small_corpus, tmp_path / "trained")
    curve(0, 1, cfg, 2)
    newest = whole.newest(cfg.run.folder)
    before = whole.tensors(newest)
    frozen = replace(cfg, optim=replace(cfg.optim, freeze=["*"]), run=replace(cfg.run, name="bias"))
    found = ranks(4).run(curve, replace(frozen, layout=LAYOUTS["folded"]), 1, newest)
    assert found[0][0][5] == 0, "the norm of nothing"
    after = whole.tensors(whole.newest(frozen.run.folder))
    for n, x in after.items():
        assert torch.equal(x, before[n]) != n.endswith("bias_E"), n
    shutil.copytree(frozen.run.folder, Path(cfg.run.dir) / "again")
    again = replace(cfg, run=replace(cfg.run, name="again"))
    assert curve(0, 1, again, 1, whole.newest(again.run.folder))[0][5] > 0


REFUSED = {
    "*.moe.gates.*": r"optim\.freeze has '\*\.moe\.gates\.\*', which is the name of no parameter; did you mean "
    r"'\*\.moe\.gate\.weight'\?",
    "blocks.9.*": r"'blocks\.9\.\*', which is the name of no parameter.* \(\* is any text; the first of \d+ is 'embed",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_matches_nothing_is_refused_before_any_rank_starts(pattern) -> None:
    cfg = load({"optim": {"freeze": ["*.moe.gate.*", pattern]}, "layout": {"dp": 1}}, Config)
    with pytest.raises(UserError, match=REFUSED[pattern]) as caught:
        check(cfg, world=1)
    assert "\n" not in str(caught.value)
