"""Which parts of a model are compiled (``compiling.py``): the dense ones, between collectives, never the dispatch."""

from moetrain.config import UserError
from moetrain.layouts import Layout
from moetrain.model.attention import Attention
from moetrain.model.layers import SwiGLU
from moetrain.model.transformer import Block, Transformer, Vocabulary
from moetrain.moe.experts import Experts
from moetrain.parallel.schedules import PipelineConfig


def check(layout: Layout, stages: PipelineConfig) -> None:
    """Raise ``UserError`` for what cannot be compiled, before any rank starts."""
    if layout.pp > 1 and stages.order.splits_backward:
        raise UserError(
            f"train.compile=true with pipeline.schedule={stages.schedule}: a compiled backward has its weight "
            f"gradients in it, and that schedule puts them off; use pipeline.schedule=1f1b or interleaved, or "
            f"train.compile=false"
        )


def place(model: Transformer, *, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, Block | Attention | SwiGLU | Experts | Vocabulary):
            module.compiled = on
