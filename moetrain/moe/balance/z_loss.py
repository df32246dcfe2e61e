"""Router z-loss: keep logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""

from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import config
from moetrain.moe.types import Balance, Routing


@config(group="balance", name="z_loss")
class ZLoss(Balance):
    """sum_t logsumexp(logits_t)^2."""

    coef: float = 1e-3

    def loss(
        self, routing: Routing, *, num_sequences: int, mask_T: Tensor | None, group: ProcessGroup | None
    ) -> Tensor:
        """() float."""
        z_T = routing.logits_TE.logsumexp(-1).square()
        return z_T.sum() if mask_T is None else (z_T * mask_T).sum()
