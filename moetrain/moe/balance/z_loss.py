"""Router z-loss: keep logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""

from torch import Tensor

from moetrain.config import config
from moetrain.moe.types import Balance, Routing, Tokens


@config(group="balance", name="z_loss")
class ZLoss(Balance):
    """sum_t logsumexp(logits_t)^2."""

    coef: float = 1e-3

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor:
        """() float."""
        z_T = routing.logits_TE.logsumexp(-1).square()
        return z_T.sum() if tokens.mask_T is None else (z_T * tokens.mask_T).sum()
