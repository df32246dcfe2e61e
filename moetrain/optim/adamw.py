"""AdamW (arXiv 1711.05101) on local shards, by one of three that compute the same: ``AdamW.words`` says which and why.

torch's fused kernel    where weights, gradients and averages have one dtype
pieces.py               where some are narrower: torch's operations, piece by piece
triton_adamw.py         the same in one kernel, where it is asked for
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config import UserError
from moetrain.kernels import fused as triton
from moetrain.logical import Logical
from moetrain.optim import rounding
from moetrain.optim.config import OptimConfig, UpdateKernel
from moetrain.optim.pieces import Constants, Pieces


class AdamW:
    """``params`` are names -> storage that is updated in place; ``decays`` tells by name. Frozen ones only have state.

    Weights and averages that are narrower than what is computed in are widened, used, and rounded as they are stored:
    averages to nearest, weights stochastically (``rounding.py``), by ``seed``, the step and where ``describe`` says
    that they lie. The update itself sees what is not rounded yet.
    """

    def __init__(
        self, cfg: OptimConfig, params: dict[str, Tensor], *, decays: Callable[[str], bool],
        describe: Callable[[str, Tensor], Logical], seed: int,
    ) -> None:  # fmt: skip
        self.cfg, self.decays, self.describe, self.seed = cfg, decays, describe, seed
        self.steps: int | Tensor = 0  # updates that the state has seen; on a GPU where some may be skipped, there
        self.params = {name: storage for name, storage in params.items() if not cfg.frozen(name)}
        dtypes = {name: cfg.dtype_of_state(p.dtype) for name, p in params.items()}
        first, second = ({n: torch.zeros_like(p, dtype=dtypes[n]) for n, p in params.items()} for _ in range(2))
        self.averages = {"exp_avg": first, "exp_avg_sq": second}
        self.rounds = any(p.dtype is torch.bfloat16 for p in params.values())
        narrow = self.rounds or any(dtypes[name] != p.dtype for name, p in params.items())
        self.words = "AdamW: torch's fused kernel"
        if cfg.kernel is UpdateKernel.triton:
            if why := self._unfit():
                raise UserError(f"optim.kernel=triton: {why}; use optim.kernel=auto")
            self.words = "AdamW: triton, asked for" + ", interpreted" * triton.interpreted()
        elif narrow:
            self.words = "AdamW: torch, piece by piece"
        self.by_torch = cfg.kernel is not UpdateKernel.triton and not narrow
        self.moved()

    def _unfit(self) -> str | None:
        """Why the Triton kernel cannot update this, or None."""
        if not self.params:
            return None
        first = next(iter(self.params.values()))
        return triton.unfit_at(first.device) or (
            "the Triton kernel does not update float64" if first.dtype is torch.float64 else None
        )

    def replace(self, name: str, storage: Tensor) -> None:
        """From now on the parameter lies in ``storage``; then call ``moved``."""
        if name in self.params:
            self.params[name] = storage

    def moved(self) -> None:
        self.fused: torch.optim.AdamW | None = None
        self.pieces: Pieces | None = None
        if not self.params:
            return
        if self.by_torch:
            self.fused = self._make_fused()
            self._tell_steps()
            return
        self.runs = {name: rounding.runs(self.describe(name, p), p) for name, p in self.params.items()}
        if self.cfg.kernel is not UpdateKernel.triton:
            self.pieces = Pieces(self.cfg, self.params, self.averages, self.runs, decays=self.decays)

    def _make_fused(self) -> torch.optim.AdamW:
        cfg = self.cfg
        self.leaves = {name: nn.Parameter(storage) for name, storage in self.params.items()}  # shares the storage
        decayed = [p for name, p in self.leaves.items() if self.decays(name)]
        others = [p for name, p in self.leaves.items() if not self.decays(name)]
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (cfg.beta1, cfg.beta2)
        fused = torch.optim.AdamW([g for g in groups if g["params"]], cfg.lr, betas, cfg.eps, fused=True)
        for name, p in self.leaves.items():  # made now: a checkpoint is loaded into it in place
            fused.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            fused.state[p] |= {kind: averages[name] for kind, averages in self.averages.items()}
        return fused

    def step(
        self, grads: dict[str, Tensor], *, lr: float, scale: Tensor | None, skip: Tensor | None = None,
        step: int | None = None,
    ) -> None:  # fmt: skip
        """Gradients are scaled as they are read, or in place. ``step``, of the run: needed where weights are rounded.

        Where ``skip``, () bool, is true, nothing changes; the host does not wait to know.
        """
        self.steps = self.steps + (1 if skip is None else 1 - skip.double())
        grads = {name: grads[name] for name in self.params}
        if self.fused is not None:
            self._step_fused(self.fused, grads, lr=lr, scale=scale, skip=skip)
        elif grads:
            constants, keys = Constants.of(self.cfg, lr=lr, steps=self.steps), {}
            if self.rounds:
                assert step is not None, "which step it is decides how weights are rounded"
                keys = {name: rounding.key(self.seed, step, name) for name in self.params}
            if self.pieces is not None:
                self.pieces.step(grads, constants, scale=scale, skip=skip, keys=keys)
            else:
                self._step_triton(grads, constants, scale=scale, skip=skip, keys=keys)

    def _step_triton(self, grads: dict[str, Tensor], constants: Constants, *, keys: dict[str, int], **on: Any) -> None:
        from moetrain.kernels import triton_adamw  # Triton takes a while to import, and may not be there

        like = next(iter(grads.values()))
        known = triton_adamw.constants(like, size=constants.size, eps=constants.eps, **on)
        first, second = self.averages.values()
        for name, p in self.params.items():
            g, decay = grads[name].contiguous(), constants.decay if self.decays(name) else 1.0
            for run in self.runs[name]:
                triton_adamw.update(
                    p, g, first[name], second[name], known, run=run, key=keys.get(name),
                    decay=decay, beta1=self.cfg.beta1, beta2=self.cfg.beta2,
                )  # fmt: skip

    def _step_fused(
        self, fused: torch.optim.AdamW, grads: dict[str, Tensor], *, lr: float, scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:  # fmt: skip
        """The kernel scales float32 gradients as it reads them; its factor is float32, too coarse for float64."""
        values: Any = list(grads.values())
        if scale is not None and values[0].dtype is not torch.float32:
            torch._foreach_mul_(values, scale.to(values[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
        elif scale is not None:
            fused.grad_scale = scale.reciprocal().float()  # pyright: ignore[reportAttributeAccessIssue]
        if skip is not None:
            fused.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
        for group in fused.param_groups:
            group["lr"] = lr
        for name, p in self.leaves.items():
            p.grad = grads[name]
        fused.step()
        fused.zero_grad()

    def set_steps(self, steps: int) -> None:
        self.steps = steps
        self._tell_steps()

    def _tell_steps(self) -> None:
        if self.fused is not None:
            for p in self.leaves.values():
                self.fused.state[p]["step"].fill_(self.steps)
