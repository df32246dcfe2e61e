"""Replay routing: somebody else's choices with one's own weights, for comparing two runs past a near-tie."""

import dataclasses
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import UserError, config, replace
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Context, Router, Routing, taken


@config(group="router", name="replay")
class Replay(TopK):
    """``path`` is a file that ``save_choices`` wrote; weights and gradients are this run's own.

    They are weighed as ``inner`` would weigh them, whose own choices are noted beside; without one, as top-k does.
    """

    path: str = ""
    inner: Router | None = None

    def taking(self, top_k: int) -> "Replay":
        return replace(self, top_k=top_k, inner=None if self.inner is None else self.inner.taking(top_k))

    def check(self, *, num_experts: int) -> None:
        if self.inner is not None:
            self.inner.check(num_experts=num_experts)

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Routing:
        """(T, E) -> Routing with the recorded ids of (step, layer, sample); raises ``UserError`` where none is."""
        table, first, steps = _read(self.path, _changed(self.path))
        if f"{ctx.step}.{layer}" not in table:
            raise UserError(
                f"model.moe.router.path={self.path}: holds no choices for step {ctx.step}, layer {layer} "
                f"(it has steps {steps}): record that step or stop before it"
            )
        ids_BSK = table[f"{ctx.step}.{layer}"].to(logits_TE.device, torch.int64)
        row_B = ctx.sample_B.to(logits_TE.device) - first[ctx.step]
        position_S = ctx.position_S.to(logits_TE.device).clamp_max(ids_BSK.shape[1] - 1)  # later ones are padding
        ids_TK = ids_BSK[row_B][:, position_S].flatten(0, 1)
        if self.inner is not None:
            own = self.inner(logits_TE.detach(), bias_E, ctx=ctx, layer=layer, group=group)
            scores_TE = self.scores(logits_TE)
            if (ids_BSK < 0).any() and not own.ragged:  # of tokens that were rounded
                taken_TE = taken(ids_TK, num_experts=logits_TE.shape[1])
                return dataclasses.replace(self.weigh_any(logits_TE, scores_TE, taken_TE), own_TK=own.ids_TK)
            return dataclasses.replace(self.weigh(logits_TE, scores_TE, ids_TK), own_TK=own.ids_TK)
        if ids_TK.shape[1] != self.top_k:
            raise UserError(
                f"{self.path} was recorded with top_k={ids_TK.shape[1]}, model.moe.router.top_k={self.top_k}"
            )
        return self.weigh(logits_TE, self.scores(logits_TE), ids_TK)

    def margins(
        self, logits_TE: Tensor, bias_E: Tensor, *, ctx: Context, layer: int, group: ProcessGroup | None = None
    ) -> Tensor:
        """Of ``inner``'s own choices."""
        by = super() if self.inner is None else self.inner
        return by.margins(logits_TE, bias_E, ctx=ctx, layer=layer, group=group)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return super().scores(logits_TE) if self.inner is None else self.inner.scores(logits_TE)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Routing:
        by = super() if self.inner is None else self.inner
        return by.weigh(logits_TE, scores_TE, ids_TK)


def save_choices(path: Path, choices: dict[int, dict[int, Tensor]], *, first_sample: dict[int, int]) -> None:
    """Write step -> layer -> (samples, S, K) ids, samples counted from ``first_sample`` of that step."""
    tensors = {
        f"{step}.{layer}": ids.to(torch.int32) for step, layers in choices.items() for layer, ids in layers.items()
    }
    tensors |= {f"{step}.first": torch.tensor(first) for step, first in first_sample.items()}
    save_file(tensors, path)


def _changed(path: str) -> int:
    """When the file was written: another recording under the same name is read again."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


@cache
def _read(path: str, changed: int) -> tuple[dict[str, Tensor], dict[int, int], list[int]]:
    try:
        table = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"model.moe.router.path={path!r} cannot be read ({e}): give a file of recorded choices") from e
    first = {int(k.split(".")[0]): int(v) for k, v in table.items() if k.endswith(".first")}
    return table, first, sorted(first)
