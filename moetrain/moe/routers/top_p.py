"""Top-p routing: a token takes as many experts as it needs to be sure (arXiv 2403.07652)."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config
from moetrain.moe.routers.topk import top_k
from moetrain.moe.types import Context, Router, Routing


@config(group="router", name="top_p")
class TopP(Router):
    """The fewest experts whose softmax scores, highest first, sum to more than ``p``: at least 1, at most ``top_k``.

    Weights are the scores as they are. Nothing here keeps a token from being sure of nothing: use the balance term
    ``entropy``.
    """

    top_k: int = 4
    p: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p < 1:
            raise UserError(
                f"model.moe.router.p={self.p}: scores sum to 1, so p has to be above 0 and below 1 (try 0.4)"
            )

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E), (E,) -> ids (T, K), -1 after a token's last. The bias steers the order, not the sum."""
        scores_TE = self.scores(logits_TE)
        ids_TK, summed_TK = self._summed(scores_TE, bias_E)
        enough_TK = torch.nn.functional.pad(summed_TK[:, :-1] > self.p, (1, 0))  # before this one
        return self.weigh(logits_TE, scores_TE, ids_TK.masked_fill(enough_TK, -1))

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """Of all of a token's experts alike: how near two of its best are, or a sum of them is to ``p``."""
        scores_TE = self.scores(logits_TE.detach())
        _, summed_TK = self._summed(scores_TE, bias_E)
        ordered_TK = (scores_TE + bias_E).sort(-1, descending=True).values[:, : self.top_k + 1]
        near_TK = torch.cat([(summed_TK[:, :-1] - self.p).abs(), -ordered_TK.diff()], 1)
        if not near_TK.shape[1]:
            return torch.full_like(logits_TE, torch.inf)
        return near_TK.amin(1, keepdim=True).expand_as(logits_TE)

    def _summed(self, scores_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        ids_TK = top_k(scores_TE + bias_E, self.top_k)
        return ids_TK, scores_TE.detach().gather(-1, ids_TK).cumsum(-1)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        weights_TK = scores_TE.gather(-1, ids_TK.clamp_min(0)).masked_fill(ids_TK < 0, 0)
        return Routing(logits_TE, scores_TE, ids_TK, weights_TK, ragged=True)
