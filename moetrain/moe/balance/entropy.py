"""Entropy loss: a token should be sure of few experts, which ``router=top_p`` needs (arXiv 2403.07652)."""

from torch import Tensor

from moetrain.config import config
from moetrain.moe.types import Balance, Routing, Tokens


@config(group="balance", name="entropy")
class Entropy(Balance):
    """-sum_t sum_e P_te log P_te, P = softmax(logits) whatever the router's scores are."""

    coef: float = 1e-4

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor:
        """() float."""
        log_P_TE = routing.logits_TE.log_softmax(-1)
        entropy_T = -(log_P_TE.exp() * log_P_TE).sum(-1)
        return entropy_T.sum() if tokens.mask_T is None else (entropy_T * tokens.mask_T).sum()
