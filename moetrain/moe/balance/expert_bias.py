"""Loss-free balancing: nudge a selection bias against the finished step's global load (arXiv 2408.15664, alg. 1)."""

from torch import Tensor

from moetrain.config import config
from moetrain.moe.types import Balance


@config(group="balance", name="expert_bias")
class ExpertBias(Balance):
    """b_e += rate * sign(mean load - load_e), once a step, from int64 counts: exact and the same on every rank."""

    rate: float = 1e-3

    def bias(self, bias_E: Tensor, load_E: Tensor) -> Tensor:
        """(E,), (E,) int64 -> (E,)."""
        E = load_E.numel()
        return bias_E + self.rate * (load_E.sum() - E * load_E).sign().to(bias_E.dtype)
