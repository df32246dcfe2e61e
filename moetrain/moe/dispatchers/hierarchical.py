"""Hierarchical dispatch: dropless in two all-to-alls, within nodes and across them (DeepSpeed-MoE, arXiv 2201.05596).

    x_TD -> sort by (local index, node, slot) -> all-to-all within the node -> regroup by node
         -> all-to-all across nodes, among the ranks with one local index -> rows by slot -> experts, and all back

Rank (a, i), the i-th of node a, hands what is meant for (b, j) to its neighbour (a, j), who sends on to (b, j) what all
of its node have for there. With P ranks a node, a rank so meets R / P - 1 others across nodes in place of R - P, with
messages P times as large. What crosses is the same rows, one for each assignment: tokens that go to several experts of
a node are not merged. In return, rows also travel within their node first.

Both are all-to-alls of the one expert group whose runs to everybody else are empty: there are no further groups. What
is sent, forward: counts (P, R/P, S) and (R/P, P, S) int64, then rows (N, D) and weights (N,) twice; results once back
over each; backward the same. One host sync, of all four sides' counts. On one node, or where each rank is a node of its
own, or where nodes do not hold whole runs of the expert group, it is one all-to-all: dropless.
"""

from collections.abc import Callable

from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm, world
from moetrain.config import UserError, config, replace
from moetrain.layouts import divisors
from moetrain.moe import rows
from moetrain.moe.dispatchers.dropless import Leg, Ticket, back, outgoing, travel
from moetrain.moe.types import Dispatcher, Routing, Rows, Slots, Tokens, nothing


@config(group="dispatcher", name="hierarchical")
class Hierarchical(Dispatcher):
    """``ranks_per_node``: consecutive ranks that a node holds, 0 = as many as the launcher started there."""

    ranks_per_node: int = 0

    def __post_init__(self) -> None:
        if self.ranks_per_node < 0:
            raise UserError(
                f"model.moe.dispatcher.ranks_per_node={self.ranks_per_node}: has to be at least 1, or 0 for as many as "
                f"the launcher started on each node"
            )

    def check(self, *, ranks: int) -> None:
        P = self.ranks_per_node
        if P and max(P, ranks) % min(P, ranks):
            fits = ", ".join(map(str, divisors(ranks)))
            raise UserError(
                f"model.moe.dispatcher.ranks_per_node={P} and layout.ep * layout.etp = {ranks}: one has to divide the "
                f"other, so that groups of experts fill whole nodes; use one of {fits}, a multiple of {ranks}, or 0"
            )

    def shrunk(self, *, was: int, ranks: int) -> "Hierarchical":
        """In nodes of the fewest ranks; on one node what was on one."""
        P = self.ranks_per_node
        if P == 0 or was == ranks:
            return self
        fits = [d for d in divisors(ranks) if 1 < d < ranks]
        return replace(self, ranks_per_node=ranks if was <= P else fits[0] if P > 1 and fits else 1)

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, tokens: Tokens, slots: Slots, beside: Callable[[], None] = nothing
    ) -> tuple[Rows, Ticket]:
        group, S = slots.group, slots.num_slots
        R = comm.size(group)
        P = self._on_a_node(R)
        H = R // P  # nodes (hosts)
        peer_EJ = slots.target_EJ // S
        out = outgoing(routing, (peer_EJ % P * H + peer_EJ // P) * S + slots.target_EJ % S, num_targets=R * S)
        if group is None:
            return travel(x_TD, out, (), load_RS=out.load_X[None], group=None, beside=beside)

        node, local = divmod(comm.rank(group), P)
        near, far = range(node * P, (node + 1) * P), range(local, R, P)
        sent_PHS = out.load_X.view(P, H, S)
        held_PHS = _each_to(near, sent_PHS, group)
        recv_HPS = held_HPS = held_PHS.transpose(0, 1).contiguous()
        counts = [sent_PHS.sum((1, 2)), held_PHS.sum((1, 2))]
        if H > 1:
            recv_HPS = _each_to(far, held_HPS, group)
            counts += [held_HPS.sum((1, 2)), recv_HPS.sum((1, 2))]
        recv_RS = recv_HPS.view(R, S)
        send, held, *across = rows.counts_on_host(*counts, num_rows=out.token_N.numel())
        if across:
            transit = rows.regroup(held_PHS.sum(2), num_rows=sum(held))
            arrival = rows.regroup(recv_RS, num_rows=sum(across[1]))
            on, recv = (_of_all(R, far, count) for count in across)
            legs = Leg(_of_all(R, near, send), _of_all(R, near, held), transit), Leg(on, recv, arrival)
        else:
            legs = (Leg(send, held, rows.regroup(recv_RS, num_rows=sum(held))),)
        return travel(x_TD, out, legs, load_RS=recv_RS, group=group, beside=beside)

    def combine(self, y_ND: Tensor, ticket: Ticket) -> Tensor:
        return back(y_ND, ticket)

    def _on_a_node(self, ranks: int) -> int:
        """Of an expert group's ranks, which are consecutive; all, where one all-to-all will do."""
        self.check(ranks=ranks)
        P = self.ranks_per_node or world.ranks_here()
        return P if 1 < P < ranks and ranks % P == 0 else ranks


def _each_to(peers: range, x: Tensor, group: ProcessGroup) -> Tensor:
    """x[i] to the i-th of ``peers`` of the group, each of whom sends one back."""
    one = _of_all(comm.size(group), peers, [1] * len(peers))
    return comm.all_to_all(x, recv=one, send=one, group=group)


def _of_all(ranks: int, peers: range, counts: list[int]) -> list[int]:
    """Counts of some peers -> of all ranks of the group."""
    found = [0] * ranks
    for rank, count in zip(peers, counts, strict=True):
        found[rank] = count
    return found
