"""Sliding windows layer by layer: the model against a dense mask in float64, what is counted, what shrinks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.changes import Tag, changes
from moetrain.cli.compose import compose
from moetrain.config import dump
from moetrain.kernels import Kernel
from moetrain.model import attention
from moetrain.model.flops import flops_per_token, score_flops
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.moe.layer import MoEConfig
from moetrain.moe.types import Context
from moetrain.verify.shrink import shrink

WINDOWS = [3, 0, 9]  # of five layers: 3, all, 9, 3, all


def model(**changes) -> ModelConfig:
    moe = MoEConfig(num_experts=4, hidden=12, kernel=Kernel.reference)
    shapes = {"vocab_size": 64, "dim": 16, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "moe": moe}
    return ModelConfig(**shapes | {"windows": WINDOWS} | changes)


def run(cfg: ModelConfig, *, documents: bool, rerun: str | None = None) -> list[Tensor]:
    """Logits and every gradient of a step, float64."""
    generator, made = torch.Generator().manual_seed(1), Transformer(cfg, dtype=torch.float64).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    for block in made.blocks.values():
        if rerun:
            setattr(block, rerun, True)
    tokens_BS = torch.randint(64, (2, 20), generator=generator)
    documents_BP = torch.tensor([[0] * 7 + [1] * 13, [0] * 20]) if documents else None
    ctx = Context(
        step=0, micro_batch=0, sample_B=torch.arange(2), position_S=torch.arange(20), routed_tokens=40.0,
        documents_BP=documents_BP,
    )  # fmt: skip
    logits = made(tokens_BS, ctx)
    assert isinstance(logits, Tensor)
    gradients = torch.autograd.grad(logits.square().sum(), list(made.parameters()))
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_each_layer_has_the_window_of_its_number(monkeypatch, documents) -> None:
    mine, layer = run(model(), documents=documents), iter(range(5))

    def dense(q: Tensor, k: Tensor, v: Tensor, _) -> Tensor:
        """Layer after layer: later keys, other documents' and those before a window have no weight."""
        window, at = (3, 20, 9, 3, 20)[next(layer)], torch.arange(20)
        seen = ((at[:, None] >= at) & (at[:, None] - at < window)).expand(2, -1, -1).clone()
        if documents:
            seen[0, 7:, :7] = False
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return (q @ k.transpose(2, 3) / 2).masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v

    monkeypatch.setattr(attention, "attend", dense)
    for got, want in zip(mine, run(model(), documents=documents), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * max(1.0, want.abs().max().item()))
    monkeypatch.undo()
    whole = run(model(windows=[]), documents=documents)
    assert F.mse_loss(mine[0], whole[0]) > 1e-3, "the windows are not seen"


@pytest.mark.parametrize("rerun", ["rerun_all", "rerun_attention", "remake_norms"])
def test_recompute_sees_the_same_keys(rerun) -> None:
    for got, want in zip(run(model(), documents=False, rerun=rerun), run(model(), documents=False), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * max(1.0, want.abs().max().item()))


def test_flops_count_the_keys_that_are_seen() -> None:
    S, cfg = 64, model(windows=[1, 10, 64, 100, 0])
    for layer, window in enumerate((1, 10, 64, 64, 64)):
        pairs = sum(min(position + 1, window) for position in range(S)) - window / 2  # half of the diagonal, as ever
        assert score_flops(cfg, layer, seq_len=S) == pytest.approx(2 * 2 * 16 * pairs / S)
    more = flops_per_token(model(windows=[]), seq_len=S) - flops_per_token(model(windows=[8]), seq_len=S)
    assert more == 12 * 5 * 16 * (S / 2 - (8 - 8 * 8 / (2 * S)))
    assert flops_per_token(cfg, seq_len=1) == flops_per_token(model(windows=[]), seq_len=1)


def test_presets_have_the_windows_that_were_published() -> None:
    """Mixtral's and Qwen's configs have none (sliding_window null, use_sliding_window false)."""
    for name in ("mixtral_8x7b", "mixtral_8x22b", "qwen2_57b_a14b", "qwen3_30b_a3b", "olmoe_1b_7b", "deepseek_moe_16b"):
        assert compose([f"model={name}"]).model.windows == []


def test_a_run_may_go_on_with_other_windows_by_name() -> None:
    old, new = dump(compose([])), compose(["model.windows=[128,0]"])
    assert [(c.key, c.tag) for c in changes(old, new)] == [("model.windows", Tag.trajectory)]
    del old["model"]["windows"]
    assert not list(changes(old, compose([]))), "a checkpoint from before there were windows"


@pytest.mark.parametrize(
    ("windows", "kinds"),
    [([128], 1), ([128, 0], 2), ([4096, 4096, 4096, 0], 2), ([0, *[1] * 30, 8191], 2), ([8192], 1), ([0], 1), ([], 1)],
    ids=str,
)
def test_a_shrunk_model_has_windows_too(windows, kinds) -> None:
    cfg = compose([
        "model=mixtral_8x7b", f"model.windows={windows}".replace(" ", ""), "layout.dp=64", "layout.ep=8",
        "train.batch=64", "train.micro_batch=1", "train.seq_len=8192",
    ])  # fmt: skip
    shrunk = shrink(cfg, world=64)
    small = shrunk.cfg.model
    found = [small.window(i) for i in range(small.num_layers)]
    assert not any("windows" in line for line in shrunk.lost)
    assert len(set(found)) == kinds
    some = any(0 < window < 8192 for window in windows)
    assert any(4 <= window < shrunk.cfg.train.seq_len for window in found) == some
    assert (0 in found) == (0 in windows or not some)
