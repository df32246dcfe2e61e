"""Dropless dispatch: variable-size all-to-all, no padding, no dropped tokens (MegaBlocks, arXiv 2211.15841).

    alone:   x_TD --index--> rows by slot --experts--> y_MD --gather-and-sum--> y_TD           (no copy, no host sync)
    group:   x_TD -> sort by (peer, slot) -> all-to-all -> rows by slot -> experts -> all-to-all -> gather-and-sum

The one host sync of a layer in a group is the copy of the send and receive counts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.config import config
from moetrain.moe.rows import gather, gather_sum, inverse
from moetrain.moe.types import Dispatcher, Routing, Rows


@dataclass(frozen=True)
class Ticket:
    token_N: Tensor  #  (N,) token of each sent row
    back_TK: Tensor  #  (T, K) sent row of each assignment, -1 = none
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
        target_E: Tensor,
        num_slots: int,
        num_sequences: int,
        mask_T: Tensor | None,
        group: ProcessGroup | None,
    ) -> tuple[Rows, Ticket]:
        T, K = routing.ids_TK.shape
        targets = comm.size(group) * num_slots
        target_N = target_E[routing.ids_TK.flatten()]
        if routing.ragged:
            target_N = torch.where(routing.ids_TK.flatten() < 0, targets, target_N)  # sorts behind every slot
        order_N = target_N.argsort(stable=True)
        back_TK = inverse(order_N).view(T, K)
        if routing.ragged:
            back_TK = torch.where(routing.ids_TK < 0, -1, back_TK)
        load_X = target_N.new_zeros(targets).scatter_(0, target_E, routing.load_E)
        weights_N = gather(routing.weights_TK.flatten(), order_N, back_TK.view(-1, 1), ragged=routing.ragged)
        if group is None:
            ticket = Ticket(order_N // K, back_TK, routing.ragged, None, None, None, None)
            offsets_S = load_X.cumsum(0, dtype=torch.int32)
            return Rows(x_TD, ticket.token_N, back_TK, offsets_S, weights_N, routing.ragged), ticket

        send_RS = load_X.view(-1, num_slots)
        recv_RS = torch.empty_like(send_RS)
        dist.all_to_all_single(recv_RS, send_RS, group=group)
        send, recv = torch.stack([send_RS.sum(1), recv_RS.sum(1)]).tolist()
        sent, M = sum(send), sum(recv)
        ticket_token_N = (order_N // K)[:sent]
        x_ND = gather(x_TD, ticket_token_N, back_TK, ragged=routing.ragged)
        x_MD = comm.all_to_all(x_ND, recv=recv, send=send, group=group)
        weights_M = comm.all_to_all(weights_N[:sent], recv=recv, send=send, group=group)
        slot_X = torch.arange(num_slots, device=x_TD.device).repeat(len(recv))
        slot_M = slot_X.repeat_interleave(recv_RS.flatten(), output_size=M)
        index_M = slot_M.argsort(stable=True)
        arrive_M1 = inverse(index_M)[:, None]
        ticket = Ticket(ticket_token_N, back_TK, routing.ragged, (index_M, arrive_M1), send, recv, group)
        offsets_S = recv_RS.sum(0).cumsum(0, dtype=torch.int32)
        return Rows(x_MD, index_M, arrive_M1, offsets_S, gather(weights_M, index_M, arrive_M1)), ticket

    def combine(self, y_MD: Tensor, ticket: Ticket) -> Tensor:
        if ticket.arrival is not None:
            index_M, arrive_M1 = ticket.arrival
            y_MD = gather_sum(y_MD, index_M, arrive_M1)
            y_MD = comm.all_to_all(y_MD, recv=ticket.send, send=ticket.recv, group=ticket.group)
        return gather_sum(y_MD, ticket.token_N, ticket.back_TK, ragged=ticket.ragged)
