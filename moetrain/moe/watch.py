"""What a layer notes beside its load in a step that somebody asks about: its largest logit, the pairs of its choices.

P = E (E - 1) / 2 pairs of experts i < j, at j (j - 1) / 2 + i
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.types import Routing


@dataclass(frozen=True)
class Watch:
    """A step's notes of one layer on this rank. Nothing is read from the device, nothing is communicated."""

    logit_M: Tensor  # (micro-batches,) largest absolute logit of real tokens; not a number where one of them is not
    pairs_P: Tensor  # (P,) int64 tokens that chose both experts, over the step's micro-batches; (0,) = not counted

    @classmethod
    def empty(cls, micro_batches: int, *, num_experts: int, pairs: bool, like: Tensor) -> "Watch":
        """``like``: a tensor of the logits' dtype, on their device."""
        P = num_experts * (num_experts - 1) // 2 if pairs else 0
        return cls(like.new_zeros(micro_batches), torch.zeros(P, dtype=torch.int64, device=like.device))

    @torch.no_grad()
    def note(self, m: int, routing: Routing, mask_T: Tensor | None, *, again: bool) -> None:
        """Micro-batch m. ``again``: it is computed again for backward, and its pairs have been counted."""
        logits_TE = routing.logits_TE
        if mask_T is not None:
            logits_TE = torch.where(mask_T[:, None], logits_TE, 0)
        least, most = logits_TE.aminmax()  # of both, a NaN is the result
        self.logit_M[m] = torch.maximum(-least, most)
        if not again and self.pairs_P.numel() and routing.ids_TK.shape[1] > 1:
            at_N = _pairs(routing.ids_TK, none=self.pairs_P.numel())
            counts = at_N.new_zeros(self.pairs_P.numel() + 1).scatter_add_(0, at_N, torch.ones_like(at_N))
            self.pairs_P.add_(counts[:-1])


def pair_at(place: int) -> tuple[int, int]:
    """The experts i < j of a place in ``Watch.pairs_P``."""
    j = (math.isqrt(8 * place + 1) + 1) // 2
    return place - j * (j - 1) // 2, j


def _pairs(ids_TK: Tensor, *, none: int) -> Tensor:
    """(T, K) expert ids, -1 = none -> (T * K (K - 1) / 2,) places of their pairs; ``none`` where one is missing."""
    first, second = torch.triu_indices(ids_TK.shape[1], ids_TK.shape[1], 1, device=ids_TK.device)
    a_TC, b_TC = ids_TK[:, first], ids_TK[:, second]
    i_TC, j_TC = torch.minimum(a_TC, b_TC), torch.maximum(a_TC, b_TC)
    return torch.where(i_TC < 0, none, j_TC * (j_TC - 1) // 2 + i_TC).flatten()
