"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198): who holds which slice of what.

    embedding, head           rows of the vocabulary
    q, k, v, full QK-norms    heads; with fewer key heads than ranks, each is held by several
    attention out, down       the other side of heads and hidden width, so that its results are parts of a sum
    gate, up                  hidden width
    norms, gates, constants   whole: each rank's gradient comes from its shard of the sequence, and tp sums them

Between layers a rank has S / tp positions. A width that tp does not divide is padded with zeros, which stay zeros.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moetrain.mesh import Mesh
from moetrain.model.attention import Attention, QKNorm
from moetrain.model.layers import SwiGLU
from moetrain.model.transformer import ModelConfig, Transformer, Vocabulary
from moetrain.parallel.plan import Held, Plan


@dataclass(frozen=True)
class _Rule:
    """``dim`` is cut over tp into equal slices, or None: whole on every rank. ``unit`` numbers are not cut apart."""

    dim: int | None
    unit: Callable[[ModelConfig], int] = lambda cfg: 1
    size: Callable[[ModelConfig], int] | None = None  # logical size of ``dim`` where memory holds more


_WHOLE = _Rule(None)
_ROWS = _Rule(0, size=lambda cfg: cfg.vocab_size)
_HEADS = _Rule(0, unit=lambda cfg: cfg.width_of_heads)
_RULES: tuple[tuple[str, _Rule], ...] = (
    (r"(embedding|head)\.weight", _ROWS),
    (r"blocks\.\d+\.attention\.[qkv]\.(weight|bias)", _HEADS),
    (r"blocks\.\d+\.attention\.out\.weight", _Rule(1, unit=lambda cfg: cfg.width_of_heads)),
    (r"blocks\.\d+\.(shared\.)?ffn\.(gate|up)\.weight", _Rule(0)),
    (r"blocks\.\d+\.(shared\.)?ffn\.down\.weight", _Rule(1)),
    (r"blocks\.\d+\.(attention_norm|ffn_norm)\.weight|norm\.weight", _WHOLE),
    (r"blocks\.\d+\.(moe\.gate|moe\.zero_computation|shared\.gate)\..*", _WHOLE),
)
_QK_NORM = re.compile(r"blocks\.\d+\.attention\.[qk]_norm\.weight")
_KEYS = re.compile(r"blocks\.\d+\.attention\.(k|v|k_norm)\..*")


def place(model: Transformer, mesh: Mesh) -> Plan:
    """Cut the dense parameters of a model on meta to this rank's slices; raises nothing: ``check`` has been through."""
    tp, rank, cfg = mesh.layout.tp, mesh.index("dense", "tp"), model.cfg
    group = mesh.group("dense", "tp")
    copies = max(1, tp // cfg.num_kv_heads)  # ranks that hold the same key heads
    same_keys = mesh.subgroup("dense", "tp", size=copies)
    plan: Plan = {}
    for name, p in model.named_parameters():
        rule = _rule(name, cfg)
        if rule is None:
            continue  # experts are placed elsewhere; whatever else is missed fails the check of the whole plan
        shape, start = list(p.shape), 0
        held_by = copies if _KEYS.fullmatch(name) and rule.dim is not None else 1
        if rule.dim is not None:
            if rule.size is not None:
                shape[rule.dim] = rule.size(cfg)
            length = _slice(p.shape[rule.dim], tp // held_by, rule.unit(cfg), name=name, cfg=cfg)
            start = rank // held_by * length
            _resize(model, name, p, rule.dim, length)
        if tp == 1:
            plan[name] = Held(tuple(shape))
        elif rule.dim is None:
            plan[name] = Held(tuple(shape), group=group, over="tp")
        elif held_by > 1:
            words = "tp" if held_by == tp else f"the {held_by} ranks of tp that hold the same key heads"
            plan[name] = Held(tuple(shape), rule.dim, start, group=same_keys, over=words)
        else:
            plan[name] = Held(tuple(shape), rule.dim, start)
    for module in model.modules():
        if isinstance(module, Vocabulary | SwiGLU | Attention):
            module.group = group
        if isinstance(module, Attention) and module.qk_norm is QKNorm.full:
            module.q_norm.group = module.k_norm.group = group
    return plan


def _rule(name: str, cfg: ModelConfig) -> _Rule | None:
    if _QK_NORM.fullmatch(name):
        return _HEADS if cfg.qk_norm is QKNorm.full else _WHOLE
    return next((rule for pattern, rule in _RULES if re.fullmatch(pattern, name)), None)


def _slice(size: int, parts: int, unit: int, *, name: str, cfg: ModelConfig) -> int:
    """Length of one of ``parts`` equal slices, padded where they do not divide ``size``."""
    if name in ("embedding.weight", "head.weight"):
        return cfg.padded_vocab(parts) // parts
    units = size // unit
    return -(-units // parts) * unit


def _resize(model: nn.Module, name: str, p: nn.Parameter, dim: int, length: int) -> None:
    shape = list(p.shape)
    shape[dim] = length
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(torch.empty(shape, dtype=p.dtype, device=p.device)))
