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
from moetrain.moe.types import Dispatcher, Routing, Rows


class Scope(Enum):
    sequence = "sequence"


@dataclass(frozen=True)
class Ticket:
    token_X: Tensor  # (R*S*C,) token of each buffer row, -1 = empty
    back_TK: Tensor  # (T, K) buffer row of each assignment, -1 = dropped
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
        target_E: Tensor,
        num_slots: int,
        num_sequences: int,
        mask_T: Tensor | None,
        group: ProcessGroup | None,
    ) -> tuple[Rows, Ticket]:
        (T, K), E, R = routing.ids_TK.shape, target_E.numel(), comm.size(group)
        tokens = T // num_sequences
        rows_per_scope = min(tokens, math.ceil(self.factor * tokens * K / E))
        C = num_sequences * rows_per_scope
        place_TK, keep_TK = self._place(routing, num_sequences, tokens, rows_per_scope, mask_T)

        target_TK = target_E[routing.ids_TK.clamp_min(0)]
        scope_T1 = torch.arange(T, device=x_TD.device)[:, None] // tokens
        row_TK = target_TK * C + scope_T1 * rows_per_scope + place_TK
        trash = R * num_slots * C
        row_N = torch.where(keep_TK, row_TK, trash).flatten()
        at_X = row_N.new_full((trash + 1,), -1).scatter_(0, row_N, torch.arange(T * K, device=x_TD.device))[:trash]
        back_TK = torch.where(keep_TK, row_TK, -1)
        token_X = torch.where(at_X < 0, -1, at_X // K)

        x_XD = gather(x_TD, token_X, back_TK, ragged=True)
        weights_X = gather(routing.weights_TK.flatten(), at_X, back_TK.view(-1, 1), ragged=True)
        x_MD = comm.all_to_all(x_XD, recv=None, send=None, group=group)
        weights_M = comm.all_to_all(weights_X, recv=None, send=None, group=group)
        rows = torch.arange(trash, device=x_TD.device)
        index_M = rows.view(R, num_slots, C).transpose(0, 1).flatten()
        arrive_M1 = rows.view(num_slots, R, C).transpose(0, 1).reshape(-1, 1)
        offsets_S = torch.arange(1, num_slots + 1, device=x_TD.device, dtype=torch.int32) * (R * C)
        weights_M = gather(weights_M, index_M, arrive_M1)
        kept_E = routing.load_E.new_zeros(E + 1).scatter_add_(
            0, torch.where(keep_TK, routing.ids_TK, E).flatten(), torch.ones_like(row_N)
        )[:E]
        dropped_E = routing.load_E - kept_E
        rows = Rows(x_MD, index_M, arrive_M1, offsets_S, weights_M, dropped_E=dropped_E)
        return rows, Ticket(token_X, back_TK, (index_M, arrive_M1), group)

    def combine(self, y_MD: Tensor, ticket: Ticket) -> Tensor:
        y_XD = gather_sum(y_MD, *ticket.by_slot)
        y_XD = comm.all_to_all(y_XD, recv=None, send=None, group=ticket.group)
        return gather_sum(y_XD, ticket.token_X, ticket.back_TK, ragged=True)

    def _place(
        self, routing: Routing, num_sequences: int, tokens: int, rows_per_scope: int, mask_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(T, K) each assignment's place in its (sequence, expert) queue, in order of position, and whether it fits."""
        (T, K), E = routing.ids_TK.shape, routing.scores_TE.shape[1]
        ids_TK = torch.where(routing.ids_TK < 0, E, routing.ids_TK) if routing.ragged else routing.ids_TK
        chosen_TE = ids_TK.new_zeros(T, E + 1, dtype=torch.int32).scatter_(1, ids_TK, 1)
        queue_TE = chosen_TE.view(num_sequences, tokens, E + 1).cumsum(1, dtype=torch.int32).view(T, E + 1)
        place_TK = queue_TE.gather(1, ids_TK).long() - 1
        capacity: int | Tensor = rows_per_scope
        if mask_T is not None:
            real_B = mask_T.view(num_sequences, tokens).sum(1)
            capacity = torch.ceil(self.factor * real_B.double() * K / E).long().repeat_interleave(tokens)[:, None]
        return place_TK, (place_TK < capacity) & (ids_TK < E)
