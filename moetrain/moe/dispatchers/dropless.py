"""Dropless dispatch: variable-size all-to-all, no padding, no dropped tokens (MegaBlocks, arXiv 2211.15841).

    alone:   x_TD --index--> rows by slot --experts--> y_MD --gather-and-sum--> y_TD           (no copy, no host sync)
    group:   x_TD -> sort by (peer, slot) -> all-to-all -> rows by slot -> experts -> all-to-all -> gather-and-sum

With expert tensor parallelism each assignment is sent J times in that all-to-all, and the sum adds up the J parts.

The one host sync of a layer in a group is the copy of the send and receive counts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.config import config
from moetrain.moe import rows
from moetrain.moe.rows import gather, gather_sum, inverse
from moetrain.moe.types import Dispatcher, Routing, Rows, Tokens


@dataclass(frozen=True)
class Ticket:
    token_N: Tensor  #  (N,) token of each sent row
    back_TX: Tensor  #  (T, K*J) sent rows of each token, -1 = none
    ragged: bool
    arrival: tuple[Tensor, Tensor] | None  # (M,) slot-sorted row of each arrival, and its inverse (M, 1); None alone
    send: list[int] | None  # rows to and from each peer
    recv: list[int] | None
    group: ProcessGroup | None


@config(group="dispatcher", name="dropless")
class Dropless(Dispatcher):
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
        out = outgoing(routing, target_EJ, num_targets=comm.size(group) * num_slots)
        token_N, back_TX, weights_N, ragged = out.token_N, out.back_TX, out.weights_N, routing.ragged
        if group is None:
            ticket = Ticket(token_N, back_TX, ragged, None, None, None, None)
            offsets_S = out.load_X.cumsum(0, dtype=torch.int32)
            return Rows(x_TD, token_N, back_TX, offsets_S, weights_N, ragged), ticket

        send_RS = out.load_X.view(-1, num_slots)
        recv_RS = torch.empty_like(send_RS)
        dist.all_to_all_single(recv_RS, send_RS, group=group)
        send, recv = rows.counts_on_host(send_RS.sum(1), recv_RS.sum(1), num_rows=token_N.numel())
        sent, M = sum(send), sum(recv)
        token_N = token_N[:sent]
        x_ND = gather(x_TD, token_N, back_TX, ragged=ragged)
        x_MD = comm.all_to_all(x_ND, recv=recv, send=send, group=group)
        weights_M = comm.all_to_all(weights_N[:sent], recv=recv, send=send, group=group)
        index_M, arrive_M1 = rows.regroup(recv_RS, num_rows=M)
        ticket = Ticket(token_N, back_TX, ragged, (index_M, arrive_M1), send, recv, group)
        offsets_S = recv_RS.sum(0).cumsum(0, dtype=torch.int32)
        return Rows(x_MD, index_M, arrive_M1, offsets_S, gather(weights_M, index_M, arrive_M1)), ticket

    def combine(self, y_MD: Tensor, ticket: Ticket) -> Tensor:
        if ticket.arrival is not None:
            index_M, arrive_M1 = ticket.arrival
            y_MD = gather_sum(y_MD, index_M, arrive_M1)
            y_MD = comm.all_to_all(y_MD, recv=ticket.send, send=ticket.recv, group=ticket.group)
        return gather_sum(y_MD, ticket.token_N, ticket.back_TX, ragged=ticket.ragged)


@dataclass(frozen=True)
class Outgoing:
    """A rank's assignments, each J times, sorted by target: what it would send, those to nobody last."""

    token_N: Tensor  #   (N,) token of each, N = T * K * J
    back_TX: Tensor  #   (T, K*J) where each token's lie, -1 = none
    weights_N: Tensor  # (N,) combine weights
    load_X: Tensor  #    (targets,) int64 how many go to each


def outgoing(routing: Routing, target_EJ: Tensor, *, num_targets: int) -> Outgoing:
    """Sort by ``target_EJ``, the numbers of each expert's J targets; an id of -1 sorts behind every target."""
    (T, K), J = routing.ids_TK.shape, target_EJ.shape[1]
    target_N = target_EJ[routing.ids_TK.flatten()].flatten()
    if routing.ragged:
        none_N = (routing.ids_TK < 0).flatten().repeat_interleave(J)
        target_N = torch.where(none_N, num_targets, target_N)
    order_N = target_N.argsort(stable=True)
    back_N = inverse(order_N)
    if routing.ragged:
        back_N = torch.where(none_N, -1, back_N)  # pyright: ignore[reportPossiblyUnboundVariable]
    load_X = target_N.new_zeros(num_targets).scatter_(0, target_EJ.flatten(), routing.load_E.repeat_interleave(J))
    weights_N = gather(routing.weights_TK.flatten(), order_N // J, back_N.view(-1, J), ragged=routing.ragged)
    return Outgoing(order_N // (K * J), back_N.view(T, K * J), weights_N, load_X)
