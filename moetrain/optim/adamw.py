"""AdamW (arXiv 1711.05101) on local shards: torch's fused kernel, or the same by hand where the state is narrower."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moetrain.optim.config import OptimConfig


class AdamW:
    """``params`` are names -> storage that is updated in place; ``decays`` tells by name. Frozen ones only have state.

    The fused kernel wants state of the weights' dtype. Narrower state is widened, used and then rounded to nearest,
    element by element: the update itself sees what is not rounded yet.
    """

    def __init__(self, cfg: OptimConfig, params: dict[str, Tensor], *, decays: Callable[[str], bool]) -> None:
        self.cfg, self.decays = cfg, decays
        self.steps: int | Tensor = 0  # updates that the state has seen; on a GPU where some may be skipped, there
        moving = {name: storage for name, storage in params.items() if not cfg.frozen(name)}
        self.leaves = {name: nn.Parameter(storage) for name, storage in moving.items()}  # shares the storage
        dtypes = {name: p.dtype if cfg.state_dtype is None else cfg.state_dtype.torch for name, p in params.items()}
        first, second = ({n: torch.zeros_like(p, dtype=dtypes[n]) for n, p in params.items()} for _ in range(2))
        self.averages = {"exp_avg": first, "exp_avg_sq": second}
        self.fused = None
        if self.leaves and all(dtypes[name] == p.dtype for name, p in moving.items()):
            self.fused = self._make_fused()

    def replace(self, name: str, storage: Tensor) -> None:
        """From now on the parameter lies in ``storage``; then call ``moved``."""
        if name in self.leaves:
            self.leaves[name] = nn.Parameter(storage)

    def moved(self) -> None:
        if self.fused is not None:
            self.fused = self._make_fused()
            self._tell_steps()

    def _make_fused(self) -> torch.optim.AdamW:
        cfg = self.cfg
        decayed = [p for name, p in self.leaves.items() if self.decays(name)]
        others = [p for name, p in self.leaves.items() if not self.decays(name)]
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (cfg.beta1, cfg.beta2)
        fused = torch.optim.AdamW([g for g in groups if g["params"]], cfg.lr, betas, cfg.eps, fused=True)
        for name, p in self.leaves.items():  # made now: a checkpoint is loaded into it in place
            fused.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            fused.state[p] |= {kind: averages[name] for kind, averages in self.averages.items()}
        return fused

    def step(self, grads: dict[str, Tensor], *, lr: float, scale: Tensor | None, skip: Tensor | None = None) -> None:
        """The fused kernel scales float32 gradients as it reads them; all others are scaled in place.

        Where ``skip``, () bool, is true, nothing changes; the host does not wait to know.
        """
        self.steps = self.steps + (1 if skip is None else 1 - skip.double())
        values = [grads[name] for name in self.leaves]
        kernel_scales = self.fused is not None and values[0].dtype is torch.float32
        if scale is not None and values and not kernel_scales:  # the kernel's factor is float32, too coarse for float64
            torch._foreach_mul_(values, scale.to(values[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
        if self.fused is None:
            for name, g in zip(self.leaves, values, strict=True):
                now = [self.leaves[name].detach(), *(averages[name] for averages in self.averages.values())]
                before = [] if skip is None else [x.clone() for x in now]
                self._update(name, g, lr)
                for x, was in zip(now, before, strict=False):
                    x.copy_(torch.where(skip, was, x))  # pyright: ignore[reportCallIssue, reportArgumentType]
            return
        if scale is not None and kernel_scales:
            self.fused.grad_scale = scale.reciprocal().float()  # pyright: ignore[reportAttributeAccessIssue]
        if skip is not None:
            self.fused.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
        for group in self.fused.param_groups:
            group["lr"] = lr
        for name, p in self.leaves.items():
            p.grad = grads[name]
        self.fused.step()
        self.fused.zero_grad()

    def _update(self, name: str, g: Tensor, lr: float) -> None:
        cfg, p = self.cfg, self.leaves[name].detach()
        first, second = (averages[name] for averages in self.averages.values())
        m = first.to(p.dtype).lerp_(g, 1 - cfg.beta1)
        v = second.to(p.dtype).mul_(cfg.beta2).addcmul_(g, g, value=1 - cfg.beta2)
        first.copy_(m)
        second.copy_(v)
        if self.decays(name):
            p.mul_(1 - lr * cfg.weight_decay)
        size = v.div_(1 - cfg.beta2**self.steps).sqrt_().add_(cfg.eps)
        if isinstance(self.steps, Tensor):
            p.sub_(m.mul_(lr / (1 - cfg.beta1**self.steps)).div_(size))
        else:
            p.addcdiv_(m, size, value=-lr / (1 - cfg.beta1**self.steps))

    def set_steps(self, steps: int) -> None:
        self.steps = steps
        self._tell_steps()

    def _tell_steps(self) -> None:
        if self.fused is not None:
            for p in self.leaves.values():
                self.fused.state[p]["step"].fill_(self.steps)
