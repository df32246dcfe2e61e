"""All-gather dispatch: every rank of an expert group sees all its tokens and computes those of its own experts.

    group:  x_TD, targets, weights --all-gather--> (R*T) --index--> rows by slot --experts, sum--> (R*T, D), parts of
            a sum --reduce-scatter--> y_TD

For few ranks or many experts a token: what travels, (R - 1) T D numbers each way, depends on neither the routing nor K.
Dropless. Sent, forward: one all-gather each of x (T, D), of targets (T, K*J) int64, of weights (T, K); one
reduce-scatter of results. Backward: an all-gather of gradients of y; a reduce-scatter each of those of x and of the
weights. Shapes are those of the worst case, R T min(K, S) rows on a rank with S slots, of which only real ones are
computed: no host sync. Every rank of the group has the same number of tokens (padding routes nowhere), and a token's
experts differ. With expert tensor parallelism the J parts are parts of the sum like any other.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.config import config
from moetrain.moe import rows
from moetrain.moe.rows import gather
from moetrain.moe.types import Dispatcher, Routing, Rows, Slots, Tokens, nothing


@config(group="dispatcher", name="allgather")
class AllGather(Dispatcher):
    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, tokens: Tokens, slots: Slots, beside: Callable[[], None] = nothing
    ) -> tuple[Rows, ProcessGroup | None]:
        group, S = slots.group, slots.num_slots
        (T, K), J = routing.ids_TK.shape, slots.target_EJ.shape[1]
        X, C = comm.size(group) * T, min(K, S)
        target_TKJ = slots.target_EJ[routing.ids_TK.clamp_min(0)]
        if routing.ragged:
            target_TKJ = torch.where((routing.ids_TK < 0)[:, :, None], -1, target_TKJ)
        target_XKJ = comm.all_gather(target_TKJ, group=group).view(X, K, J)
        slot_XKJ = target_XKJ - comm.rank(group) * S
        slot_N = torch.where((slot_XKJ >= 0) & (slot_XKJ < S), slot_XKJ, S).amin(2).flatten()  # S = not here

        order_N, back_N = rows.sort(slot_N, num_keys=S + 1, fused=routing.fused)
        back_N1 = torch.where(slot_N < S, back_N, -1)[:, None]
        load_S = slot_N.new_zeros(S + 1).scatter_add_(0, slot_N, torch.ones_like(slot_N))[:S]
        offsets_S = load_S.cumsum(0, dtype=torch.int32)
        choice_M = order_N[: X * C]
        choice_M = torch.where(torch.arange(X * C, device=choice_M.device) < load_S.sum(), choice_M, -1)
        token_M = torch.where(choice_M < 0, -1, choice_M // K)
        back_XC = back_N1.view(X, K).sort(1, descending=True).values[:, :C]

        beside()
        x_XD = comm.gather(x_TD, dim=0, group=group)
        weights_XK = comm.gather(routing.weights_TK, dim=0, group=group)
        weights_M = gather(weights_XK.flatten(), choice_M, back_N1, ragged=True)
        return Rows(x_XD, token_M, back_XC, offsets_S, weights_M, ragged=True), group

    def combine(self, y_ND: Tensor, ticket: ProcessGroup | None) -> Tensor:
        return comm.scatter_sum(y_ND, dim=0, group=ticket)
