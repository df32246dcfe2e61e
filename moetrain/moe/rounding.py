"""Token rounding (SonicMoE, arXiv 2512.14080): each expert's number of tokens a multiple of a kernel's tile.

Tokens choose first, as the router has it. Then an expert's number is rounded within each scope: up, and the expert
takes further tokens by score, that did not choose it; down, and it loses those of its lowest scores. A grouped GEMM
then pads no tile. A token ends with 0 to E experts.

Whether a token is taken depends on later tokens of its scope: training with it is not causal. Held-out data is routed
plainly, so that its loss knows nothing of the future.
"""

import dataclasses
from enum import Enum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config, replace
from moetrain.moe import sequences, ties
from moetrain.moe.types import Context, Router, Routing, taken

_CHOSEN = 1 << 50  # steps of a score: whoever chose comes before whoever did not
_LAST = torch.iinfo(torch.int64).min


class Rounding(Enum):
    nearest = "nearest"  # halves up
    up = "up"
    down = "down"


class Scope(Enum):
    sequence = "sequence"
    micro_batch = "micro_batch"


@config
class TokenRounding:
    """``multiple`` of an expert's tokens within the ``scope``, 0 = no rounding.

    ``micro_batch`` = ``train.micro_batch`` consecutive samples together: part of the run, not of the layout. Up is down
    where that would be more tokens than there are.
    """

    multiple: int = 0
    rounding: Rounding = Rounding.nearest
    scope: Scope = Scope.sequence

    def __post_init__(self) -> None:
        if self.multiple < 0:
            raise UserError(
                f"model.moe.rounding.multiple={self.multiple}: an expert's tokens are rounded to multiples of it, "
                f"use 0 for no rounding"
            )

    def check(self, router: Router, *, num_experts: int, tokens: int, sequences: int) -> None:
        """Raise ``UserError`` for what cannot be rounded in micro-batches of ``sequences`` of so many ``tokens``."""
        if self.multiple < 2:
            return
        if not router.tokens_choose:
            raise UserError(
                f"model.moe.rounding.multiple={self.multiple} with router={getattr(router, 'kind', '?')}: its experts "
                f"have even numbers of tokens already; set model.moe.rounding.multiple=0, or use router=topk"
            )
        share = self.share(top_k=router.top_k, num_experts=num_experts, tokens=tokens, sequences=sequences)
        if self.multiple > share:
            wider = " or scope=micro_batch" if self.scope is Scope.sequence and sequences > 1 else ""
            raise UserError(
                f"model.moe.rounding.multiple={self.multiple} is more than an expert's even share of a "
                f"{self.scope.value}, {share:.4g} tokens: most experts would be rounded to none; use 0 to "
                f"{int(share)}{wider}"
            )

    def share(self, *, top_k: int, num_experts: int, tokens: int, sequences: int) -> float:
        """Tokens that each expert has in a scope where load is even."""
        return (sequences if self.scope is Scope.micro_batch else 1) * tokens * top_k / num_experts

    def shrunk(self, **shape: int) -> "TokenRounding":
        """What stands for it in a smaller model of that ``share``."""
        return replace(self, multiple=min(self.multiple, int(self.share(**shape))))

    def around(self, router: Router) -> Router:
        """``router`` with its numbers of tokens rounded."""
        return router if self.multiple < 2 else Rounded(top_k=router.top_k, inner=router, rounding=self)


@config
class Rounded(Router):
    """``inner`` chooses and weighs; ``rounding`` adds and takes away."""

    inner: Router
    rounding: TokenRounding

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E), (E,) -> ids (T, E): e or -1; held-out data as ``inner`` routes it. One all-gather more."""
        if not ctx.training:
            return self.inner(logits_TE, bias_E, ctx=ctx, layer=layer, group=group)
        routing = self.inner(logits_TE.detach(), bias_E, ctx=ctx, layer=layer, group=group)
        taken_TE = self._rounded(routing.scores_TE, routing.ids_TK, ctx, group)
        rounded = self.inner.weigh_any(logits_TE, self.scores(logits_TE), taken_TE)
        if routing.own_TK is None:
            return rounded
        own_TE = self._rounded(routing.scores_TE, routing.own_TK, ctx, group)
        own_TK = torch.where(own_TE, torch.arange(own_TE.shape[1], device=own_TE.device), -1)
        return dataclasses.replace(rounded, own_TK=own_TK)

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """Of a token among those of its scope, or of the choice that is nearest to change the expert's number."""
        routing = self.inner(logits_TE, bias_E, ctx=ctx, layer=layer, group=group)
        inner_TE = self.inner.margins(logits_TE, bias_E, ctx=ctx, layer=layer, group=group)
        keys_XPE, chosen_XPE, real_XP1 = self._scopes(routing.scores_TE, routing.ids_TK, ctx, group)
        taken_XPE = self._taken(keys_XPE, chosen_XPE, real_XP1)
        inner_BPE, _ = sequences.whole(inner_TE, ctx=ctx, group=group)
        inner_XPE = inner_BPE.view_as(taken_XPE).masked_fill(~real_XP1, torch.inf)
        margins_XPE = torch.minimum(
            ties.of_places(keys_XPE, taken_XPE, steps=sequences.STEPS), inner_XPE.amin(1, keepdim=True)
        )
        return sequences.mine(margins_XPE.view_as(inner_BPE), ctx=ctx, group=group)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return self.inner.scores(logits_TE)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        """Weights are ``inner``'s, over all that took the token."""
        return self.inner.weigh_any(logits_TE, scores_TE, taken(ids_TK, num_experts=logits_TE.shape[1]))

    def _rounded(self, scores_TE: Tensor, ids_TK: Tensor, ctx: Context, group: ProcessGroup | None) -> Tensor:
        """(T, E) bool: which expert takes which token. Ties go to the earlier token; padding is never taken."""
        taken_XPE = self._taken(*self._scopes(scores_TE, ids_TK, ctx, group))
        return sequences.mine(taken_XPE.view(len(ctx.sample_B), -1, scores_TE.shape[1]), ctx=ctx, group=group)

    def _taken(self, keys_XPE: Tensor, chosen_XPE: Tensor, real_XP1: Tensor) -> Tensor:
        """(X, P, E) bool."""
        number_XE, most_X1 = chosen_XPE.sum(1), real_XP1.sum(1)
        multiple, more = self.rounding.multiple, self.rounding.rounding
        extra = {Rounding.down: 0, Rounding.nearest: multiple // 2, Rounding.up: multiple - 1}[more]
        target_XE = (number_XE + extra) // multiple * multiple
        target_XE = torch.minimum(target_XE, most_X1 // multiple * multiple)
        return sequences.places(keys_XPE) < target_XE[:, None]

    def _scopes(
        self, scores_TE: Tensor, ids_TK: Tensor, ctx: Context, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """X scopes of P tokens: int64 (X, P, E), the highest is taken first; bool (X, P, E), whether the token chose
        the expert; bool (X, P, 1), whether it is none of the padding."""
        E = scores_TE.shape[1]
        chosen_TE = taken(ids_TK, num_experts=E).to(scores_TE.dtype)
        table_BPX, real_BP = sequences.whole(torch.cat([scores_TE.detach(), chosen_TE], 1), ctx=ctx, group=group)
        if self.rounding.scope is Scope.micro_batch:
            table_BPX, real_BP = table_BPX.flatten(0, 1)[None], real_BP.flatten()[None]
        real_BP1 = real_BP[:, :, None]
        chosen_BPE = (table_BPX[:, :, E:] > 0) & real_BP1
        keys_BPE = sequences.steps(table_BPX[:, :, :E]) + _CHOSEN * chosen_BPE
        return keys_BPE.masked_fill(~real_BP1, _LAST), chosen_BPE, real_BP1
