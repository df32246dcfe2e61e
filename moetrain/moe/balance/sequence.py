"""Sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20): even load within each sequence."""

import torch
from torch import Tensor

from moetrain import comm
from moetrain.config import config
from moetrain.moe.balance.switch import counted, shares
from moetrain.moe.types import Balance, Routing, Tokens


@config(group="balance", name="sequence")
class Sequence(Balance):
    """E * sum_b sum_e f_be * sum_(t in b) P_te, f_be the share of sequence b's assignments that went to e."""

    coef: float = 1e-4

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor:
        """() float; equals the number of tokens when load is even within every sequence."""
        E = routing.scores_TE.shape[1]
        ids_BX = routing.ids_TK.view(tokens.num_sequences, -1)
        if routing.ragged:
            ids_BX = torch.where(ids_BX < 0, E, ids_BX)
        load_BE = ids_BX.new_zeros(tokens.num_sequences, E + 1).scatter_add_(1, ids_BX, torch.ones_like(ids_BX))[:, :E]
        load_BE = comm.all_reduce_(load_BE.contiguous(), group=tokens.group)
        f_BE = counted(load_BE, routing) / load_BE.sum(1, keepdim=True).clamp_min(1)
        return E * (shares(routing, tokens.mask_T).view(tokens.num_sequences, -1, E).sum(1) * f_BE).sum()
