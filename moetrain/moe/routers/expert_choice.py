"""Expert-choice routing: each expert takes its best tokens, so that load is even by construction (arXiv 2202.09368).

Whether a token is taken depends on later tokens of its sequence. A language model can read the future from that (arXiv
2408.15664), in held-out loss too, and cannot generate as it was trained: it has to be asked for.
"""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config
from moetrain.moe import sequences, ties
from moetrain.moe.types import Context, Router, Routing

_LAST = torch.iinfo(torch.int64).min


@config(group="router", name="expert_choice")
class ExpertChoice(Router):
    """Of each sequence of S tokens an expert takes c = ceil(``factor`` * S * K / E), padding not counted.

    ``top_k`` is a token's average at ``factor`` 1; some have none, some up to E.
    """

    factor: float = 1.0
    non_causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor <= 0:
            raise UserError(f"model.moe.router.factor={self.factor}: has to be above 0 (1: top_k experts a token)")

    @property
    def tokens_choose(self) -> bool:
        return False

    def check(self, *, num_experts: int) -> None:
        if not self.non_causal:
            raise UserError(
                "router=expert_choice with model.moe.router.non_causal=false: choices depend on later tokens, so that "
                "a causal model leaks the future into its loss; use router=topk with balance=[expert_bias], or set "
                "model.moe.router.non_causal=true if that is what you study"
            )

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E) -> ids (T, E): e or -1. Ties go to the earlier position; a bias changes no order of tokens."""
        E, scores_TE = logits_TE.shape[1], self.scores(logits_TE)
        _, taken_BPE = self._taken(scores_TE, ctx, group)
        taken_TE = sequences.mine(taken_BPE, ctx=ctx, group=group)
        ids_TE = torch.where(taken_TE, torch.arange(E, device=taken_TE.device), -1)
        return self.weigh(logits_TE, scores_TE, ids_TE)

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """Of the scores' logarithms, among the tokens of the sequence."""
        keys_BPE, taken_BPE = self._taken(self.scores(logits_TE), ctx, group)
        return sequences.mine(ties.of_places(keys_BPE, taken_BPE, steps=sequences.STEPS), ctx=ctx, group=group)

    def _taken(self, scores_TE: Tensor, ctx: Context, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """(B, P, E) int64 what tokens of whole sequences are taken by, and bool whether they are."""
        scores_BPE, real_BP = sequences.whole(scores_TE, ctx=ctx, group=group)
        keys_BPE = sequences.steps(scores_BPE).masked_fill(~real_BP[:, :, None], _LAST)
        place_BPE = sequences.places(keys_BPE)
        E = scores_BPE.shape[2]
        if ctx.mask_BS is None:
            taken_BPE = place_BPE < math.ceil(self.factor * place_BPE.shape[1] * self.top_k / E)
        else:
            take_B = torch.ceil(self.factor * real_BP.sum(1).double() * self.top_k / E)
            taken_BPE = (place_BPE < take_B[:, None, None]) & real_BP[:, :, None]
        return keys_BPE, taken_BPE

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        """Weights are the scores of those that took the token."""
        weights_TK = scores_TE.gather(-1, ids_TK.clamp_min(0)).masked_fill(ids_TK < 0, 0)
        return Routing(logits_TE, scores_TE, ids_TK, weights_TK, ragged=True)
