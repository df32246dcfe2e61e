"""Switch Transformer load-balancing loss (arXiv 2101.03961, eq. 4-6), over a micro-batch."""

from torch import Tensor

from moetrain import comm
from moetrain.config import config
from moetrain.moe.types import Balance, Routing, Tokens


@config(group="balance", name="switch")
class Switch(Balance):
    """E * sum_e f_e * sum_t P_te: f_e is the share of the micro-batch's assignments, P_te the normalized score.

    A micro-batch is ``train.micro_batch`` consecutive samples of the global batch: part of the run, not the layout.
    """

    coef: float = 0.01

    def loss(self, routing: Routing, tokens: Tokens) -> Tensor:
        """() float; equals the number of tokens when load is even."""
        load_E = comm.all_reduce_(routing.load_E.clone(), group=tokens.group)
        f_E = counted(load_E, routing) / load_E.sum().clamp_min(1)
        return load_E.numel() * (shares(routing, tokens.mask_T).sum(0) * f_E).sum()


def shares(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """(T, E) scores that sum to one over the experts (softmax scores already do), zero where padding.

    Those of zero-computation experts count by their weight (MoE++, arXiv 2410.07348).
    """
    P_TE = routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)
    if routing.zero_computation is not None:
        P_TE = routing.zero_computation.weighted(P_TE)
    return P_TE if mask_T is None else P_TE * mask_T[:, None]


def counted(load_XE: Tensor, routing: Routing) -> Tensor:
    """(..., E) int64 loads -> float, null experts with the mean of theirs (AdaMoE, arXiv 2406.13233)."""
    load_XE = load_XE.to(routing.scores_TE.dtype)
    return load_XE if routing.zero_computation is None else routing.zero_computation.levelled(load_XE)
