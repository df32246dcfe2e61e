"""Loss-free balancing: nudge a selection bias against the finished step's global load (arXiv 2408.15664, alg. 1)."""

from enum import Enum

from torch import Tensor

from moetrain.config import UserError, config
from moetrain.moe.types import Balance


class Update(Enum):
    sign = "sign"
    proportional = "proportional"


@config(group="balance", name="expert_bias")
class ExpertBias(Balance):
    """b_e += rate * sign(mean load - load_e), once a step, from int64 counts: exact and the same on every rank.

    ``proportional`` takes (mean load - load_e) / mean load in place of the sign (relative, so that a rate does not
    depend on the batch). Only the first ``until_step`` steps move the bias, 0 = all.
    """

    rate: float = 1e-3
    update: Update = Update.sign
    until_step: int = 0

    def __post_init__(self) -> None:
        if self.until_step < 0:
            raise UserError(
                f"model.moe.balance.expert_bias.until_step={self.until_step}: use 0 to move the bias in every step"
            )

    def bias(self, bias_E: Tensor, load_E: Tensor, *, step: int = 0) -> Tensor:
        """(E,), (E,) int64 -> (E,)."""
        if 0 < self.until_step <= step:
            return bias_E
        E = load_E.numel()
        lacking_E = load_E.sum() - E * load_E
        if self.update is Update.sign:
            return bias_E + self.rate * lacking_E.sign().to(bias_E.dtype)
        return bias_E + self.rate * lacking_E.to(bias_E.dtype) / load_E.sum().clamp_min(1)
