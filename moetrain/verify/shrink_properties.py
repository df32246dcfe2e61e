"""What of a config could hide a bug of a layout: its numbers, and the properties that a shrunk one has to share."""

import functools
import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

from moetrain import layouts
from moetrain.job import Config
from moetrain.moe.layer import MoEConfig
from moetrain.moe.zero_computation import KINDS
from moetrain.parallel.context import Method
from moetrain.parallel.schedules import PipelineConfig


@dataclass(frozen=True)
class Numbers:
    """The integers of a config whose layout is solved."""

    pp: int
    dp: int
    cp: int
    tp: int
    ep: int
    etp: int
    replicate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dim: int
    num_layers: int
    first_dense: int
    moe_every: int
    windows: tuple[int, ...]  # the different ones, in the order of layers
    num_experts: int
    top_k: int
    zero_computation: tuple[int, ...]  # experts of each kind
    hidden: int
    dense_hidden: int
    shared_hidden: int
    vocab_size: int
    pad_vocab_to: int
    seq_len: int
    micro_batch: int
    accumulation: int  # micro-batches of a data-parallel rank in a step
    ulysses: bool
    pipeline: PipelineConfig  # that of the config: schedules do not shrink
    moe_cfg: MoEConfig  # likewise: its router and balance terms say which numbers of experts they take

    @classmethod
    def of(cls, cfg: Config) -> "Numbers":
        n, m, t = cfg.layout, cfg.model, cfg.train
        return cls(
            pp=n.pp, dp=n.dp, cp=n.cp, tp=n.tp, ep=n.ep, etp=n.etp, replicate=n.replicate,
            num_heads=m.num_heads, num_kv_heads=m.num_kv_heads, head_dim=m.width_of_heads, dim=m.dim,
            num_layers=m.num_layers, first_dense=m.first_dense, moe_every=m.moe_every,
            windows=tuple(dict.fromkeys(map(m.window, range(m.num_layers)))),
            num_experts=min(m.moe.per_layer.experts, default=m.moe.num_experts),
            top_k=max(m.moe.per_layer.top_k, default=m.moe.router.top_k), hidden=m.moe.hidden,
            zero_computation=tuple(getattr(m.moe.zero_computation, kind) for kind in KINDS),
            dense_hidden=m.dense_hidden, shared_hidden=m.moe.shared_hidden,
            vocab_size=m.vocab_size, pad_vocab_to=m.pad_vocab_to, seq_len=t.seq_len, micro_batch=t.micro_batch,
            accumulation=max(1, t.batch // (n.dp * t.micro_batch)), ulysses=cfg.context.method is Method.ulysses,
            pipeline=cfg.pipeline, moe_cfg=m.moe,
        )  # fmt: skip

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @cached_property
    def axes(self) -> dict[str, int]:
        """The axes of the layout, those that follow from others too."""
        edp = self.dp * self.cp * self.tp // (self.ep * self.etp)
        return {
            "pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ep": self.ep, "etp": self.etp, "edp": edp,
            "replicate": self.replicate, "dp/replicate": self.dp // self.replicate,
        }  # fmt: skip

    @cached_property
    def copies(self) -> int:
        """Of the experts' storage: as many of ``replicate`` as divide edp."""
        return math.gcd(self.replicate, self.axes["edp"])

    @cached_property
    def expert_shards(self) -> int:
        return self.axes["edp"] // self.copies

    @cached_property
    def dense_shards(self) -> int:
        return self.dp * self.cp // self.replicate

    @cached_property
    def width(self) -> int:
        """Of an etp rank's slice of an expert."""
        return -(-self.hidden // self.etp)

    @cached_property
    def sequence_unit(self) -> int:
        """What a row's length is rounded up to."""
        return 2 * self.cp * self.tp if self.cp > 1 else self.tp

    @property
    def stages(self) -> int:
        return self.pp * self.pipeline.stages_a_rank if self.pp > 1 else 1

    @cached_property
    def moe_layers(self) -> list[int]:
        first, every = self.first_dense, self.moe_every
        return [i for i in range(first, self.num_layers) if (i - first) % every == every - 1]

    @cached_property
    def stages_without_moe(self) -> int:
        """Of stages as even as they can be."""
        bounds = [stage * self.num_layers // self.stages for stage in range(self.stages + 1)]
        return sum(not any(a <= i < b for i in self.moe_layers) for a, b in itertools.pairwise(bounds))


@dataclass(frozen=True)
class Property:
    """Two configs share it if ``value`` is the same; ``show`` is what a table says. ``weight``: how bad to lose it."""

    name: str
    value: Callable[[Numbers], Hashable]
    show: Callable[[Numbers], str]
    weight: int = 1


def folds(n: Numbers) -> dict[str, tuple[str, ...]]:
    """Expert axis -> the dense axes that it lies over."""
    return _folds(n.dp, n.cp, n.tp, n.ep, n.etp)


@functools.cache
def _folds(dp: int, cp: int, tp: int, ep: int, etp: int) -> dict[str, tuple[str, ...]]:
    return layouts.folds(layouts.Layout(dp=dp, cp=cp, tp=tp, ep=ep, etp=etp))


def ends(n: Numbers) -> list[int]:
    """Where an axis of either view ends in a stage's list of ranks: the strides of the next axes out, ascending."""
    return sorted({1, n.tp, n.tp * n.cp, n.tp * n.cp * n.dp, n.etp, n.etp * n.ep})


def nested(n: Numbers) -> bool:
    """Whether those divide one another: then no group of one view cuts through a group of the other."""
    return all(b % a == 0 for a, b in itertools.pairwise(ends(n)))


def factors(n: Numbers) -> int:
    """How many factors a stage's ranks fall into when both views cut them: each takes two ranks at the least."""
    return len(ends(n)) - 1


def _sign(a: int, b: int) -> int:
    return (a > b) - (a < b)


def _against(a: int, b: int) -> tuple[int, bool]:
    """Less, equal or more, and whether the smaller divides the larger."""
    return _sign(a, b), max(a, b) % min(a, b) == 0


def _compare(a: int, b: int) -> str:
    return f"{a} {'<=>'[1 + _sign(a, b)]} {b}"


def _axis(name: str, weight: int) -> Property:
    return Property(name, lambda n: n.axes[name] > 1, lambda n: str(n.axes[name]), weight)


def _fold(name: str) -> Property:
    return Property(f"{name} lies over", lambda n: folds(n)[name], lambda n: " ".join(folds(n)[name]) or "-")


def _multiple(name: str, a: Callable[[Numbers], int], b: Callable[[Numbers], int], weight: int = 1) -> Property:
    return Property(name, lambda n: a(n) % b(n) == 0, lambda n: f"{a(n)} / {b(n)}", weight)


def _yes(x: bool) -> str:
    return "yes" if x else "no"


def _with_ulysses(n: Numbers) -> bool:
    return n.ulysses and n.cp > 1


AXES = (
    *(_axis(name, 10) for name in ("pp", "dp", "cp", "tp", "ep", "etp", "edp")),
    _axis("replicate", 3),
    _axis("dp/replicate", 1),
)
NESTED = Property("strides nest", nested, lambda n: _yes(nested(n)))
FOLDS = tuple(map(_fold, ("edp", "ep", "etp")))
RELATIONS = (
    Property("ep > tp", lambda n: n.ep > n.tp, lambda n: _compare(n.ep, n.tp)),
    Property(
        "pp > 2", lambda n: n.pp > 2, lambda n: str(n.pp), 3
    ),  # stages that hold neither the embedding nor the head
    Property("shards of dense weights", lambda n: n.dense_shards > 1, lambda n: str(n.dense_shards), 2),
    Property("copies of expert weights", lambda n: n.copies > 1, lambda n: str(n.copies)),
    Property("shards of expert weights", lambda n: n.expert_shards > 1, lambda n: str(n.expert_shards)),
)
HEADS = (
    Property("kv heads", lambda n: n.num_kv_heads > 1, lambda n: str(n.num_kv_heads), 3),
    Property(
        "kv heads against tp", lambda n: _against(n.num_kv_heads, n.tp), lambda n: _compare(n.num_kv_heads, n.tp), 3
    ),
    Property(
        "query heads of a kv head", lambda n: n.num_heads > n.num_kv_heads, lambda n: str(n.num_heads // n.num_kv_heads)
    ),
    Property(
        "query heads of a tp rank", lambda n: (n.num_heads % n.tp == 0, n.num_heads > n.tp),
        lambda n: f"{n.num_heads} / {n.tp}", 10,
    ),
    Property(
        "query heads over tp * cp (ulysses)",
        lambda n: _with_ulysses(n) and (n.num_heads % (n.tp * n.cp) == 0, n.num_heads > n.tp * n.cp),
        lambda n: f"{n.num_heads} / {n.tp * n.cp}" if _with_ulysses(n) else "-", 10,
    ),
    Property(
        "kv heads against tp * cp (ulysses)",
        lambda n: _with_ulysses(n) and _against(n.num_kv_heads, n.tp * n.cp),
        lambda n: _compare(n.num_kv_heads, n.tp * n.cp) if _with_ulysses(n) else "-",
    ),
)  # fmt: skip
EXPERT_COUNTS = (
    Property("top_k", lambda n: min(n.top_k, 3), lambda n: str(n.top_k), 10),
    Property(
        "top_k < experts", lambda n: n.top_k < n.num_experts, lambda n: _compare(n.top_k, n.num_experts), 20
    ),
    Property(
        "experts of an ep rank", lambda n: (n.num_experts % n.ep == 0, n.num_experts > n.ep),
        lambda n: f"{n.num_experts} / {n.ep}", 2,
    ),
    _multiple("a rank's experts over their shards", lambda n: n.num_experts // n.ep, lambda n: n.expert_shards),
    Property(
        "zero-computation experts", lambda n: tuple(min(count, 2) for count in n.zero_computation),
        lambda n: ", ".join(f"{count} {kind}" for kind, count in zip(KINDS, n.zero_computation, strict=True) if count)
        or "none", 5,
    ),
)  # fmt: skip
DIM = (
    Property("dim, multiple of 8", lambda n: math.gcd(n.dim, 8), lambda n: str(n.dim)),
    _multiple("dim over shards of dense weights", lambda n: n.dim, lambda n: n.dense_shards),
)
WIDTHS = (
    Property(
        "heads * head_dim against dim", lambda n: _sign(n.num_heads * n.head_dim, n.dim),
        lambda n: _compare(n.num_heads * n.head_dim, n.dim), 3,
    ),
    *DIM,
)  # fmt: skip
EXPERT_WIDTH = (
    _multiple("hidden over etp", lambda n: n.hidden, lambda n: n.etp, 3),
    Property("hidden of an etp rank, multiple of 8", lambda n: math.gcd(n.width, 8), lambda n: str(n.width)),
    _multiple("hidden of an etp rank over expert shards", lambda n: n.width, lambda n: n.expert_shards),
)
DENSE_WIDTH = (_multiple("dense_hidden over tp", lambda n: n.dense_hidden, lambda n: n.tp),)
SHARED_WIDTH = (
    Property("shared expert", lambda n: n.shared_hidden > 0, lambda n: str(n.shared_hidden), 3),
    _multiple("shared_hidden over tp", lambda n: n.shared_hidden, lambda n: n.tp),
)
LAYERS = (
    Property("MoE layers", lambda n: min(len(n.moe_layers), 2), lambda n: str(len(n.moe_layers)), 3),
    Property("first_dense", lambda n: n.first_dense > 0, lambda n: str(n.first_dense)),
    Property("moe_every", lambda n: n.moe_every > 1, lambda n: str(n.moe_every)),
    Property(
        "the last layer is MoE", lambda n: n.num_layers - 1 in n.moe_layers,
        lambda n: _yes(n.num_layers - 1 in n.moe_layers),
    ),
    Property(
        "layers over stages", lambda n: (n.num_layers % n.stages == 0, n.num_layers > n.stages),
        lambda n: f"{n.num_layers} / {n.stages}",
    ),
    Property(
        "windows of attention", lambda n: min(len(n.windows), n.num_layers, 2),
        lambda n: ", ".join(map(str, n.windows[: n.num_layers])),
    ),
    Property("stages without MoE", lambda n: n.stages_without_moe > 0, lambda n: str(n.stages_without_moe)),
)  # fmt: skip


def _padded(n: Numbers) -> int:
    step = math.lcm(n.pad_vocab_to, n.tp)
    return -(-n.vocab_size // step) * step


VOCABULARY = (
    _multiple("vocab_size over tp", lambda n: n.vocab_size, lambda n: n.tp),
    _multiple("vocab_size over pad_vocab_to", lambda n: n.vocab_size, lambda n: n.pad_vocab_to),
    _multiple("pad_vocab_to over tp", lambda n: n.pad_vocab_to, lambda n: n.tp),
    Property("pad_vocab_to", lambda n: n.pad_vocab_to > 1, lambda n: str(n.pad_vocab_to)),
    Property(
        "a tp rank with only padding of the vocabulary", lambda n: _padded(n) - n.vocab_size >= _padded(n) // n.tp,
        lambda n: f"{n.vocab_size} of {_padded(n)} rows",
    ),
)  # fmt: skip


def _empty_part(n: Numbers) -> bool:
    length = -(-n.seq_len // n.sequence_unit) * n.sequence_unit
    return length - n.seq_len >= length // n.sequence_unit


SEQUENCE = (
    Property(
        "seq_len over 2 * cp * tp",
        lambda n: tuple(n.seq_len % x == 0 for x in (n.sequence_unit, n.tp, n.sequence_unit // n.tp)),
        lambda n: f"{n.seq_len} / {n.sequence_unit}",
    ),
    Property("a rank with only padding of a row", _empty_part, lambda n: _yes(_empty_part(n))),
)  # fmt: skip
BATCH = (
    Property("micro_batch", lambda n: n.micro_batch > 1, lambda n: str(n.micro_batch)),
    Property(
        "micro-batches of a rank", lambda n: (n.accumulation > 1, n.accumulation >= n.pp, n.accumulation % n.pp == 0),
        lambda n: str(n.accumulation), 2,
    ),
)  # fmt: skip

OF_LAYOUT = (*AXES, NESTED, *FOLDS, *RELATIONS)
OF_SHAPES = (
    *HEADS, *WIDTHS, *LAYERS, *EXPERT_COUNTS, *EXPERT_WIDTH, *DENSE_WIDTH, *SHARED_WIDTH, *VOCABULARY, *SEQUENCE, *BATCH
)  # fmt: skip
