"""Sinkhorn routing: in training, top-k of scores that were normalized over tokens too, so that load comes out even.

The balanced assignment of S-BASE (arXiv 2202.01169) in the form that Megatron-LM gives it. Its scope is
the sequence: the same choices under every layout. In training they depend on later tokens of the sequence; held-out
data is routed by plain top-k, so that its loss knows nothing of the future.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config
from moetrain.moe import sequences, ties
from moetrain.moe.routers.topk import top_k
from moetrain.moe.types import Context, Router, Routing

_EPS = 1e-8


@config(group="router", name="sinkhorn")
class Sinkhorn(Router):
    """Rows and columns of exp(logits) are scaled in turn until the column scales move by less than ``tolerance`` on
    average, for at most ``iterations`` rounds. Needs no balance loss."""

    tolerance: float = 1e-4
    iterations: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance < 0:
            raise UserError(f"model.moe.router.tolerance={self.tolerance}: use 0 or more (0: always all iterations)")
        if self.iterations < 1:
            raise UserError(f"model.moe.router.iterations={self.iterations}: has to be at least 1 (try 50)")

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E) -> K experts per token. A bias is not used: scaling the columns would take it out again."""
        steering_TE = self._steering(logits_TE, ctx, group) if ctx.training else logits_TE
        return self.weigh(logits_TE, self.scores(logits_TE), top_k(steering_TE, self.top_k))

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """Of the normalized scores, as shares of a token's. That rounding decides how many rounds are run, where the
        scales stop moving just at ``tolerance``, is not in it."""
        steering_TE = self._steering(logits_TE, ctx, group) if ctx.training else self.scores(logits_TE)
        return ties.of_top_k(steering_TE / steering_TE.sum(-1, keepdim=True), self.top_k)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Sigmoid where one expert is chosen, else softmax, as Megatron has it."""
        return logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(-1)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        return Routing(logits_TE, scores_TE, ids_TK, scores_TE.gather(-1, ids_TK))

    def _steering(self, logits_TE: Tensor, ctx: Context, group: ProcessGroup | None) -> Tensor:
        logits_BPE, real_BP = sequences.whole(logits_TE, ctx=ctx, group=group)
        return sequences.mine(self._normalized(logits_BPE, real_BP), ctx=ctx, group=group)

    def _normalized(self, logits_BPE: Tensor, real_BP: Tensor) -> Tensor:
        """Each sequence's exp(logits), its rows summing to 1 / tokens and its columns to 1 / E; padding takes no part.

        A sequence that has settled stays as it is: no rank waits for another's, and none asks the device.
        """
        E = logits_BPE.shape[2]
        tokens_B1 = real_BP.sum(1, keepdim=True).clamp_min(1)
        # A row's largest is 1: what that divides a row by, its scale brings back.
        cost_BPE = (logits_BPE - logits_BPE.amax(2, keepdim=True)).exp()
        column_BE = torch.ones_like(cost_BPE[:, 0])
        row_BP, settled_B1 = torch.ones_like(cost_BPE[:, :, 0]), torch.zeros_like(tokens_B1, dtype=torch.bool)
        for _ in range(self.iterations):
            row = real_BP / (tokens_B1 * ((column_BE[:, None] * cost_BPE).sum(2) + _EPS))
            column = 1 / (E * ((row[:, :, None] * cost_BPE).sum(1) + _EPS))
            moved_B1 = (column - column_BE).abs().mean(1, keepdim=True)
            row_BP, column_BE = torch.where(settled_B1, row_BP, row), torch.where(settled_B1, column_BE, column)
            settled_B1 = settled_B1 | (moved_B1 < self.tolerance)
        return column_BE[:, None] * cost_BPE * row_BP[:, :, None]
