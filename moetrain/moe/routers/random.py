"""Random routing: every token keeps experts that its place in the data decides, of which more and more are used.

SMoE-Dropout (arXiv 2303.01610) routes by frozen random weights and lets the number of experts grow; here the choice is
a hash instead, and the gate learns only how to weigh what was chosen.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config
from moetrain.moe import draw
from moetrain.moe.routers.topk import top_k
from moetrain.moe.types import Context, Router, Routing


@config(group="router", name="random")
class Random(Router):
    """k grows linearly from ``k_min`` to ``top_k`` over the first ``until_step`` steps, 0 = ``top_k`` from the start.

    ``balanced``: token t takes experts (t * K + j) % E instead, t = global sample + position: exactly even load, for
    benchmarks. No balance term has anything to say in either.
    """

    k_min: int = 1
    until_step: int = 0
    balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k_min <= self.top_k:
            raise UserError(
                f"model.moe.router.k_min={self.k_min} with top_k={self.top_k}: k grows from k_min to top_k, "
                f"use 1 to {self.top_k}"
            )
        if self.until_step < 0:
            raise UserError(f"model.moe.router.until_step={self.until_step}: use 0 for top_k from the first step on")

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E) -> Routing of (T, k) ids, k = K after ``until_step``. A bias has nothing to steer."""
        E, device, k = logits_TE.shape[1], logits_TE.device, self.used(ctx.step)
        if self.balanced:
            token_T1 = (ctx.sample_B.to(device)[:, None] + ctx.position_S.to(device)).view(-1, 1)
            ids_TK = (token_T1 * k + torch.arange(k, device=device)) % E
        else:
            ids_TK = top_k(draw.uniform(ctx, "random", layer, num_experts=E, device=device), k)
        return self.weigh(logits_TE, self.scores(logits_TE), ids_TK)

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """No score decides anything."""
        return torch.full_like(logits_TE, torch.inf)

    def used(self, step: int) -> int:
        """k of a step: round(k_min + (top_k - k_min) * step / until_step), halves up."""
        if step >= self.until_step:
            return self.top_k
        return self.k_min + (2 * (self.top_k - self.k_min) * step + self.until_step) // (2 * self.until_step)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        """Weights are the softmax over the chosen logits."""
        return Routing(logits_TE, scores_TE, ids_TK, logits_TE.gather(-1, ids_TK).softmax(-1))
