"""The norm of the parameters and the number of zero gradients are the same under every layout."""

import pytest
import torch
import torch.distributed as dist

from moetrain import comm
from moetrain.cli.compose import compose
from moetrain.job import open_data
from moetrain.train import Trainer
from moetrain.world import World

# widths that tp=2 and sharding have to pad, and rows of the vocabulary that no token has
MODEL = [
    "model.vocab_size=515", "model.dim=18", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2",
    "model.head_dim=4", "model.moe.num_experts=4", "model.moe.hidden=7", "model.moe.shared_hidden=5", "train.batch=4",
    "train.micro_batch=1", "train.seq_len=17", "train.dtype=float64", "optim.warmup=1", "train.steps=3", "data=folder",
]  # fmt: skip


def norms(rank: int, world: int, words: list[str]) -> list[tuple[float, int]]:
    cfg = compose(words)
    alone = World(rank, world, rank, world, torch.device("cpu"), "gloo" if world > 1 else "", dist.group.WORLD)
    trainer = Trainer(cfg, alone, open_data(cfg, log=lambda line: None))
    found = []
    for _ in range(2):
        part = trainer.step(norms=True).norms
        assert part is not None
        squares, zeros = comm.all_reduce_(part, group=trainer.all_ranks).tolist()
        found.append((squares**0.5, int(zeros)))
    assert trainer.step().norms is None
    return found


@pytest.mark.parametrize(
    "layout",
    [
        "layout.ep=2", "layout.tp=2", "layout.ep=2 layout.tp=2 layout.dp=1", "layout.etp=2", "layout.cp=2", "layout.pp=2",
        "layout.dp=2 layout.replicate=2", "placement=fssdp layout.ep=2", "layout.pp=2 model.tie_embeddings=true",
        "layout.dp=2 optim.freeze=[\"*.moe.gate.*\"]",
    ],
)  # fmt: skip
def test_two_ranks_say_what_one_says(ranks, small_corpus, layout: str) -> None:
    common = [*MODEL, f"data.corpora.text.path={small_corpus}"]
    split = [word for word in layout.split() if not word.startswith(("layout.", "placement"))]
    two = ranks(2).run(norms, common + layout.split())
    assert two[0] == two[1]
    one = ranks(1).run(norms, common + split)[0]
    for (norm, zeros), (want, want_zeros) in zip(two[0], one, strict=True):
        assert norm == pytest.approx(want, rel=1e-9)
        assert zeros == want_zeros
    if "tie_embeddings" not in layout:
        assert one[0][1] >= 3 * 18, "the rows of the embedding that no token has"
    assert one[0][0] != one[1][0], "an update changes the parameters"
