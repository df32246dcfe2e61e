"""Dropless dispatch: variable-size all-to-all, no padding, no dropped tokens (MegaBlocks, arXiv 2211.15841).

    alone:   x_TD --index--> rows by slot --experts, sum--> y_TD                                (no copy, no host sync)
    group:   x_TD -> sort by (peer, slot) -> all-to-all -> rows by slot -> experts -> all-to-all -> gather-and-sum

With expert tensor parallelism each assignment is sent J times in that all-to-all, and the sum adds up the J parts.

The one host sync of a layer in a group is the copy of the send and receive counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm
from moetrain.config import config
from moetrain.moe import rows
from moetrain.moe.rows import gather, gather_sum
from moetrain.moe.types import Dispatcher, Routing, Rows, Slots, Tokens, nothing


@dataclass(frozen=True)
class Leg:
    """One all-to-all, and the order of its rows for what comes after."""

    send: list[int]  # rows to and from each rank of the group
    recv: list[int]
    order: tuple[Tensor, Tensor]  # (M,) which arrival comes m-th afterwards, and the inverse (M, 1)


@dataclass(frozen=True)
class Ticket:
    token_N: Tensor  # (N,) token of each sent row
    back_TX: Tensor  # (T, K*J) sent rows of each token, -1 = none
    ragged: bool
    legs: tuple[Leg, ...]  # () alone
    group: ProcessGroup | None


@config(group="dispatcher", name="dropless")
class Dropless(Dispatcher):
    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, tokens: Tokens, slots: Slots, beside: Callable[[], None] = nothing
    ) -> tuple[Rows, Ticket]:
        group, S = slots.group, slots.num_slots
        out = outgoing(routing, slots.target_EJ, num_targets=comm.size(group) * S)
        if group is None:
            return travel(x_TD, out, (), load_RS=out.load_X[None], group=None, beside=beside)
        send_RS = out.load_X.view(-1, S)
        recv_RS = torch.empty_like(send_RS)
        dist.all_to_all_single(recv_RS, send_RS, group=group)
        send, recv = rows.counts_on_host(send_RS.sum(1), recv_RS.sum(1), num_rows=out.token_N.numel())
        leg = Leg(send, recv, rows.regroup(recv_RS, num_rows=sum(recv)))
        return travel(x_TD, out, (leg,), load_RS=recv_RS, group=group, beside=beside)

    def combine(self, y_ND: Tensor, ticket: Ticket) -> Tensor:
        return back(y_ND, ticket)


@dataclass(frozen=True)
class Outgoing:
    """A rank's assignments, each J times, sorted by target: what it would send, those to nobody last."""

    token_N: Tensor  #   (N,) token of each, N = T * K * J
    back_TX: Tensor  #   (T, K*J) where each token's lie, -1 = none
    weights_N: Tensor  # (N,) combine weights
    load_X: Tensor  #    (targets,) int64 how many go to each
    ragged: bool  #      whether some go to nobody


def outgoing(routing: Routing, target_EJ: Tensor, *, num_targets: int) -> Outgoing:
    """Sort by ``target_EJ``, the numbers of each expert's J targets; an id of -1 sorts behind every target."""
    (T, K), J = routing.ids_TK.shape, target_EJ.shape[1]
    target_N = target_EJ[routing.ids_TK.flatten()].flatten()
    if routing.ragged:
        none_N = (routing.ids_TK < 0).flatten().repeat_interleave(J)
        target_N = torch.where(none_N, num_targets, target_N)
    order_N, back_N = rows.sort(target_N, num_keys=num_targets + routing.ragged, fused=routing.fused)
    if routing.ragged:
        back_N = torch.where(none_N, -1, back_N)  # pyright: ignore[reportPossiblyUnboundVariable]
    load_X = target_N.new_zeros(num_targets).scatter_(0, target_EJ.flatten(), routing.load_E.repeat_interleave(J))
    weights_N = gather(routing.weights_TK.flatten(), order_N // J, back_N.view(-1, J), ragged=routing.ragged)
    return Outgoing(order_N // (K * J), back_N.view(T, K * J), weights_N, load_X, routing.ragged)


def travel(
    x_TD: Tensor, out: Outgoing, legs: tuple[Leg, ...], *, load_RS: Tensor, group: ProcessGroup | None,
    beside: Callable[[], None],
) -> tuple[Rows, Ticket]:  # fmt: skip
    """Weights and rows over each leg in turn, the last ``beside`` something else, none where a rank is alone;
    ``load_RS`` comes from each rank per slot."""
    offsets_S = load_RS.sum(0).cumsum(0, dtype=torch.int32)
    if not legs:
        beside()
        ticket = Ticket(out.token_N, out.back_TX, out.ragged, (), None)
        return Rows(x_TD, out.token_N, out.back_TX, offsets_S, out.weights_N, out.ragged), ticket
    sent = sum(legs[0].send)
    token_N, weights_M = out.token_N[:sent], out.weights_N[:sent]
    x_MD = gather(x_TD, token_N, out.back_TX, ragged=out.ragged)
    for i, leg in enumerate(legs):
        if i:
            x_MD = gather(x_MD, *legs[i - 1].order)
        weights_M = gather(comm.all_to_all(weights_M, recv=leg.recv, send=leg.send, group=group), *leg.order)
        during = beside if leg is legs[-1] else nothing
        x_MD = comm.all_to_all_beside(x_MD, during, recv=leg.recv, send=leg.send, group=group)
    ticket = Ticket(token_N, out.back_TX, out.ragged, legs, group)
    return Rows(x_MD, *legs[-1].order, offsets_S, weights_M), ticket


def back(y_ND: Tensor, ticket: Ticket) -> Tensor:
    """The same way back: (N, D) results, in the order of the last arrival -> (T, D), each token's sum."""
    if not ticket.legs:
        return y_ND
    for i, leg in enumerate(reversed(ticket.legs)):
        if i:
            y_ND = gather_sum(y_ND, *leg.order)
        y_ND = comm.all_to_all(y_ND, recv=leg.send, send=leg.recv, group=ticket.group)
    return gather_sum(y_ND, ticket.token_N, ticket.back_TX, ragged=ticket.ragged)
