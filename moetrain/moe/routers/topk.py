"""Token-choice routing: each token takes its K highest scores (softmax: arXiv 1701.06538; sigmoid: 2412.19437)."""

from enum import Enum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config
from moetrain.kernels import routing
from moetrain.moe.types import Context, Router, Routing


class Score(Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


@config(group="router", name="topk")
class TopK(Router):
    """``renormalize`` divides the K chosen weights by their sum; ``scale`` multiplies them afterwards."""

    score: Score = Score.softmax
    renormalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1 and self.renormalize:
            raise UserError(
                "model.moe.router.top_k=1 with renormalize=true: the one weight is always 1, so that the gate would "
                "learn nothing from the loss; set model.moe.router.renormalize=false"
            )

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E), (E,) -> K experts per token. The bias steers the choice, never the mixing weight."""
        scores_TE = self.scores(logits_TE)
        return self.weigh(logits_TE, scores_TE, self.choose(scores_TE, bias_E))

    def choose(self, steering_TE: Tensor, bias_E: Tensor) -> Tensor:
        """(T, E), (E,) -> (T, K) ids of the highest sums."""
        if self.fused:
            return routing.choose(steering_TE, bias_E, self.top_k)
        return top_k(steering_TE + bias_E, self.top_k)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1) if self.score is Score.softmax else logits_TE.sigmoid()

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        if self.fused:
            weights_TK = routing.weigh(scores_TE, ids_TK, normed=self.renormalize, scale=self.scale)
            return Routing(logits_TE, scores_TE, ids_TK, weights_TK)
        weights_TK = scores_TE.gather(-1, ids_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(logits_TE, scores_TE, ids_TK, weights_TK * self.scale if self.scale != 1.0 else weights_TK)


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """(T, E) -> (T, k) ids, highest first; ties go to the lower expert id (torch.topk promises no order)."""
    if k > 2:
        return scores_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    first_T1 = scores_TE.detach().argmax(-1, keepdim=True)  # argmax returns the first of equal maxima
    if k == 1:
        return first_T1
    rest_TE = scores_TE.detach().scatter(-1, first_T1, -torch.inf)
    return torch.cat([first_T1, rest_TE.argmax(-1, keepdim=True)], -1)
