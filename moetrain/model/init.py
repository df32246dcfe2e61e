"""Weights at step 0: a function of (seed, parameter name, element), never of the layout (law 3).

Elements of routed experts are counted in the logical (E, ...) tensor, so an expert's weights depend on its id.
"""

import math

from torch import Tensor

from moetrain import counter
from moetrain.logical import Logical
from moetrain.model.transformer import ModelConfig

_OUT = ("attention.out.weight", "moe.experts.down", "ffn.down.weight", "shared.ffn.down.weight")


def initialize(tensors: dict[str, Logical], cfg: ModelConfig, *, seed: int) -> None:
    """Fill this rank's boxes of every parameter in place."""
    for name, logical in tensors.items():
        for chunk in logical.chunks:
            _fill(chunk.tensor, name, logical.shape, chunk.offsets, cfg, seed)


def _fill(
    box: Tensor, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], cfg: ModelConfig, seed: int
) -> None:
    if name.endswith("norm.weight"):
        box.fill_(1.0)
    elif name.endswith(".bias"):
        box.fill_(0.0)
    else:
        counter.fill_normal_(box, shape=shape, offsets=offsets, key=counter.key(seed, name), std=std(name, cfg))


def std(name: str, cfg: ModelConfig) -> float:
    """``init_std``; for what writes into the residual stream, divided by sqrt(2 num_layers) (GPT-2)."""
    out = cfg.depth_scaled_init and name.endswith(_OUT)
    return cfg.init_std / math.sqrt(2 * cfg.num_layers) if out else cfg.init_std
