"""What may change in a config when a run goes on, and what did.

    free        changes nothing that is learned: where it runs, how it is laid out, what is written
    trajectory  what is learned from here on: allowed by name (``run.allow``), and recorded with the step
    shape       the tensors themselves: another run

A node's own field is for its kind, and for whether it is there; its fields have tags of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from moetrain.config import UserError, default, dump, option


class Tag(Enum):
    free = "free"
    trajectory = "trajectory"
    shape = "shape"


_TAGS: dict[Tag, dict[str, str]] = {
    Tag.free: {
        "AlertConfig": "metric above below action after",
        "BadStepsConfig": "rewinds replays",
        "CheckpointConfig": "every keep keep_every asynchronous",
        "Config": "run layout pipeline sharding context recompute checkpoint bad_steps integrity logging health "
        "trace",
        "ContextConfig": "method",
        "DataConfig": "cache",
        "FSSDP": "reshard_every overlap calibrate",
        "Following": "window costs memory",
        "HealthConfig": "enabled smoothing pairs alerts",
        "Hierarchical": "ranks_per_node",
        "Layout": "pp dp cp tp ep etp replicate",
        "IntegrityConfig": "replay_every hash_every",
        "LoggingConfig": "every progress heat_map load_trace straggler norms tensorboard wandb wandb_project "
        "wandb_entity wandb_name sink_timeout nvml_every",
        "MoEConfig": "kernel placement",
        "ModelConfig": "pad_vocab_to",
        "OptimConfig": "kernel",
        "PinnedCosts": "row hop expert hidden shared",
        "PipelineConfig": "schedule chunks stages",
        "Router": "fused",
        "RecomputeConfig": "mode parts layers loss_rows",
        "RunConfig": "name dir resume restarts time_limit allow allow_missing fork warm_start reset cache",
        "ShardingConfig": "dense experts accumulate",
        "TrainConfig": "validate_every validate_samples bigram exit_after deterministic device communication timeout "
        "threads gc_every allocator compile",
        "TraceConfig": "enabled steps ranks memory",
    },
    Tag.trajectory: {
        "BadStepsConfig": "skip loss_spike norm_spike window rewind_after",
        "Balance": "coef",
        "Capacity": "factor eval_factor min_capacity drop scope",
        "Communication": "num_groups max_groups",
        "Config": "data optim train seed",
        "CorpusConfig": "path weight",
        "CosineGateConfig": "temperature",
        "DataConfig": "vocab_size corpora seed mask_documents ignore_tokens",
        "Device": "num_groups",
        "ExpertBias": "rate update until_step",
        "ExpertChoice": "factor non_causal",
        "GroupLimited": "num_groups max_groups group_score",
        "MoEConfig": "router rounding dispatcher balance fp8_tile",
        "ModelConfig": "norm_eps rope windows moe init_std depth_scaled_init",
        "MuonConfig": "momentum ns_steps ns_dtype lr_scale weight_decay",
        "NoisyTopK": "gumbel jitter",
        "OptimConfig": "lr min_lr_ratio schedule warmup decay beta1 beta2 eps weight_decay decay_gates clip muon "
        "freeze weight_dtype",
        "PerLayer": "top_k early_top_k early_steps",
        "RampConfig": "start increment samples",
        "Random": "k_min until_step balanced",
        "Replay": "path inner",
        "RopeConfig": "theta scaling factor original_length beta_fast beta_slow",
        "Router": "top_k",
        "Sinkhorn": "tolerance iterations",
        "Switch": "scope",
        "TokenRounding": "multiple rounding scope",
        "TopK": "score renormalize scale",
        "TopP": "p",
        "TrainConfig": "steps batch micro_batch seq_len dtype ramp",
        "Travelling": "wire",
        "ZeroComputationConfig": "weight",
    },
    Tag.shape: {
        "Config": "model",
        "CosineGateConfig": "hidden",
        "MLPGateConfig": "hidden",
        "MoEConfig": "num_experts hidden shared_hidden shared_gate residual gate per_layer zero_computation",
        "ModelConfig": "vocab_size dim num_layers num_heads num_kv_heads head_dim qk_norm qkv_bias tie_embeddings "
        "first_dense moe_every dense_hidden",
        "MuonConfig": "gates",
        "OptimConfig": "kind state_dtype",
        "PerLayer": "experts",
        "RecurrentGateConfig": "hidden",
        "ZeroComputationConfig": "zero copy constant nulls",
    },
}  # fmt: skip


def tags_of(owner: type, name: str) -> list[Tag]:
    """Those of a field, by the classes that it may have come from: one, unless the tables are wrong."""
    every = [cls.__name__ for cls in owner.__mro__]
    return [tag for tag, table in _TAGS.items() if any(name in table.get(cls, "").split() for cls in every)]


@dataclass(frozen=True)
class Change:
    key: str
    old: Any
    new: Any
    tag: Tag

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.old)} -> {_text(self.new)} ({self.tag.value})"


def changes(old: dict[str, Any], new: Any) -> list[Change]:
    """From a config that was dumped, maybe by an older moetrain, to ``new``, in the order of its fields."""
    return list(_node(old, new, ""))


def check(found: list[Change], *, allow: list[str], where: str) -> None:
    """Raises ``UserError`` for a change that is not ``allow``-ed, by its key or the beginning of it, or cannot be."""
    for change in found:
        if change.tag is Tag.shape:
            raise UserError(
                f"{change.key} was {_text(change.old)} in {where} and is {_text(change.new)} now: it decides which "
                f"tensors there are, so this is another run; restore it, or start anew with another run.name"
            )
    unallowed = [c for c in found if c.tag is Tag.trajectory and not any(_covers(key, c.key) for key in allow)]
    if unallowed:
        every = ",".join([*allow, *(change.key for change in unallowed)])
        words = "; ".join(f"{c.key} was {_text(c.old)}, is {_text(c.new)}" for c in unallowed)
        raise UserError(
            f"{where} was trained otherwise: {words}. Restore what was, or say that it is meant: 'run.allow=[{every}]'"
        )


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith((allowed + ".", allowed + "["))


def _node(old: dict[str, Any], new: Any, where: str) -> Iterator[Change]:
    for f in fields(new):
        value = getattr(new, f.name)
        before = old[f.name] if f.name in old else dump(default(f))
        yield from _value(before, value, where + f.name, tags_of(type(new), f.name)[0])


def _value(old: Any, new: Any, key: str, tag: Tag) -> Iterator[Change]:
    if is_dataclass(new) and isinstance(old, dict) and (option(type(new)) in (None, old.get("kind"))):
        yield from _node(old, new, key + ".")
    elif isinstance(new, dict) and isinstance(old, dict):
        for name in old | new:
            if name in old and name in new:
                yield from _value(old[name], new[name], f"{key}.{name}", tag)
            else:
                yield Change(f"{key}.{name}", old.get(name), dump(new.get(name)), tag)
    elif isinstance(new, list) and any(map(is_dataclass, new)) and isinstance(old, list) and len(old) == len(new):
        for i, (before, value) in enumerate(zip(old, new, strict=True)):
            yield from _value(before, value, f"{key}[{i}]", tag)
    elif old != dump(new):
        yield Change(key, old, dump(new), tag)


def _text(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
