"""Noisy top-k: training explores by choosing from disturbed logits; what experts are weighed by stays undisturbed.

Gumbel noise samples K experts without replacement, as if drawn from the softmax (Gumbel-top-k, arXiv 1903.06059);
multiplicative jitter is the Switch Transformer's (arXiv 2101.03961), here of logits rather than of inputs.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config
from moetrain.moe import draw, ties
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Context, Routing


@config(group="router", name="noisy_topk")
class NoisyTopK(TopK):
    """Top-k of logits * U(1 - ``jitter``, 1 + ``jitter``) + ``gumbel`` * Gumbel(0, 1); 0 leaves either out.

    A draw is a function of (seed, step, layer, global sample, position, expert), so that every layout chooses alike.
    """

    gumbel: float = 1.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gumbel < 0:
            raise UserError(f"model.moe.router.gumbel={self.gumbel}: noise cannot be negative, use 0 for none")
        if not 0 <= self.jitter < 1:
            raise UserError(f"model.moe.router.jitter={self.jitter}: has to be in [0, 1), 0 for none (try 0.01)")
        if self.gumbel == self.jitter == 0:
            raise UserError(
                "model.moe.router.gumbel=0 with jitter=0 is no noise: set one of them above 0, or use router=topk"
            )

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E), (E,) -> K experts per token; held-out data is routed without noise."""
        steering_TE = self._steering(logits_TE.detach(), ctx, layer)
        return self.weigh(logits_TE, self.scores(logits_TE), self.choose(steering_TE, bias_E))

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """Of the disturbed scores."""
        return ties.of_top_k(self._steering(logits_TE.detach(), ctx, layer) + bias_E, self.top_k)

    def _steering(self, logits_TE: Tensor, ctx: Context, layer: int) -> Tensor:
        return self.scores(self._disturbed(logits_TE, ctx, layer) if ctx.training else logits_TE)

    def _disturbed(self, logits_TE: Tensor, ctx: Context, layer: int) -> Tensor:
        def uniform_TE(what: str) -> Tensor:
            return draw.uniform(
                ctx, what, ctx.step, layer, num_experts=logits_TE.shape[1], device=logits_TE.device
            )  # fmt: skip

        if self.jitter:
            logits_TE = logits_TE * (1 + self.jitter * (2 * uniform_TE("jitter") - 1)).to(logits_TE.dtype)
        if self.gumbel:
            logits_TE = logits_TE - self.gumbel * uniform_TE("gumbel").log().neg().log().to(logits_TE.dtype)
        return logits_TE
