"""Recompute: what backward computes again so that forward need not keep it. The numbers stay the same.

    full                            a block keeps its input
    selective  norm                 the two norms of a block, with the rows gathered over tp: inputs are kept
               attention            projections to output: the normed rows are kept; with ``norm`` what the block got
               experts_activation   silu(gate) * up: its inputs are kept
               moe                  gate, routing, dispatch, experts, combine, shared expert: likewise

What is run again takes the choices of expert that the first run made.
"""

from enum import Enum

from moetrain.config import UserError, config
from moetrain.model.transformer import Block, ModelConfig, Transformer, Vocabulary


class Mode(Enum):
    none = "none"
    full = "full"
    selective = "selective"


class Part(Enum):
    norm = "norm"
    attention = "attention"
    experts_activation = "experts_activation"
    moe = "moe"


SELECTED = (Part.norm, Part.experts_activation)
"""The parts of ``selective`` where none are named: much memory for little work."""


@config
class RecomputeConfig:
    """``parts`` belong to ``selective``, null = norm and experts_activation; ``layers`` counts from 0, null = all."""

    mode: Mode = Mode.none
    parts: list[Part] | None = None
    layers: list[int] | None = None
    loss_rows: int = 0  # tokens whose logits a rank makes at a time, and makes again in backward; 0 = all, kept

    def __post_init__(self) -> None:
        mode, words = self.mode.value, [p.value for p in self.parts or []]
        if self.parts is not None and self.mode is not Mode.selective:
            raise UserError(
                f"recompute.parts=[{','.join(words)}] with recompute.mode={mode}: only selective has parts; "
                f"set recompute.mode=selective or recompute.parts=null"
            )
        if self.parts == []:
            raise UserError(
                f"recompute.parts=[] with recompute.mode=selective recomputes nothing: name some of "
                f"{', '.join(p.value for p in Part)}, or set recompute.mode=none"
            )
        if Part.moe in (self.parts or []) and Part.experts_activation in (self.parts or []):
            raise UserError(
                f"recompute.parts=[{','.join(words)}]: moe computes the experts' activation again anyhow, "
                f"leave out experts_activation"
            )
        if self.layers is not None and self.mode is Mode.none:
            raise UserError(
                f"recompute.layers={self.layers} with recompute.mode=none: nothing is recomputed in them; "
                f"set recompute.mode=full or selective, or recompute.layers=null"
            )
        if self.layers == []:
            raise UserError("recompute.layers=[] is no layer: name some, or set recompute.mode=none")
        if self.loss_rows < 0:
            raise UserError(f"recompute.loss_rows={self.loss_rows}: use 0 for all at once, else tokens of a chunk")


def check(cfg: RecomputeConfig, model: ModelConfig) -> None:
    """Raise ``UserError`` for layers that the model does not have."""
    if wrong := [i for i in cfg.layers or [] if not 0 <= i < model.num_layers]:
        raise UserError(
            f"recompute.layers={cfg.layers}: {wrong[0]} is not a layer of model.num_layers={model.num_layers}, "
            f"use 0 to {model.num_layers - 1}"
        )


def place(model: Transformer, *, cfg: RecomputeConfig) -> None:
    """Tell each block what it is to compute again, and whoever predicts how many rows of logits to hold."""
    parts = set(cfg.parts or SELECTED) if cfg.mode is Mode.selective else set()
    for name, block in model.blocks.items():
        if not isinstance(block, Block) or (cfg.layers is not None and int(name) not in cfg.layers):
            continue
        block.rerun_all = cfg.mode is Mode.full
        block.remake_norms = Part.norm in parts
        block.rerun_attention, block.rerun_moe = Part.attention in parts, Part.moe in parts
        if block.moe is not None:
            block.moe.experts.rerun_activation = Part.experts_activation in parts
    for module in model.modules():
        if isinstance(module, Vocabulary):
            module.loss_rows = cfg.loss_rows
