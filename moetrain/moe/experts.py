"""Expert weights of this rank's slots, and the grouped SwiGLU over slot-sorted rows."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain import kernels
from moetrain.kernels import Backend
from moetrain.moe.travel import Replicas
from moetrain.moe.types import Rows


class Experts(nn.Module):
    """Weights of the experts this rank owns, stacked on dim 0 in slot order; which experts those are is a Placement."""

    rerun_activation: bool = False  # in backward, rather than keep it
    compiled: bool = False  # what is between the matmuls, of backends that have it apart
    replicas: Replicas | None = None  # what is computed with, where some experts travel; None: what is owned
    calibrated: tuple[Replicas, ...] = ()  # the same of single micro-batches that have their own

    def __init__(self, num_owned: int, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_owned, 2, hidden, dim))
        self.down = nn.Parameter(torch.empty(num_owned, dim, hidden))

    @property
    def sent(self) -> int:
        """Bytes of experts and of their gradients that this rank has sent in the step."""
        return sum(x.sent for x in (self.replicas, *self.calibrated) if x is not None)

    def prefetch(self) -> None:
        """Experts that travel to this rank may set out: they are needed soon."""
        if self.replicas is not None:
            self.replicas.start()

    def forward(self, rows: Rows, backend: Backend, replicas: Replicas | None = None) -> Tensor:
        """Rows sorted by slot -> (N, D), the sum of each row of x's results. Slots without an expert come last and have
        no rows."""
        dtype = rows.x_ND.dtype
        gate_up, down = (self.gate_up, self.down) if replicas is None else replicas.ready()
        if rows.offsets_S.shape[0] > gate_up.shape[0]:
            rows = replace(rows, offsets_S=rows.offsets_S[: gate_up.shape[0]])
        if self.compiled:
            backend = kernels.compiled(backend)
        y_ND = backend(rows, gate_up.to(dtype), down.to(dtype), again=self.rerun_activation)
        return y_ND if replicas is None else replicas.used(y_ND)
