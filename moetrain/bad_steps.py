"""Which steps are bad: a loss or gradient norm that is not finite, or far above those of late. They change nothing.

Each rank decides the same on its device, from two numbers that all ranks have: nobody waits to know.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config import UserError, config


@config
class BadStepsConfig:
    """A step is bad where its loss or gradient norm is not finite, or more than so many standard deviations above the
    mean of the last ``window`` good steps (as OLMo's SkipStepOptimizer has it), once half as many are known.

    A bad step is skipped: weights, optimizer and balance buffers stay, its samples count as seen. After
    ``rewind_after`` of them in a row the run goes back to its last checkpoint before them, and on without the samples
    of the bad steps; after ``rewinds`` of those in a life it gives up.
    """

    skip: bool = True  # false: a loss or norm that is not finite ends the run
    loss_spike: float = 0.0  # standard deviations; 0 = a spike is no bad step
    norm_spike: float = 0.0  # the same of the gradient norm
    window: int = 128
    rewind_after: int = 3  # 0 = never
    rewinds: int = 2
    replays: int = 1  # states before bad steps that a life keeps, for `moetrain replay`

    def __post_init__(self) -> None:
        for name in ("loss_spike", "norm_spike", "rewind_after", "rewinds", "replays"):
            if getattr(self, name) < 0:
                raise UserError(f"bad_steps.{name}={getattr(self, name)}: cannot be negative, 0 turns it off")
        if self.window < 2:
            raise UserError(f"bad_steps.window={self.window}: a deviation needs at least 2 steps")
        if not self.skip and (self.loss_spike or self.norm_spike):
            raise UserError(
                f"bad_steps.skip=false with loss_spike={self.loss_spike} norm_spike={self.norm_spike}: a spike can "
                f"only be skipped, set bad_steps.skip=true or both to 0"
            )


@dataclass(frozen=True)
class Verdict:
    """On the device, until somebody asks."""

    bad: Tensor  #     () bool
    values_2: Tensor  # (2,) float64: the step's global loss and gradient norm
    limits_2: Tensor  # (2,) float64: what they had to stay under


class Judge:
    """One rank's; all of them judge alike."""

    def __init__(self, cfg: BadStepsConfig, device: torch.device) -> None:
        self.cfg = cfg
        self.spikes = bool(cfg.loss_spike or cfg.norm_spike)
        deviations = [x or torch.inf for x in (cfg.loss_spike, cfg.norm_spike)]
        self.deviations_2 = torch.tensor(deviations, dtype=torch.float64, device=device)
        self.recent_2W = torch.zeros(2, cfg.window, dtype=torch.float64, device=device)
        self.seen = torch.zeros(1, dtype=torch.int64, device=device)  # good steps

    def __call__(self, loss: Tensor, norm: Tensor) -> Verdict:
        """() global loss and gradient norm of a step."""
        now_2 = torch.stack([loss.double(), norm.double()])
        limits_2 = self._limits() if self.spikes else torch.full_like(now_2, torch.inf)
        bad = ~(now_2.isfinite() & (now_2 <= limits_2)).all()
        if self.spikes:
            at = self.seen % self.cfg.window
            kept_2 = torch.where(bad, self.recent_2W.index_select(1, at)[:, 0], now_2)
            self.recent_2W.index_copy_(1, at, kept_2[:, None])
            self.seen += ~bad
        return Verdict(bad, now_2, limits_2)

    def _limits(self) -> Tensor:
        W = self.cfg.window
        count = self.seen.clamp(max=W)
        known_W = torch.arange(W, device=count.device) < count
        mean_2 = self.recent_2W.sum(1) / count.clamp(min=1)
        above_2W = (self.recent_2W - mean_2[:, None]) * known_W
        deviation_2 = (above_2W.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
        limits_2 = mean_2 + torch.where(self.deviations_2.isinf(), torch.inf, self.deviations_2 * deviation_2)
        return torch.where(count >= max(2, W // 2), limits_2, torch.inf)

    def state(self) -> dict[str, Any]:
        """JSON data; the host waits for it."""
        return {"seen": int(self.seen), "recent": self.recent_2W.tolist()} if self.spikes else {}

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave; of another window nothing is taken."""
        self.seen.zero_()
        self.recent_2W.zero_()
        recent_2W = torch.tensor(state.get("recent", []), dtype=torch.float64)
        if recent_2W.shape == self.recent_2W.shape:
            self.recent_2W.copy_(recent_2W)
            self.seen.fill_(state["seen"])
