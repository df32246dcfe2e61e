"""Switch Transformer load-balancing loss (arXiv 2101.03961, eq. 4-6): the load may be that of more than a micro-batch.

micro_batch       f of the micro-batch's tokens
sequence          f of each sequence's own (DeepSeek-V3, arXiv 2412.19437, eq. 17-20)
global_lagged     f of the whole step before this one, of all ranks: no collective; even at first
global_buffered   f of this step so far, of all ranks (Qwen's global-batch loss, arXiv 2501.11873): depends on how
                  many samples come at a time, which is dp * train.micro_batch
"""

from enum import Enum

import torch
from torch import Tensor

from moetrain import comm
from moetrain.config import config
from moetrain.moe.types import Balance, LayoutDependence, Routing, Tokens


class Scope(Enum):
    micro_batch = "micro_batch"
    sequence = "sequence"
    global_lagged = "global_lagged"
    global_buffered = "global_buffered"


@config(group="balance", name="switch")
class Switch(Balance):
    """E * sum_e f_e * sum_t P_te: f_e is e's share of the assignments in ``scope``, P_te the normalized score.

    A micro-batch is ``train.micro_batch`` consecutive samples of the global batch: part of the run, not the layout.
    """

    coef: float = 0.01
    scope: Scope = Scope.micro_batch

    @property
    def lags(self) -> bool:
        return self.scope is Scope.global_lagged

    @property
    def buffers(self) -> bool:
        return self.scope is Scope.global_buffered

    @property
    def depends_on_layout(self) -> LayoutDependence | None:
        if not self.buffers:
            return None
        return LayoutDependence(
            f"model.moe.balance.{type(self).kind}.scope=global_buffered counts the micro-batches of all ranks so far: "  # pyright: ignore
            "the loss depends on dp",
            axes=("dp",), instead=f"model.moe.balance.{type(self).kind}.scope=global_lagged",  # pyright: ignore
        )  # fmt: skip

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor:
        """() float; equals the number of tokens when load is even."""
        P_TE = shares(routing, tokens.mask_T)
        E = P_TE.shape[1]
        if self.scope is Scope.sequence:
            load_BE = _load_of_sequences(routing, tokens)
            return E * (P_TE.view(tokens.num_sequences, -1, E).sum(1) * _share(load_BE, routing)).sum()
        return E * (P_TE.sum(0) * _share(self._load(routing, tokens), routing)).sum()

    def _load(self, routing: Routing, tokens: Tokens) -> Tensor:
        """(E,) int64."""
        if self.scope is Scope.micro_batch:
            return comm.all_reduce_(routing.load_E.clone(), group=tokens.group)
        found = tokens.lagged_E if self.lags else tokens.buffered_E
        assert found is not None, f"the layer keeps no load for scope {self.scope.value}"
        return found


def shares(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """(T, E) scores that sum to one over the experts (softmax scores already do), zero where padding.

    Those of zero-computation experts count by their weight (MoE++, arXiv 2410.07348).
    """
    P_TE = routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)
    if routing.zero_computation is not None:
        P_TE = routing.zero_computation.weighted(P_TE)
    return P_TE if mask_T is None else P_TE * mask_T[:, None]


def _share(load_E: Tensor, routing: Routing) -> Tensor:
    """(..., E) counts -> each expert's share; even where there are none."""
    total = load_E.sum(-1, keepdim=True)
    return (counted(load_E, routing) / total).where(total > 0, 1 / load_E.shape[-1])


def _load_of_sequences(routing: Routing, tokens: Tokens) -> Tensor:
    """(B, E) int64, over the ranks that hold the other positions."""
    B, E = tokens.num_sequences, routing.scores_TE.shape[1]
    ids_BX = routing.ids_TK.view(B, -1)
    if routing.ragged:
        ids_BX = ids_BX.masked_fill(ids_BX < 0, E)
    load_BE = ids_BX.new_zeros(B, E + 1).scatter_add_(1, ids_BX, torch.ones_like(ids_BX))[:, :E]
    return comm.all_reduce_(load_BE.contiguous(), group=tokens.group)


def counted(load_XE: Tensor, routing: Routing) -> Tensor:
    """(..., E) int64 loads -> float, null experts with the mean of theirs (AdaMoE, arXiv 2406.13233)."""
    load_XE = load_XE.to(routing.scores_TE.dtype)
    return load_XE if routing.zero_computation is None else routing.zero_computation.levelled(load_XE)
