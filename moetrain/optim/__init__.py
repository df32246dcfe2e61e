"""AdamW and Muon on each rank's own shards, the global gradient norm, the learning rate. Read first: optimizer."""

from moetrain.optim.config import Kind, MuonConfig, OptimConfig, Schedule, StateDType, UpdateKernel
from moetrain.optim.optimizer import Optimizer, check_saved, clip_scale, grad_norm, norm_and_sum

__all__ = [
    "Kind",
    "MuonConfig",
    "OptimConfig",
    "Optimizer",
    "Schedule",
    "StateDType",
    "UpdateKernel",
    "check_saved",
    "clip_scale",
    "grad_norm",
    "norm_and_sum",
]
