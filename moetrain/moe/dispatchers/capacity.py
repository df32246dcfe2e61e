"""Capacity dispatch: buffers of fixed size, surplus assignments dropped (GShard, arXiv 2006.16668). No host sync.

    an expert keeps ceil(factor * tokens in scope * K / E) assignments per scope, the earliest positions first;
    buffer (R, S, C, D), C = scopes on this rank * min(tokens in a scope, capacity)

Scope ``sequence`` counts within each sequence: the same tokens are dropped under every layout. Weights are not
renormalized after a drop; what was dropped is always counted.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.config import UserError, config
from moetrain.moe.rows import gather, gather_sum
from moetrain.moe.types import Dispatcher, Routing, Rows, Tokens


class Scope(Enum):
    sequence = "sequence"


@dataclass(frozen=True)
class Ticket:
    token_X: Tensor  # (R*S*C,) token of each buffer row, -1 = empty
    back_TX: Tensor  # (T, K*J) buffer rows of each token, -1 = dropped
    by_slot: tuple[Tensor, Tensor]  # (M,) arrival row of each slot-sorted row, and its inverse (M, 1)
    group: ProcessGroup | None


@config(group="dispatcher", name="capacity")
class Capacity(Dispatcher):
    factor: float = 1.25
    scope: Scope = Scope.sequence

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise UserError(
                f"model.moe.dispatcher.factor={self.factor}: the capacity factor has to be above 0 (try 1.25)"
            )

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        target_EJ: Tensor,
        num_slots: int,
        tokens: Tokens,
        group: ProcessGroup | None,
    ) -> tuple[Rows, Ticket]:
        (T, K), (E, J), R = routing.ids_TK.shape, target_EJ.shape, comm.size(group)
        S = T // tokens.num_sequences
        whole = S * comm.size(tokens.group)  # multiplied first, as where it is decided who is kept: one rounding
        rows_per_scope = min(S, math.ceil(self.factor * whole * K / E))
        C = tokens.num_sequences * rows_per_scope
        place_TK, keep_TK = self._place(routing, tokens)

        target_TKJ = target_EJ[routing.ids_TK.clamp_min(0)]
        scope_T11 = torch.arange(T, device=x_TD.device)[:, None, None] // S
        row_TKJ = target_TKJ * C + scope_T11 * rows_per_scope + place_TK[:, :, None]
        trash = R * num_slots * C
        keep_TK1 = keep_TK[:, :, None]
        row_N = torch.where(keep_TK1, row_TKJ, trash).flatten()
        at_X = row_N.new_full((trash + 1,), -1).scatter_(0, row_N, torch.arange(T * K * J, device=x_TD.device))[:trash]
        back_TKJ = torch.where(keep_TK1, row_TKJ, -1)
        token_X = torch.where(at_X < 0, -1, at_X // (K * J))
        choice_X = torch.where(at_X < 0, -1, at_X // J)

        back_TX = back_TKJ.view(T, K * J)
        x_XD = gather(x_TD, token_X, back_TX, ragged=True)
        weights_X = gather(routing.weights_TK.flatten(), choice_X, back_TKJ.view(-1, J), ragged=True)
        x_MD = comm.all_to_all(x_XD, recv=None, send=None, group=group)
        weights_M = comm.all_to_all(weights_X, recv=None, send=None, group=group)
        rows = torch.arange(trash, device=x_TD.device)
        index_M = rows.view(R, num_slots, C).transpose(0, 1).flatten()
        arrive_M1 = rows.view(num_slots, R, C).transpose(0, 1).reshape(-1, 1)
        offsets_S = torch.arange(1, num_slots + 1, device=x_TD.device, dtype=torch.int32) * (R * C)
        weights_M = gather(weights_M, index_M, arrive_M1)
        ids_N = torch.where(keep_TK, routing.ids_TK, E).flatten()
        kept_E = routing.load_E.new_zeros(E + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))[:E]
        rows = Rows(x_MD, index_M, arrive_M1, offsets_S, weights_M, dropped_E=routing.load_E - kept_E)
        return rows, Ticket(token_X, back_TX, (index_M, arrive_M1), group)

    def combine(self, y_MD: Tensor, ticket: Ticket) -> Tensor:
        y_XD = gather_sum(y_MD, *ticket.by_slot)
        y_XD = comm.all_to_all(y_XD, recv=None, send=None, group=ticket.group)
        return gather_sum(y_XD, ticket.token_X, ticket.back_TX, ragged=True)

    def _place(self, routing: Routing, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(T, K) each assignment's place among this rank's of its (sequence, expert), and whether it is kept.

        Kept is who comes early enough among all of the sequence's, on whichever rank, in order of position. What a
        rank keeps is then the first of what it has.
        """
        (T, K), E, B = routing.ids_TK.shape, routing.scores_TE.shape[1], tokens.num_sequences
        S = T // B
        ids_TK = torch.where(routing.ids_TK < 0, E, routing.ids_TK) if routing.ragged else routing.ids_TK
        chosen_TE = ids_TK.new_zeros(T, E + 1, dtype=torch.int32).scatter_(1, ids_TK, 1)
        queue_TE = chosen_TE.view(B, S, E + 1).cumsum(1, dtype=torch.int32).view(T, E + 1)
        place_TK = queue_TE.gather(1, ids_TK).long() - 1
        whole = S * comm.size(tokens.group)
        before_TE, real_B = _of_sequence(chosen_TE, tokens)
        early_TK = place_TK if before_TE is None else place_TK + before_TE.gather(1, ids_TK)
        if real_B is None:
            return place_TK, (early_TK < math.ceil(self.factor * whole * K / E)) & (ids_TK < E)
        capacity_B = torch.ceil(self.factor * real_B.double() * K / E).long()
        return place_TK, (early_TK < capacity_B.repeat_interleave(S)[:, None]) & (ids_TK < E)


def _of_sequence(chosen_TE: Tensor, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """(T, E) int64: assignments of the same sequence at earlier positions on other ranks, None alone; and its real
    tokens (B,) int64, None without padding. One all-gather of counts."""
    B, runs = tokens.num_sequences, tokens.stretches
    real_LBE = None if tokens.mask_T is None else tokens.mask_T.view(B, runs, -1).sum(2).t()[:, :, None]
    if tokens.group is None:
        return None, None if real_LBE is None else real_LBE.sum((0, 2))
    run, E = chosen_TE.shape[0] // (B * runs), chosen_TE.shape[1]
    start_L = tokens.position_S.view(runs, run)[:, 0]  # L: the stretches of all ranks
    load_LBE = chosen_TE.view(B, runs, run, E).sum(2).transpose(0, 1)
    columns = [start_L[:, None, None].expand(-1, B, 1), load_LBE, *([] if real_LBE is None else [real_LBE])]
    table = comm.all_gather(torch.cat(columns, 2), group=tokens.group).flatten(0, 1)
    earlier_LL = table[:, 0, 0][None, :] < start_L[:, None]  # of mine, which others come before
    mine = torch.arange(runs, device=start_L.device) + comm.rank(tokens.group) * runs
    earlier_LL[:, mine] = False  # a rank's own are counted in its queue
    before_LBE = torch.einsum("lm,mbe->lbe", earlier_LL.double(), table[:, :, 1 : E + 1].double()).long()
    before_TE = before_LBE.transpose(0, 1).repeat_interleave(run, 1).reshape(-1, E)
    return before_TE, None if real_LBE is None else table[:, :, -1].sum(0)
