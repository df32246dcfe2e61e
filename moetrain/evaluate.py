"""Held-out loss: nats a token and bits a byte, the same samples under every layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain import comm
from moetrain.data.bigram import Bigram
from moetrain.data.corpus import Corpus
from moetrain.data.loader import IGNORED, Batch, Validation
from moetrain.mesh import Mesh
from moetrain.model.transformer import Stage, Transformer
from moetrain.moe.types import Carry, Context
from moetrain.parallel.context import Part
from moetrain.world import to_device


@dataclass(frozen=True)
class Score:
    nats_per_token: float
    bits_per_byte: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


def summed_loss(
    model: Transformer,
    batch: Batch,
    part: Part,
    *,
    rows: Tensor | None = None,
    stage: Stage | None = None,
    x: Tensor | None = None,
    carry: Carry | None = None,
    **known: Any,
) -> Tensor | tuple[Tensor, Carry]:
    """() summed loss of this rank's part of a micro-batch's rows; tp ranks all return that of the same targets.

    ``rows`` (B,) bool leaves rows out; ``known`` are the other fields of the micro-batch's Context. Of a pipeline's
    ``stage``: from ``x`` and ``carry`` of the one before, and unless it is the last, what the next needs.
    """  # fmt: skip
    device = part.position_S.device
    ctx = Context(
        sample_B=batch.sample_B, position_S=part.position_S, mask_BS=part.mask(rows, batch=len(batch.sample_B)),
        pieces=part.pieces, length=part.length, documents_BP=part.documents(batch.documents_BS), **known,
    )  # fmt: skip
    if x is None:
        x = to_device(part.take(batch.tokens_BS, fill=0), device)
    targets_BS = part.take(batch.targets_BS, fill=IGNORED) if stage is None or stage.last else None
    targets_BS = None if targets_BS is None else to_device(targets_BS, device)
    return model(x, ctx, targets_BS, carry=carry, stage=stage)


Rows = tuple[Batch, Tensor | None]
"""A micro-batch, and which of its rows count: None = all."""


@torch.no_grad()
def evaluate(
    held_out: Validation, mesh: Mesh, losses: Callable[[list[Rows]], Tensor], *, micro_batch: int, together: int
) -> Score:
    """Loss over a held-out set. Collective: every rank runs the same number of forwards, padded where it has less.

    ``losses``: the summed loss of ``together`` micro-batches on this rank, zero where it does not know it.
    """
    dp, index = mesh.layout.dp, mesh.index("dense", "dp")
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    starts = range(0, held_out.num_samples, dp * micro_batch)
    for some in (starts[i : i + together] for i in range(0, len(starts), together)):
        batches = [held_out.batch(first + index * micro_batch, micro_batch) for first in some]
        masks = [None if b.mask_BS is None or bool(b.mask_BS.all()) else b.mask_BS[:, 0] for b in batches]
        total += losses(list(zip(batches, masks, strict=True)))
    total *= mesh.index("dense", "tp") == 0  # tp ranks know the loss of the same targets
    comm.all_reduce_(total, group=mesh.group("dense", "pp", "dp", "cp", "tp"))
    return _score(total.item(), held_out)


def bigram_score(corpus: Corpus, held_out: Validation) -> Score:
    """An interpolated Kneser-Ney bigram model of all the corpus's training tokens on the same held-out targets."""
    model = Bigram(corpus.train, vocab_size=corpus.vocab_size)
    batch = held_out.batch(0, held_out.num_samples)
    counted = batch.targets_BS >= 0
    return _score(model.loss(batch.tokens_BS[counted].numpy(), batch.targets_BS[counted].numpy()), held_out)


def _score(nats: float, held_out: Validation) -> Score:
    tokens = held_out.num_targets()
    return Score(nats / tokens, nats / math.log(2) / max(1, held_out.num_bytes()), tokens)
