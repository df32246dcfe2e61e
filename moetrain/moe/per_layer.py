"""Numbers that differ from MoE layer to MoE layer, and how many experts a token takes while training goes on.

A pyramid has more experts in later layers (PR-MoE, arXiv 2201.05596). Progressive sparsification has tokens take more
experts at first in the first layers, where load is the hardest to balance (Sigma-MoE-Tiny, arXiv 2512.16248).
"""

from dataclasses import field

from moetrain.config import UserError, config


@config
class PerLayer:
    """A number for each MoE layer, in order: ``experts`` in place of num_experts, ``top_k`` of the router's; [] = that.

    In steps before ``early_steps`` the first layers have ``early_top_k`` instead, a number for each of them.
    """

    experts: list[int] = field(default_factory=list)
    top_k: list[int] = field(default_factory=list)
    early_top_k: list[int] = field(default_factory=list)
    early_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "early_top_k"):
            if any(n < 1 for n in getattr(self, name)):
                raise UserError(f"model.moe.per_layer.{name}={getattr(self, name)}: each has to be at least 1")
        if self.early_steps < 0 or bool(self.early_steps) != bool(self.early_top_k):
            raise UserError(
                f"model.moe.per_layer.early_steps={self.early_steps} with early_top_k={self.early_top_k}: set both, "
                f"the steps at least 1, or neither"
            )

    def check(self, *, num_layers: int, num_experts: int, top_k: int, extra: int = 0) -> None:
        """Raise ``UserError`` where the numbers do not fit ``num_layers`` MoE layers, or exceed a layer's experts.

        ``extra`` experts more to choose from, of zero computation, are in every layer.
        """
        for name in ("experts", "top_k"):
            if (found := getattr(self, name)) and len(found) != num_layers:
                raise UserError(
                    f"model.moe.per_layer.{name}={found} has {len(found)} numbers: the model has {num_layers} MoE "
                    f"layers, give one for each or [] for the same in all"
                )
        if len(self.early_top_k) > num_layers:
            raise UserError(
                f"model.moe.per_layer.early_top_k={self.early_top_k} has {len(self.early_top_k)} numbers for "
                f"{num_layers} MoE layers: give at most one for each"
            )
        for i in range(num_layers):
            experts = extra + (self.experts[i] if self.experts else num_experts)
            most = max([self.top_k[i] if self.top_k else top_k, *self.early_top_k[i : i + 1]])
            if most > experts:
                raise UserError(
                    f"model.moe.per_layer: MoE layer number {i} would have top-{most} of {experts} experts: "
                    f"use 1 to {experts}"
                )
