"""The nouns of an MoE layer. Everything else in this package is a function between them.

Shape letters, used as name suffixes everywhere in moe/:
    B sequences   S positions (in names of expert tables: slots)   T = B * S tokens on this rank   D model width
    K experts per token (top-k)   N = T * K assignments   E experts in the layer   F expert width
    (what a gate, a router or a balance term calls E is all choices, the zero-computation experts after the others)
    R ranks in the expert group   M rows to compute on this rank   J rows that one source row became
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import config as configs
from moetrain.config import UserError, config
from moetrain.moe import ties
from moetrain.moe.zero_computation import ZeroComputationConfig

Carry = dict[str, Tensor]
"""Tensors that gates pass from layer to layer and stage to stage; empty for gates that look at one layer only."""


@dataclass(frozen=True)
class Context:
    """What a micro-batch knows about itself. Nothing here is differentiable; every stage holds the same."""

    step: int
    micro_batch: int
    sample_B: Tensor  #  (B,) int64 global sample ids
    position_S: Tensor  # (S,) int64 positions of the tokens that this rank holds between layers
    routed_tokens: float  # global count of non-padding tokens of the step: the divisor of every balance loss
    seed: int = 0
    training: bool = True
    mask_BS: Tensor | None = None  # bool, False = padding; None = no padding anywhere
    pieces: tuple[tuple[int, int], ...] = ()  # [start, end) of the positions that its attention asks from; () = a row
    length: int = 0  # P: positions of a whole row, padding included; 0 = as many as there are
    documents_BP: Tensor | None = None  # int64 on the host, of whole rows; None = attention crosses documents
    chosen: dict[int, Tensor] | None = None  # layer -> (T, K) ids that the layer leaves to itself, if it is run again
    ids: dict[int, Tensor] | None = None  #    layer -> (B, S, K) expert ids, written where somebody asks for them
    scores: dict[int, Tensor] | None = None  # layer -> (B, S, E) scores and bias, likewise
    again: dict[int, Any] | None = None  # layer -> what else its second run takes from the first, if it is run again
    margins: dict[int, Tensor] | None = None  # layer -> (B, S, E) how near each was to change sides, likewise

    def for_rerun(self) -> "Context":
        """The same for one call that may be run again: the second run takes the first one's choices."""
        return replace(self, chosen={}, again={})


@dataclass(frozen=True)
class Tokens:
    """Where this rank's T tokens lie: S positions of each of ``num_sequences`` sequences."""

    num_sequences: int
    position_S: Tensor  # (S,) int64, ascending in ``stretches`` equal runs of consecutive positions
    stretches: int = 1
    mask_T: Tensor | None = None  # bool, False = padding
    group: ProcessGroup | None = None  # the ranks that hold the other positions of these sequences
    sample_B: Tensor | None = None  # (B,) int64 global sample ids
    key: tuple[int, ...] = ()  # seed, step, layer: what random numbers for these tokens are drawn for
    training: bool = True
    lagged_E: Tensor | None = None  #   (E,) int64 the last step's global load, 0 before the first; for who ``lags``
    buffered_E: Tensor | None = None  # (E,) int64 this step's so far, over all ranks of the stage; for who ``buffers``


@dataclass(frozen=True)
class LayoutDependence:
    """What is not the same run under layouts that differ in ``axes``, said to the user."""

    words: str
    axes: tuple[str, ...]
    instead: str  # what to set for what is the same


@dataclass(frozen=True)
class Routing:
    """Which experts each token chose, and how much of each it wants."""

    logits_TE: Tensor  #   (T, E) float32 or wider, before any score function
    scores_TE: Tensor  #   (T, E) after it, without the selection bias
    ids_TK: Tensor  #      (T, K) int64; -1 = none, only where ``ragged``
    weights_TK: Tensor  #  (T, K) what combine multiplies by
    ragged: bool = False  # whether ids_TK may hold -1 (padding, or routers that choose fewer than K)
    zero_computation: ZeroComputationConfig | None = None  # the experts of the layer that nothing is sent to, if any
    top_k: int | None = None  # experts of an average token, which capacity is counted by; None = K
    fused: bool = False  # whether a kernel of our own finds the order in which assignments go to experts
    own_TK: Tensor | None = None  # what the router would have chosen, where it was given its choices

    @cached_property
    def load_E(self) -> Tensor:
        """(E,) int64: assignments each expert got on this rank, without a host sync."""
        E = self.scores_TE.shape[1]
        ids_N = self.ids_TK.flatten()
        if self.ragged:
            ids_N = torch.where(ids_N < 0, E, ids_N)
        return ids_N.new_zeros(E + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))[:E]

    def sent(self, num_experts: int, weights_TK: Tensor) -> "Routing":
        """The choices of the first ``num_experts`` alone, with these weights: what a dispatcher is given."""
        ids_TK = torch.where(self.ids_TK < num_experts, self.ids_TK, -1)
        logits_TE, scores_TE = self.logits_TE[:, :num_experts], self.scores_TE[:, :num_experts]
        return replace(
            self, logits_TE=logits_TE, scores_TE=scores_TE, ids_TK=ids_TK, weights_TK=weights_TK, ragged=True
        )


@dataclass(frozen=True)
class Slots:
    """Where rows go: expert e has the J slots ``target_EJ[e]`` = peer * ``num_slots`` + slot."""

    target_EJ: Tensor  # (E, J) int64
    num_slots: int  # of each rank
    group: ProcessGroup | None = None  # the ranks that rows travel among


@dataclass(frozen=True)
class Rows:
    """The rows a rank has to compute: row m is ``x_ND[index_M[m]]`` times ``weights_M[m]``, sorted by slot.

    What comes of them is summed by row of x. The permutation is an index, so that a kernel backend may fuse the gather;
    ``back_NJ`` is its transpose (the J rows that each row of x became, -1 = none), so that the sum, and the gradient of
    the gather, is a gather and a sum, never a scatter.
    """

    x_ND: Tensor
    index_M: Tensor  #   (M,) int64; -1 = an empty row of a fixed-size buffer, only where ``ragged``
    back_NJ: Tensor  #   (N, J) int64; -1 = none, only where ``ragged``
    offsets_S: Tensor  # (S,) int32: end of each slot's rows; rows past the last are not computed
    weights_M: Tensor  # (M,) combine weights
    ragged: bool = False
    dropped_E: Tensor | None = None  # (E,) int64 assignments dropped on this rank; None = this dispatcher never drops


@config
class GateConfig(ABC):
    """Offers a gate: the parameters that turn x into logits."""

    @property
    def carries(self) -> dict[str, int]:
        """Name -> width of the (T, width) tensors that it passes on: each gate puts all of them into its carry."""
        return {}

    @abstractmethod
    def build(self, *, dim: int, num_experts: int) -> nn.Module:
        """A module whose forward is (x_TD, carry) -> (logits_TE in promote_types(x.dtype, float32), carry)."""

    def num_parameters(self, *, dim: int, num_experts: int) -> int:
        """Of one layer's gate."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(dim=dim, num_experts=num_experts).parameters())


@config
class Router(ABC):
    """Logits -> choices. Stateless: the gate's weight belongs to the layer, the bias to the balance terms.

    ``fused``: by the Triton kernels of ``kernels/routing.py`` what they can do, which is the same.
    """

    top_k: int = 2
    fused: bool = False

    @property
    def tokens_choose(self) -> bool:
        """Whether a token chooses experts, not they the token."""
        return True

    def taking(self, top_k: int) -> "Router":
        """The same with another ``top_k``."""
        return configs.replace(self, top_k=top_k)

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UserError(f"model.moe.router.top_k={self.top_k}: a token needs at least 1 expert")

    def check(self, *, num_experts: int) -> None:
        """Raise ``UserError`` for what cannot be trained with that many choices; called before any rank starts."""
        return None

    @abstractmethod
    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E), (E,) -> Routing. ``group``: the ranks that hold the other positions of these sequences."""

    @abstractmethod
    def scores(self, logits_TE: Tensor) -> Tensor:
        """(T, E) -> (T, E), without the bias."""

    @abstractmethod
    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        """The Routing of choices that were made before: what ``__call__`` returned with these ids, -1 included."""

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """(T, E): how far what it chooses by had to move until the token has the expert, or has it no more.

        For comparisons of two runs; inf = nothing that is computed decides it. Here: top-k of scores and bias.
        """
        return ties.of_top_k(self.scores(logits_TE) + bias_E, self.top_k)

    def weigh_any(self, logits_TE: Tensor, scores_TE: Tensor, taken_TE: Tensor) -> Routing:
        """The Routing of any number of experts a token, weighed by the router's rule as if it had chosen those.

        (T, E), (T, E), (T, E) bool -> ids (T, E): e or -1.
        """
        E = taken_TE.shape[1]
        counted_TE = taken_TE | ~taken_TE.any(-1, keepdim=True)  # a token without experts divides by no zero
        every_TE = torch.arange(E, device=taken_TE.device).expand_as(taken_TE)
        alone = logits_TE.masked_fill(~counted_TE, -torch.inf), scores_TE.masked_fill(~counted_TE, 0)
        weights_TE = self.weigh(*alone, every_TE).weights_TK.masked_fill(~taken_TE, 0)
        ids_TE = torch.where(taken_TE, every_TE, -1)
        return Routing(logits_TE, scores_TE, ids_TE, weights_TE, ragged=True, top_k=self.top_k)


def taken(ids_TK: Tensor, *, num_experts: int) -> Tensor:
    """(..., K) expert ids, -1 = none -> (..., E) bool."""
    ids_TK = torch.where(ids_TK < 0, num_experts, ids_TK)
    room_TX = ids_TK.new_zeros(*ids_TK.shape[:-1], num_experts + 1, dtype=torch.bool)
    return room_TX.scatter_(-1, ids_TK, True)[..., :num_experts]


@config
class Balance:
    """One pressure toward even load: a differentiable ``loss``, a between-steps ``bias`` update, or both."""

    coef: float = 0.0

    @property
    def lags(self) -> bool:
        """Whether the loss is made from the last step's load, which the layer then keeps and saves."""
        return False

    @property
    def buffers(self) -> bool:
        """Whether it is made from this step's load so far: one all-reduce of (E,) a micro-batch, over the stage."""
        return False

    @property
    def depends_on_layout(self) -> LayoutDependence | None:
        return None

    def check(self, *, num_experts: int) -> None:
        """Raise ``UserError`` for what cannot be trained with that many choices; called before any rank starts."""
        return None

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor | None:
        """() a sum over this rank's tokens, without ``coef`` and without a divisor; ``None`` adds no loss."""
        return None

    def bias(self, bias_E: Tensor, load_E: Tensor, *, step: int = 0) -> Tensor:
        """(E,), (E,) int64 global assignment counts of the finished step, which is number ``step`` -> (E,)."""
        return bias_E


def nothing() -> None:
    """What is computed beside rows that travel where there is no shared expert."""


@config
class Dispatcher(ABC):
    """Moves tokens to the slots that hold their experts, and the results back. State goes into the ticket."""

    def check(self, *, ranks: int) -> None:
        """Raise ``UserError`` for what it cannot do among ``ranks`` = ep * etp ranks, before any of them starts."""
        return None

    def shrunk(self, *, was: int, ranks: int) -> "Dispatcher":
        """What stands for it where a verification makes expert groups of ``ranks`` of those of ``was``."""
        return self

    @property
    def depends_on_layout(self) -> LayoutDependence | None:
        return None

    @abstractmethod
    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, tokens: Tokens, slots: Slots, beside: Callable[[], None] = nothing
    ) -> tuple[Rows, Any]:
        """(T, D) -> the rows of this rank's slots, and the ticket that ``combine`` needs.

        Every assignment to expert e becomes a row for each of its J slots, whose results are parts of a sum.
        ``beside()`` is called once, where rows travel while they do (``comm.all_to_all_beside``).
        """

    @abstractmethod
    def combine(self, y_ND: Tensor, ticket: Any) -> Tensor:
        """(N, D) what became of each row of ``Rows.x_ND`` -> (T, D): each token's sum over its experts."""
