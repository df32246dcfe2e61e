"""Sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20): even load within each sequence."""

from moetrain.config import config
from moetrain.moe.balance.switch import Scope, Switch


@config(group="balance", name="sequence")
class Sequence(Switch):
    """E * sum_b sum_e f_be * sum_(t in b) P_te, f_be the share of sequence b's assignments that went to e.

    ``switch`` with another scope, and so a term of its own, to have beside it.
    """

    coef: float = 1e-4
    scope: Scope = Scope.sequence
