"""Group-limited routing: a token chooses among the experts of its best few groups, so that it travels to few nodes.

DeepSeek-V2 (arXiv 2405.04434) takes a group by its best expert, DeepSeek-V3 (arXiv 2412.19437) by the sum of its best
top_k / max_groups. Groups are runs of consecutive expert ids: part of the model, not of the layout.
Letters: G groups, M of which are taken, X experts of a group.
"""

from enum import Enum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config
from moetrain.kernels import routing
from moetrain.layouts import divisors
from moetrain.moe import ties
from moetrain.moe.routers.topk import TopK, top_k
from moetrain.moe.types import Context


class GroupScore(Enum):
    sum = "sum"
    max = "max"


@config(group="router", name="group_limited")
class GroupLimited(TopK):
    """Experts come from at most ``max_groups`` of ``num_groups`` groups."""

    num_groups: int = 4
    max_groups: int = 2
    group_score: GroupScore = GroupScore.sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups < 1:
            raise UserError(f"model.moe.router.num_groups={self.num_groups}: has to be at least 1")
        if not 1 <= self.max_groups <= self.num_groups:
            raise UserError(
                f"model.moe.router.max_groups={self.max_groups} of num_groups={self.num_groups}: "
                f"use 1 to {self.num_groups}"
            )

    def check(self, *, num_experts: int) -> None:
        if num_experts % self.num_groups:
            raise UserError(
                f"model.moe.router.num_groups={self.num_groups} does not divide model.moe.num_experts={num_experts}: "
                f"use one of {divisors(num_experts)}"
            )
        within = num_experts // self.num_groups * self.max_groups
        if self.top_k > within:
            raise UserError(
                f"model.moe.router.top_k={self.top_k} is more than the {within} experts of max_groups="
                f"{self.max_groups} groups of {num_experts // self.num_groups}: raise max_groups or lower top_k"
            )
        if self.fused and (best := self._best(num_experts // self.num_groups)) > 2:
            raise UserError(
                f"model.moe.router.fused=true with group_score=sum of a group's best {best} (top_k={self.top_k} / "
                f"max_groups={self.max_groups}): the kernel adds up 2 at most; use fused=false"
            )

    def choose(self, steering_TE: Tensor, bias_E: Tensor) -> Tensor:
        """(T, E), (E,) -> (T, K) ids; groups are chosen by biased scores too (ties: the lower group)."""
        if self.fused:
            best = self._best(steering_TE.shape[1] // self.num_groups)
            groups = routing.Groups(self.num_groups, self.max_groups, best)
            return routing.choose(steering_TE, bias_E, self.top_k, groups=groups)
        steered_TE, _ = self._steered(steering_TE.detach() + bias_E)
        return top_k(steered_TE, self.top_k)

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """Of an expert within its groups, or of the groups where that is nearer."""
        steered_TE, groups_TG = self._steered(self.scores(logits_TE.detach()) + bias_E)
        between_T1 = ties.of_top_k(groups_TG, self.max_groups).amin(1, keepdim=True)
        return torch.minimum(ties.of_top_k(steered_TE, self.top_k), between_T1)

    def _steered(self, steered_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(T, E), of what is not in a token's groups -inf; (T, G) what groups are chosen by."""
        steered_TGX = steered_TE.unflatten(1, (self.num_groups, -1))
        best = self._best(steered_TGX.shape[2])
        score_TG = steered_TGX.topk(best, dim=2).values.sum(2)
        groups_TM = top_k(score_TG, self.max_groups)
        allowed_TG1 = torch.zeros_like(steered_TGX[:, :, 0], dtype=torch.bool).scatter_(1, groups_TM, True)[:, :, None]
        return steered_TGX.masked_fill(~allowed_TG1, -torch.inf).flatten(1), score_TG

    def _best(self, group_size: int) -> int:
        """How many of a group's experts speak for it; top_k / max_groups is rounded up."""
        return 1 if self.group_score is GroupScore.max else min(group_size, -(-self.top_k // self.max_groups))
