"""Context parallelism: which positions of a row a rank holds, and how its queries meet all keys.

A row of P positions is cut into 2 cp chunks, of which a context rank has an early one and a late one; attention asks
from those. Between layers, sequence parallelism cuts them once more: each of tp ranks has a consecutive part.
P is the sequence length rounded up to what both need: positions past the sequence are padding, masked everywhere.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moetrain.config import config
from moetrain.mesh import Mesh
from moetrain.model.attention import Attention, zigzag
from moetrain.model.transformer import Transformer


class Method(Enum):
    allgather = "allgather"  # keys and values are gathered, queries stay: any number of heads
    ulysses = "ulysses"  # heads against positions by all-to-all (arXiv 2309.14509): cp divides the heads of a tp rank


@config
class ContextConfig:
    """How attention crosses the ranks of cp. Positions are dealt in zigzag, so that causal work is even."""

    method: Method = Method.allgather


@dataclass(frozen=True)
class Part:
    """This rank's part of every row."""

    seq_len: int  # real positions of a row
    length: int  #  P
    pieces: tuple[tuple[int, int], ...]  # [start, end) that its attention asks from, and whose targets it predicts
    position_S: Tensor  # (S,) positions of the tokens it holds between layers, on its device

    @classmethod
    def of(cls, seq_len: int, mesh: Mesh) -> "Part":
        cp, tp = mesh.layout.cp, mesh.layout.tp
        unit = 2 * cp * tp if cp > 1 else tp
        length = -(-seq_len // unit) * unit
        held = zigzag(cp)[mesh.index("dense", "cp")]
        chunk = length // (len(held) * cp)
        pieces = tuple((i * chunk, (i + 1) * chunk) for i in held)
        asked = torch.cat([torch.arange(*piece, device=mesh.device) for piece in pieces])
        return cls(seq_len, length, pieces, asked.chunk(tp)[mesh.index("dense", "tp")])

    def take(self, x_BS: Tensor, *, fill: int) -> Tensor:
        """Whole rows -> what attention asks from; ``fill`` stands for padding."""
        padded = torch.nn.functional.pad(x_BS, (0, self.length - x_BS.shape[1]), value=fill)
        return torch.cat([padded[:, start:end] for start, end in self.pieces], 1)

    def documents(self, documents_BS: Tensor | None) -> Tensor | None:
        """Whole rows, padded: the padding belongs to the last document and is seen by nobody."""
        if documents_BS is None or self.length == self.seq_len:
            return documents_BS
        last_BX = documents_BS[:, -1:].expand(-1, self.length - self.seq_len)
        return torch.cat([documents_BS, last_BX], 1)

    def mask(self, rows: Tensor | None, *, batch: int) -> Tensor | None:
        """(B, S) bool, False = padding of a row, or a row that ``rows`` (B,) leaves out; None = no padding."""
        if self.length == self.seq_len and rows is None:
            return None
        real_BS = (self.position_S < self.seq_len).expand(batch, -1)
        return real_BS if rows is None else real_BS & rows.to(real_BS.device)[:, None]


def place(model: Transformer, mesh: Mesh, *, cfg: ContextConfig) -> None:
    """Say which ranks hold the other positions of a sequence: for attention, and for what counts over sequences."""
    model.ulysses = mesh.layout.cp > 1 and cfg.method is Method.ulysses
    group, sequence = mesh.group("dense", "cp"), mesh.group("dense", "cp", "tp")
    for module in model.modules():
        if isinstance(module, Attention):
            module.context_group, module.ulysses = group, model.ulysses
    for layer in model.moe_layers():
        layer.sequence_group = sequence
        if any(term.buffers for term in layer.terms.values()):
            layer.stage_group = mesh.group("dense", "dp", "cp", "tp")
