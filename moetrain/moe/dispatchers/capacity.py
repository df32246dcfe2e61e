"""Capacity dispatch: buffers of fixed size, surplus assignments dropped (GShard, arXiv 2006.16668). No host sync.

    capacity = max(min_capacity, ceil(factor * tokens in scope * K / E)) assignments that an expert keeps per scope;
               beside zero-computation experts, which never drop, E is the parts of an even load (their ``even_parts``)
    buffer (R, S, C, D), C = scopes on this rank * min(tokens in a scope, capacity)

Who is kept where more ask (``drop``), equal ones by position:

    position      the earliest positions
    probability   the highest combine weights (Megatron-LM's drop policy "probs")
    random        the highest of numbers that are functions of (seed, step, layer, sample, position, expert)

Scope ``sequence`` counts within each sequence, on whichever ranks it lies: every layout drops the same. Ranks that
share sequences gather counts (E,) a run of positions for ``position``, else (2K + 1,) a token. Scope ``local`` counts
the tokens of a rank's micro-batch together, in the order in which it holds them, and gathers nothing: it depends on
how cp and tp cut the sequences. Weights are not renormalized after a drop; drops are always counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import comm, counter
from moetrain.config import UserError, config
from moetrain.moe import draw
from moetrain.moe.rows import gather, gather_sum
from moetrain.moe.types import Dispatcher, LayoutDependence, Routing, Rows, Slots, Tokens, nothing


class Scope(Enum):
    sequence = "sequence"
    local = "local"


class Drop(Enum):
    position = "position"
    probability = "probability"
    random = "random"


@dataclass(frozen=True)
class Ticket:
    token_X: Tensor  # (R*S*C,) token of each buffer row, -1 = empty
    back_TX: Tensor  # (T, K*J) buffer rows of each token, -1 = dropped
    group: ProcessGroup | None


@config(group="dispatcher", name="capacity")
class Capacity(Dispatcher):
    """``drop`` says who is kept. ``scope=local`` is cheaper, and no longer the same run under every layout."""

    factor: float = 1.25
    eval_factor: float | None = None  # of evaluation; None = the same
    min_capacity: int = 0
    drop: Drop = Drop.position
    scope: Scope = Scope.sequence

    def __post_init__(self) -> None:
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(
                    f"model.moe.dispatcher.{name}={value}: the capacity factor has to be above 0 and finite (try 1.25)"
                )
        if self.min_capacity < 0:
            raise UserError(
                f"model.moe.dispatcher.min_capacity={self.min_capacity}: an expert keeps so many assignments at the "
                f"least, use 0 or more"
            )

    @property
    def depends_on_layout(self) -> LayoutDependence | None:
        if self.scope is not Scope.local:
            return None
        return LayoutDependence(
            "model.moe.dispatcher.scope=local counts each rank's own tokens: drops depend on cp and tp",
            axes=("cp", "tp"), instead="model.moe.dispatcher.scope=sequence",
        )  # fmt: skip

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, tokens: Tokens, slots: Slots, beside: Callable[[], None] = nothing
    ) -> tuple[Rows, Ticket]:
        group, num_slots = slots.group, slots.num_slots
        (T, K), (E, J), R = routing.ids_TK.shape, slots.target_EJ.shape, comm.size(group)
        first_TK = self._first(routing, tokens)
        if self.scope is Scope.local:
            position_T = torch.arange(T, device=x_TD.device)
            tokens = replace(tokens, num_sequences=1, position_S=position_T, stretches=1, group=None)
        S = T // tokens.num_sequences
        whole = S * comm.size(tokens.group)  # multiplied first, as where it is decided who is kept: one rounding
        average = routing.top_k or K
        rows_per_scope = min(S, self._capacity(whole, average, _parts(routing), tokens))
        C = tokens.num_sequences * rows_per_scope
        place_TK, keep_TK = self._place(routing, tokens, first_TK)

        target_TKJ = slots.target_EJ[routing.ids_TK.clamp_min(0)]
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
        weights_M = comm.all_to_all(weights_X, recv=None, send=None, group=group)
        x_MD = comm.all_to_all_beside(x_XD, beside, recv=None, send=None, group=group)
        rows = torch.arange(trash, device=x_TD.device)
        index_M = rows.view(R, num_slots, C).transpose(0, 1).flatten()
        arrive_M1 = rows.view(num_slots, R, C).transpose(0, 1).reshape(-1, 1)
        offsets_S = torch.arange(1, num_slots + 1, device=x_TD.device, dtype=torch.int32) * (R * C)
        weights_M = gather(weights_M, index_M, arrive_M1)
        ids_N = torch.where(keep_TK, routing.ids_TK, E).flatten()
        kept_E = routing.load_E.new_zeros(E + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))[:E]
        rows = Rows(x_MD, index_M, arrive_M1, offsets_S, weights_M, dropped_E=routing.load_E - kept_E)
        return rows, Ticket(token_X, back_TX, group)

    def combine(self, y_ND: Tensor, ticket: Ticket) -> Tensor:
        y_XD = comm.all_to_all(y_ND, recv=None, send=None, group=ticket.group)
        return gather_sum(y_XD, ticket.token_X, ticket.back_TX, ragged=True)

    def _factor(self, tokens: Tokens) -> float:
        return self.factor if tokens.training or self.eval_factor is None else self.eval_factor

    def _capacity(self, whole: int, K: int, parts: float, tokens: Tokens) -> int:
        return max(self.min_capacity, math.ceil(self._factor(tokens) * whole * K / parts))

    def _first(self, routing: Routing, tokens: Tokens) -> Tensor | None:
        """(T, K) of which the highest are kept first; None: the earliest."""
        if self.drop is Drop.position:
            return None
        if self.drop is Drop.probability:
            return routing.weights_TK.detach()
        E = routing.scores_TE.shape[1]
        assert tokens.sample_B is not None, "whoever drops at random needs to know which tokens these are"
        token_T = draw.numbers(tokens.sample_B, tokens.position_S, device=routing.ids_TK.device)
        return counter.uniform(token_T[:, None] * E + routing.ids_TK, key=counter.key("drop", *tokens.key))

    def _place(self, routing: Routing, tokens: Tokens, first_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        """(T, K) each kept assignment's place among this rank's of its (sequence, expert), and whether it is kept.

        Kept is whose turn comes early enough among all of the sequence's, on whichever rank: in order of position, in
        which what a rank keeps is the first of what it has; or the highest of ``first_TK`` first.
        """
        (T, K), E, B = routing.ids_TK.shape, routing.scores_TE.shape[1], tokens.num_sequences
        S, average, parts = T // B, routing.top_k or K, _parts(routing)
        ids_TK = torch.where(routing.ids_TK < 0, E, routing.ids_TK) if routing.ragged else routing.ids_TK
        chosen_TE = ids_TK.new_zeros(T, E + 1, dtype=torch.int32).scatter_(1, ids_TK, 1)
        if first_TK is None:
            place_TK = _queue(chosen_TE, ids_TK, B)
            before_TE, real_B = _of_sequence(chosen_TE, tokens)
            turn_TK = place_TK if before_TE is None else place_TK + before_TE.gather(1, ids_TK)
        else:
            turn_TK = _turns(first_TK, ids_TK, tokens, num_experts=E)
            real_B = None if tokens.mask_T is None else tokens.mask_T.view(B, -1).sum(1)
            real_B = None if real_B is None else comm.all_reduce_(real_B, group=tokens.group)
        if real_B is None:
            capacity = self._capacity(S * comm.size(tokens.group), average, parts, tokens)
        else:
            even_B = self._factor(tokens) * real_B.double() * average / parts
            capacity_B = torch.ceil(even_B).long().clamp_min(self.min_capacity)
            capacity = capacity_B.repeat_interleave(S)[:, None]
        keep_TK = (turn_TK < capacity) & (ids_TK < E)
        if first_TK is not None:
            kept_TE = torch.zeros_like(chosen_TE).scatter_(1, ids_TK, keep_TK.int())
            place_TK = _queue(kept_TE, ids_TK, B)
        return place_TK, keep_TK  # pyright: ignore[reportPossiblyUnboundVariable]


def _parts(routing: Routing) -> float:
    """Of an even load, of which an expert has one."""
    E, extra = routing.scores_TE.shape[1], routing.zero_computation
    return E if extra is None else extra.even_parts(E)


def _queue(chosen_TE: Tensor, ids_TK: Tensor, B: int) -> Tensor:
    """(T, K) int64: each assignment's place among those of its sequence and expert on this rank."""
    T, columns = chosen_TE.shape
    queue_TE = chosen_TE.view(B, T // B, columns).cumsum(1, dtype=torch.int32).view(T, columns)
    return queue_TE.gather(1, ids_TK).long() - 1


def _turns(first_TK: Tensor, ids_TK: Tensor, tokens: Tokens, *, num_experts: int) -> Tensor:
    """(T, K) int64: how many of the same sequence and expert come before each assignment, on whichever rank: those
    with more in ``first_TK``, of equal ones those at earlier positions. One all-gather, in float64."""
    (T, K), B = ids_TK.shape, tokens.num_sequences
    position_T1 = tokens.position_S.repeat(B)[:, None]
    table = torch.cat([position_T1.double(), ids_TK.double(), first_TK.double()], 1)
    position_X1, ids_XK, first_XK = comm.all_gather(table, group=tokens.group).flatten(0, 1).split([1, K, K], 1)
    X = position_X1.shape[0]
    sequence_X1 = torch.arange(X, device=ids_TK.device)[:, None] % T // (T // B)
    scope_N = (sequence_X1 * (num_experts + 1) + ids_XK.long()).flatten()
    order_N = position_X1.expand(-1, K).flatten().argsort(stable=True)
    order_N = order_N[first_XK.flatten()[order_N].argsort(descending=True, stable=True)]
    order_N = order_N[scope_N[order_N].argsort(stable=True)]
    load = scope_N.new_zeros(B * (num_experts + 1)).scatter_add_(0, scope_N, torch.ones_like(scope_N))
    turn_N = torch.arange(X * K, device=ids_TK.device) - (load.cumsum(0) - load)[scope_N[order_N]]
    return torch.empty_like(turn_N).scatter_(0, order_N, turn_N).view(X, K)[comm.rank(tokens.group) * T :][:T]


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
