"""The MoE layer: gate, route, dispatch, compute, combine. Read this file first."""

from collections.abc import Callable
from dataclasses import field, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import comm, kernels
from moetrain import config as configs
from moetrain.config import UserError, config
from moetrain.moe.attach import attach
from moetrain.moe.dispatchers.dropless import Dropless
from moetrain.moe.experts import Experts
from moetrain.moe.gates.linear import LinearGateConfig
from moetrain.moe.per_layer import PerLayer
from moetrain.moe.placement.static import Static
from moetrain.moe.placement.types import FREE, Grid, Placement, PlacementPolicy
from moetrain.moe.rounding import TokenRounding
from moetrain.moe.routers.topk import TopK
from moetrain.moe.travel import Replicas
from moetrain.moe.types import (
    Balance,
    Carry,
    Context,
    Dispatcher,
    GateConfig,
    LayoutDependence,
    Router,
    Routing,
    Slots,
    Tokens,
    nothing,
)
from moetrain.moe.watch import Watch
from moetrain.moe.zero_computation import ZeroComputation, ZeroComputationConfig


@config
class MoEConfig:
    """``hidden`` is the width of one routed expert; ``shared_hidden`` that of the shared expert, 0 = none.

    ``residual`` weighs the shared and the routed ones by a learned softmax; with top_k=1, that is residual MoE.
    """

    num_experts: int = 8
    hidden: int = 512
    shared_hidden: int = 0
    shared_gate: bool = False
    residual: bool = False
    kernel: kernels.Kernel = kernels.Kernel.auto
    fp8_tile: int = 0  # numbers of a routed expert's factor that share a float8 scale; 0 = no float8
    gate: GateConfig = field(default_factory=LinearGateConfig)
    router: Router = field(default_factory=TopK)
    rounding: TokenRounding = field(default_factory=TokenRounding)
    placement: PlacementPolicy = field(default_factory=Static)
    dispatcher: Dispatcher = field(default_factory=Dropless)
    balance: dict[str, Balance] = field(default_factory=dict)
    per_layer: PerLayer = field(default_factory=PerLayer)
    zero_computation: ZeroComputationConfig = field(default_factory=ZeroComputationConfig)

    @property
    def num_choices(self) -> int:
        """Columns of the gate: the experts, then the zero-computation experts."""
        return self.num_experts + self.zero_computation.total

    @property
    def terms(self) -> dict[str, Balance]:
        """The balance terms that add a loss."""
        return {name: term for name, term in self.balance.items() if type(term).loss is not Balance.loss}

    def at(self, i: int) -> "MoEConfig":
        """That of the i-th MoE layer: its own numbers in place of lists, but for what it has at first."""
        p = self.per_layer
        if p == PerLayer():
            return self
        own = PerLayer(early_top_k=p.early_top_k[i : i + 1], early_steps=p.early_steps * (i < len(p.early_top_k)))
        return configs.replace(
            self, num_experts=p.experts[i] if p.experts else self.num_experts, per_layer=own,
            router=self.router.taking(p.top_k[i]) if p.top_k else self.router,
        )  # fmt: skip

    @property
    def depends_on_layout(self) -> list[LayoutDependence]:
        """What of it is not the same run under every layout."""
        found = [part.depends_on_layout for part in (self.placement, self.dispatcher, *self.balance.values())]
        return [x for x in found if x is not None]

    def check(self) -> None:
        """Raise ``UserError`` for a router or a balance term that cannot work with these experts."""
        extra = self.zero_computation
        if extra.total and not self.router.tokens_choose:
            raise UserError(
                f"model.moe.zero_computation has {extra}, with a router by which experts choose tokens: a token has to "
                f"choose to compute less; use router=topk, or set them to 0"
            )
        if extra.total and self.rounding.multiple > 1:
            raise UserError(
                f"model.moe.rounding.multiple={self.rounding.multiple} with {extra} of model.moe.zero_computation: it "
                f"rounds what experts compute, and nothing is sent to these; set one of them to 0"
            )
        for part in (self.router, *self.balance.values()):
            try:
                part.check(num_experts=self.num_choices)
            except UserError as e:
                if not extra.total:
                    raise
                words = f"{self.num_experts} and {extra.total} of model.moe.zero_computation"
                raise UserError(f"{e} (its experts are all {self.num_choices} choices, {words})") from e

    def __post_init__(self) -> None:
        kernels.check(self.kernel, fp8_tile=self.fp8_tile)
        if self.residual and (self.shared_gate or not self.shared_hidden):
            raise UserError(
                f"model.moe.residual=true with shared_hidden={self.shared_hidden} shared_gate={self.shared_gate}: it "
                f"weighs a shared expert itself, set shared_hidden above 0 and shared_gate=false"
            )
        if self.router.top_k > self.num_choices:
            more = f" and the {self.zero_computation.total} of model.moe.zero_computation"
            raise UserError(
                f"model.moe.router.top_k={self.router.top_k} is more than model.moe.num_experts={self.num_experts}"
                f"{more * (self.zero_computation.total > 0)}: use 1 to {self.num_choices}"
            )


class MoE(nn.Module):
    """Experts over ``ep`` ranks of an ``edp`` x ``ep`` grid, each split over ``etp``; alone by default.

    ``parallel/expert.py`` places it. Its config is that of one layer (``MoEConfig.at``).
    """

    # E is all choices here: see types.py
    bias_E: Tensor  #   (E,) saved: what the balance terms have learned
    lagged_E: Tensor | None  # (E,) int64 saved: the last step's global load, where a balance term lags
    load_ME: Tensor  #  (micro-batches, E) int64, written by assignment: idempotent under recompute
    losses_MJ: Tensor  # (micro-batches, balance terms) unscaled token sums, likewise
    dropped_ME: Tensor  # (micro-batches, E) int64 assignments dropped on this rank, likewise
    # (E,) assignments of a micro-batch on this rank -> a placement of its own, None = the planned one
    calibrate: Callable[[Tensor], tuple[Placement, Replicas] | None] | None = None
    watch: Watch | None  # what else the step notes, for telemetry; None in most steps

    def __init__(self, cfg: MoEConfig, *, dim: int, layer: int) -> None:
        super().__init__()
        self.cfg, self.dim, self.layer = cfg, dim, layer
        self.group: ProcessGroup | None = None  # the ranks that rows travel among
        self.sequence_group: ProcessGroup | None = None  # the ranks that hold the rest of this rank's sequences
        self.stage_group: ProcessGroup | None = None  # the ranks that hold the rest of the step's tokens, in this layer
        self.gate = cfg.gate.build(dim=dim, num_experts=cfg.num_choices)
        extra = cfg.zero_computation
        self.zero_computation = ZeroComputation(extra, dim=dim, num_experts=cfg.num_experts) if extra.total else None
        self.register_buffer("bias_E", torch.zeros(cfg.num_choices))
        self.terms, early = cfg.terms, cfg.per_layer.early_top_k
        self.router = self.early_router = cfg.rounding.around(cfg.router)
        if early:
            self.early_router = cfg.rounding.around(cfg.router.taking(early[0]))
        lags = any(term.lags for term in self.terms.values())
        self.register_buffer("lagged_E", torch.zeros(cfg.num_choices, dtype=torch.int64) if lags else None)
        self.place(Grid(1, 1), etp=1, rank=0, group=None)
        self.begin_step(1)

    def place(
        self, grid: Grid, *, etp: int, rank: int, group: ProcessGroup | None, owner_E: Tensor | None = None
    ) -> None:
        """Say where this rank stands in the stage's expert grid, and make room for the experts it owns (on meta).

        ``group`` is the ranks that its tokens travel among, etp innermost; ``owner_E`` who owns each expert, None = as
        the policy has it where this layer is alone. A width that etp does not divide is padded with zeros, which
        compute zeros and get zero gradients.
        """
        self.rank, self.etp, self.group = rank, etp, group
        with torch.device("cpu"):  # planning tables are real even where the model is on meta
            load_E = torch.zeros(self.cfg.num_experts)
            if owner_E is None:
                owner_E = self.cfg.placement.owners([load_E], grid)[0]
            self.placement = self.cfg.placement(load_E, owner_E, grid, FREE)
        self.width = -(-self.cfg.hidden // etp)
        at, travels = self.placement, self.cfg.placement.travels
        self.owned = (at.owner_E == rank).nonzero().flatten().tolist() if travels else at.slots_of(rank)
        self.experts = Experts(len(self.owned), dim=self.dim, hidden=self.width)

    def forward(
        self, x_BSD: Tensor, carry: Carry, ctx: Context, *, beside: Callable[[], None] = nothing
    ) -> tuple[Tensor, Carry]:
        """(B, S, D) -> (B, S, D) and what the gate passes on; ``beside()`` is called while rows are on their way."""
        x_TD = x_BSD.flatten(0, 1)
        mask_T = None if ctx.mask_BS is None else ctx.mask_BS.flatten()
        tokens = Tokens(
            x_BSD.shape[0], ctx.position_S, max(1, len(ctx.pieces)), mask_T, self.sequence_group,
            sample_B=ctx.sample_B, key=(ctx.seed, ctx.step, self.layer), training=ctx.training, lagged_E=self.lagged_E,
        )  # fmt: skip
        logits_TE, carry = self.gate(x_TD, carry)
        if self.cfg.router.fused:
            kernels.routing.check(device=x_TD.device, dtype=x_TD.dtype)
        routing, again = self._route(logits_TE, ctx)
        routing = replace(routing, fused=self.cfg.router.fused)
        if mask_T is not None:
            routing = _mask(routing, mask_T)
        if self.zero_computation is not None:
            routing = replace(routing, zero_computation=self.cfg.zero_computation)
        if ctx.ids is not None and ctx.scores is not None and not again:
            ids_TK = routing.ids_TK if routing.own_TK is None else routing.own_TK
            ctx.ids[self.layer] = ids_TK.view(*x_BSD.shape[:2], -1)
            ctx.scores[self.layer] = (routing.scores_TE.detach() + self.bias_E).view(*x_BSD.shape[:2], -1)

        sent, stays_TD = self._stays(x_TD, routing)
        placement, replicas = self._placed(sent, ctx)
        target_EJ = placement.target_EJ(self.rank, x_TD.device, etp=self.etp)
        slots = Slots(target_EJ, placement.num_slots, self.group)
        rows, ticket = self.cfg.dispatcher.dispatch(x_TD, sent, tokens=tokens, slots=slots, beside=beside)
        sizes = {"device": x_TD.device, "dtype": x_TD.dtype, "dim": self.dim, "hidden": self.width}
        backend, _ = kernels.choose(self.cfg.kernel, **sizes, fp8_tile=self.cfg.fp8_tile)
        y_TD = self.cfg.dispatcher.combine(self.experts(rows, backend, replicas), ticket)
        if stays_TD is not None:
            y_TD = y_TD + stays_TD
        if ctx.training:
            m = ctx.micro_batch
            self.load_ME[m] = routing.load_E
            if rows.dropped_E is not None:
                self.dropped_ME[m, : self.cfg.num_experts] = rows.dropped_E
            if self.watch is not None:
                self.watch.note(m, routing, mask_T, again=again)
            y_TD = self._balance(y_TD, routing, tokens, ctx)
        return y_TD.view_as(x_BSD), carry

    def begin_step(self, micro_batches: int, *, watch: bool = False, pairs: bool = False) -> None:
        """Room for the counts of a step's micro-batches; to ``watch`` and count its ``pairs`` takes some more."""
        device, E = self.bias_E.device, self.cfg.num_choices
        self.load_ME = torch.zeros(micro_batches, E, dtype=torch.int64, device=device)
        self.dropped_ME = torch.zeros_like(self.load_ME)
        self.losses_MJ = torch.zeros(micro_batches, len(self.terms), dtype=self.bias_E.dtype, device=device)
        self.watch = Watch.empty(micro_batches, num_experts=E, pairs=pairs, like=self.bias_E) if watch else None

    @torch.no_grad()
    def end_step(self, load_E: Tensor, *, step: int, skip: Tensor | None = None) -> None:
        """After ``step``, given its global load (E,) int64: move the bias; nothing where ``skip``, () bool."""
        bias_E = self.bias_E
        for term in self.cfg.balance.values():
            bias_E = term.bias(bias_E, load_E, step=step)
        if bias_E is not self.bias_E:
            self.bias_E.copy_(bias_E if skip is None else torch.where(skip, self.bias_E, bias_E))
        if self.lagged_E is not None:
            self.lagged_E.copy_(load_E if skip is None else torch.where(skip, self.lagged_E, load_E))

    def _route(self, logits_TE: Tensor, ctx: Context) -> tuple[Routing, bool]:
        """Whether it is run again: then with the choices of the first run, which a second top-k may not repeat."""
        early, chosen = ctx.step < self.cfg.per_layer.early_steps, ctx.chosen
        router = self.early_router if early else self.router
        if chosen is not None and self.layer in chosen:
            return router.weigh(logits_TE, router.scores(logits_TE), chosen[self.layer].long()), True
        routing = router(logits_TE, self.bias_E, ctx=ctx, layer=self.layer, group=self.sequence_group)
        if chosen is not None:
            chosen[self.layer] = routing.ids_TK.int()
        if ctx.margins is not None:
            known = {"ctx": ctx, "layer": self.layer, "group": self.sequence_group}
            margins_TE = router.margins(logits_TE.detach(), self.bias_E, **known)
            ctx.margins[self.layer] = margins_TE.view(*ctx.sample_B.shape, -1, margins_TE.shape[1])
        return routing, False

    def _placed(self, sent: Routing, ctx: Context) -> tuple[Placement, Replicas | None]:
        """Where experts are in this micro-batch: as planned, or as ``calibrate`` has it now that its load is known."""
        known = ctx.again is not None and self.layer in ctx.again
        found = ctx.again[self.layer] if known else None  # pyright: ignore[reportOptionalSubscript]
        if not known and self.calibrate is not None and ctx.training:
            found = self.calibrate(sent.load_E)
        if ctx.again is not None:
            ctx.again[self.layer] = found
        return found or (self.placement, self.experts.replicas)

    def _stays(self, x_TD: Tensor, routing: Routing) -> tuple[Routing, Tensor | None]:
        """What is sent to experts, and (T, D) what zero-computation experts add here, None where that is nothing."""
        if self.zero_computation is None:
            return routing, None
        E, ids_TK = self.cfg.num_experts, routing.ids_TK
        weights_TK = self.cfg.zero_computation.shared_out(ids_TK, routing.weights_TK, num_experts=E)
        stays_TD = self.zero_computation(x_TD, ids_TK, weights_TK, ragged=routing.ragged)
        return routing.sent(E, weights_TK), stays_TD

    def _balance(self, y_TD: Tensor, routing: Routing, tokens: Tokens, ctx: Context) -> Tensor:
        if any(term.buffers for term in self.terms.values()):
            so_far_E = self.load_ME[: ctx.micro_batch + 1].sum(0)
            tokens = replace(tokens, buffered_E=comm.all_reduce_(so_far_E, group=self.stage_group))
        total = None
        for j, term in enumerate(self.terms.values()):
            loss = term.loss(routing, tokens)
            assert loss is not None, f"{type(term).__name__}.loss returned nothing"
            self.losses_MJ[ctx.micro_batch, j] = loss.detach()
            total = term.coef * loss if total is None else total + term.coef * loss
        return y_TD if total is None else attach(y_TD, total, weight=1.0 / ctx.routed_tokens)


def _mask(routing: Routing, mask_T: Tensor) -> Routing:
    ids_TK = torch.where(mask_T[:, None], routing.ids_TK, -1)
    return replace(routing, ids_TK=ids_TK, ragged=True)
