"""Held-out loss: nats a token and bits a byte, the same samples under every layout."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain import comm
from moetrain.data.bigram import Bigram
from moetrain.data.corpus import Corpus
from moetrain.data.loader import IGNORED, Batch, Validation
from moetrain.mesh import Mesh
from moetrain.model.transformer import Transformer
from moetrain.moe.types import Context
from moetrain.parallel.context import Part
from moetrain.world import to_device


@dataclass(frozen=True)
class Score:
    nats_per_token: float
    bits_per_byte: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


def summed_loss(model: Transformer, batch: Batch, part: Part, *, rows: Tensor | None = None, **known: Any) -> Tensor:
    """() summed loss of this rank's part of a micro-batch's rows; tp ranks all return that of the same targets.

    ``rows`` (B,) bool leaves rows out; ``known`` are the other fields of the micro-batch's Context.
    """
    device = part.position_S.device
    ctx = Context(
        sample_B=batch.sample_B, position_S=part.position_S, mask_BS=part.mask(rows, batch=len(batch.sample_B)),
        pieces=part.pieces, length=part.length, documents_BP=part.documents(batch.documents_BS), **known,
    )  # fmt: skip
    tokens_BS, targets_BS = part.take(batch.tokens_BS, fill=0), part.take(batch.targets_BS, fill=IGNORED)
    return model(to_device(tokens_BS, device), ctx, to_device(targets_BS, device))


@torch.no_grad()
def evaluate(model: Transformer, held_out: Validation, mesh: Mesh, part: Part, *, micro_batch: int, step: int) -> Score:
    """Loss over a held-out set. Collective: every rank runs the same number of forwards, padded where it has less."""
    dp, index = mesh.layout.dp, mesh.index("dense", "dp")
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for first in range(0, held_out.num_samples, dp * micro_batch):
        batch = held_out.batch(first + index * micro_batch, micro_batch)
        rows = None if batch.mask_BS is None or bool(batch.mask_BS.all()) else batch.mask_BS[:, 0]
        total += summed_loss(
            model, batch, part, rows=rows, step=step, micro_batch=0, routed_tokens=1.0, training=False
        )  # fmt: skip
    total *= mesh.index("dense", "tp") == 0  # tp ranks know the loss of the same targets
    comm.all_reduce_(total, group=mesh.group("dense", "dp", "cp", "tp"))
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
