"""A config of any size -> one that a few ranks run in seconds and in which every property that could hide a bug stays.

The axes of the layout come first, then how the expert axes fold over the dense ones, then how axes and shapes compare,
then the fewest ranks; shapes follow, each the smallest that keeps what it can. docs/shrink.md states the rule, and
``shrink_properties.py`` lists the properties. Integers only: no process, no tensor.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from moetrain import config as configs
from moetrain.config import UserError
from moetrain.job import Config
from moetrain.kernels.float8 import TILES
from moetrain.layouts import Layout, divisors
from moetrain.moe.layer import MoEConfig
from moetrain.moe.per_layer import PerLayer
from moetrain.moe.placement.types import Grid
from moetrain.moe.zero_computation import KINDS, ZeroComputationConfig
from moetrain.parallel.schedules import too_few
from moetrain.verify import shrink_properties as of
from moetrain.verify.shrink_properties import Numbers, Property

INIT_STD = 0.1
_SMALL = {
    "dim": 64, "num_layers": 8, "num_experts": 64, "hidden": 64, "dense_hidden": 128, "shared_hidden": 128,
    "vocab_size": 512, "seq_len": 64, "micro_batch": 4, "accumulation": 8,
}  # fmt: skip
"""What need not shrink."""


@dataclass(frozen=True)
class Shrunk:
    """``rows`` are (property, original, shrunk) in a fixed order; ``lost``: what the shrunk config lacks, and why."""

    cfg: Config
    rows: list[tuple[str, str, str]]
    lost: list[str]


def shrink(cfg: Config, *, world: int, ranks: int = 16) -> Shrunk:
    """A config for at most ``ranks`` ranks of one that is meant for ``world``; its layout is solved.

    Raises ``UserError`` where the layout does not fit ``world``.
    """
    if ranks < 1:
        raise UserError(f"ranks={ranks}: a layout has at least 1 rank")
    solved = configs.replace(cfg, layout=cfg.layout.solve(world))
    big = Numbers.of(solved)
    small = big if world <= ranks and _is_small(big) else _shapes(big, _layout(big, ranks))
    shrunk = _for_one_step(solved if small is big else _apply(solved, small))
    rows = [("ranks", str(big.world), str(small.world)), ("layout", str(solved.layout), str(shrunk.layout))]
    rows += [(p.name, p.show(big), p.show(small)) for p in (*of.OF_LAYOUT, *of.OF_SHAPES)]
    rows += [_changed(key, why, str(get(cfg)), str(get(shrunk))) for key, why, get in _CHANGED]
    lost = [_lost(p, big, small, _why(p, big, ranks)) for p in of.OF_LAYOUT if p.value(big) != p.value(small)]
    no_shape = "no small shape has it together with the rest in the shrunk layout"
    lost += [_lost(p, big, small, no_shape) for p in of.OF_SHAPES if p.value(big) != p.value(small)]
    if cfg.pipeline.stages != shrunk.pipeline.stages:
        lost.append(f"pipeline.stages: {cfg.pipeline.stages} -> by cost: there are other layers")
    if cfg.train.ramp.start:
        lost.append(f"batch ramp: {cfg.train.ramp.start} -> none: one step is run")
    return Shrunk(shrunk, rows, lost)


def table(shrunk: Shrunk) -> list[str]:
    """Lines to print: what changed, how many properties were kept, which were lost."""
    changed = [row for row in shrunk.rows if row[1] != row[2]]
    width = max((len(name) for name, _, _ in changed), default=0)
    lines = [f"{name:<{width}}  {a} -> {b}" for name, a, b in changed]
    number, lost = len(of.OF_LAYOUT) + len(of.OF_SHAPES), {line.partition(": ")[0] for line in shrunk.lost}
    kept = sum(p.name not in lost for p in (*of.OF_LAYOUT, *of.OF_SHAPES))
    return [*lines, f"kept: {kept} of {number} properties", *(f"lost: {line}" for line in shrunk.lost)]


def _changed(key: str, why: str, before: str, after: str) -> tuple[str, str, str]:
    return (key if before == after else f"{key} ({why})", before, after)


def _is_small(n: Numbers) -> bool:
    unused = {"dense_hidden"} if len(n.moe_layers) == n.num_layers else set()
    return all(getattr(n, name) <= most for name, most in _SMALL.items() if name not in unused)


def _lost(p: Property, big: Numbers, small: Numbers, why: str) -> str:
    return f"{p.name}: {p.show(big)} -> {p.show(small)}: {why}"


def _why(p: Property, big: Numbers, ranks: int) -> str:
    least = (2 if big.pp > 1 else 1) * 2 ** of.factors(big)
    if p in of.FOLDS and of.nested(big) and least > ranks:
        return f"the {of.factors(big)} factors of a stage's ranks, two ranks each, need {least} ranks; {ranks} allowed"
    return f"does not fit into {ranks} ranks together with what comes first"


# ---- the layout

_AXES = ("pp", "dp", "cp", "tp", "ep", "etp", "replicate")  # that are chosen; the others follow


def _layout(big: Numbers, ranks: int) -> Numbers:
    """``big`` under the best of all layouts of at most ``ranks`` ranks; equal ones in a fixed order."""
    wanted = [size > 1 for size in big.axes.values()]
    weights = [p.weight for p in of.AXES]

    def axes_lost(sizes: tuple[int, ...]) -> int:
        return sum(weight for size, want, weight in zip(sizes, wanted, weights, strict=True) if want and size == 1)

    allowed = [sizes for sizes in _layouts(ranks) if all(size == 1 or w for size, w in zip(sizes, wanted, strict=True))]
    least = min(map(axes_lost, allowed))
    names = list(big.axes)
    best = [
        replace(big, **{name: sizes[names.index(name)] for name in _AXES})
        for sizes in allowed
        if axes_lost(sizes) == least
    ]
    big_folds, big_nests = of.folds(big), of.nested(big)

    def folds_lost(n: Numbers) -> tuple[int, int]:
        """Pairs of axes that lie over one another in one layout only; those of ep among them."""
        wrong = {e: len(set(dense) ^ set(big_folds[e])) for e, dense in of.folds(n).items()}
        return sum(wrong.values()), wrong["ep"]

    best = _least(best, lambda n: of.nested(n) != big_nests)
    best = _least(best, folds_lost)

    shapes_lost: dict[tuple, int] = {}

    def least_lost(n: Numbers, candidates: Iterable[_Changes], properties: tuple[Property, ...], *decides: int) -> int:
        """What the best shapes lose in a layout, of which ``decides`` is all that these properties look at."""
        key = (properties[0].name, *decides)
        if key not in shapes_lost:
            shapes_lost[key] = _loss(_fit(big, n, candidates, properties), big, properties)
        return shapes_lost[key]

    def relations_lost(n: Numbers) -> int:
        return (
            _loss(n, big, of.RELATIONS)
            + least_lost(n, _heads(), of.HEADS, n.tp, n.cp)
            + least_lost(n, _experts(n), of.EXPERT_COUNTS, n.ep, n.expert_shards)
            + least_lost(n, _hidden(n), of.EXPERT_WIDTH, n.etp, n.expert_shards)
            + least_lost(n, _each(dim=range(24, 129)), of.DIM, n.dense_shards)
        )

    best = _least(best, relations_lost)
    best = _least(best, lambda n: sum(size & (size - 1) != 0 for size in n.axes.values()))  # powers of two, if they do
    return min(best, key=lambda n: (n.world, tuple(n.axes.values())))


@functools.cache
def _layouts(ranks: int) -> list[tuple[int, ...]]:
    """The sizes of ``Numbers.axes`` of every layout of at most so many ranks."""
    found = []
    for stage in range(1, ranks + 1):
        triples = [(a, b, stage // (a * b)) for a in divisors(stage) for b in divisors(stage // a)]
        for pp, (dp, cp, tp), (edp, ep, etp) in itertools.product(range(1, ranks // stage + 1), triples, triples):
            found += [(pp, dp, cp, tp, ep, etp, edp, copies, dp // copies) for copies in divisors(dp)]
    return found


def _least(found: list[Numbers], key: Callable[[Numbers], Any]) -> list[Numbers]:
    keys = [key(n) for n in found]
    least = min(keys)
    return [n for n, k in zip(found, keys, strict=True) if k == least]


# ---- the shapes

_Changes = dict[str, Any]


def _shapes(big: Numbers, n: Numbers) -> Numbers:
    """``big`` has the properties, ``n`` the layout; one group of shapes after the other, each given those before."""
    for candidates, properties in (
        (lambda n: _heads(), of.HEADS),
        (_widths, of.WIDTHS),
        (_layers, of.LAYERS),
        (_experts, of.EXPERT_COUNTS),
        (_hidden, of.EXPERT_WIDTH),
        (lambda n: _each(dense_hidden=range(32, 65)), of.DENSE_WIDTH),
        (lambda n: _each(shared_hidden=(0, *range(16, 49))), of.SHARED_WIDTH),
        (_vocabulary, of.VOCABULARY),
        (lambda n: _each(seq_len=range(24, max(64, 2 * n.sequence_unit) + 1)), of.SEQUENCE),
        (_batch, of.BATCH),
    ):
        n = _fit(big, n, candidates(n), properties)
    return n


def _fit(big: Numbers, n: Numbers, candidates: Iterable[_Changes], properties: Iterable[Property]) -> Numbers:
    """``n`` with the first of the changes that loses least of ``big``'s properties."""
    wanted = [(p, p.value(big)) for p in properties]
    best, least = n, None
    for changes in candidates:
        tried = replace(n, **changes)
        loss = sum(p.weight for p, value in wanted if p.value(tried) != value)
        if least is None or loss < least:
            best, least = tried, loss
        if loss == 0:
            break
    return best


def _loss(n: Numbers, big: Numbers, properties: Iterable[Property]) -> int:
    return sum(p.weight for p in properties if p.value(n) != p.value(big))


def _each(**ranges: Iterable[Any]) -> Iterator[_Changes]:
    for values in itertools.product(*ranges.values()):
        yield dict(zip(ranges, values, strict=True))


@functools.cache
def _heads() -> list[_Changes]:
    """Fewest heads first."""
    return [{"num_heads": heads, "num_kv_heads": kv} for heads in range(1, 65) for kv in divisors(heads)]


def _widths(n: Numbers) -> Iterator[_Changes]:
    """Heads of 4 or more (2 turn by one angle, which hides how they pair), dim from 32 on and at most 64 if it can."""

    def cost(dim: int, head_dim: int) -> tuple:
        return dim > 64, head_dim < 4, dim < 32, dim, abs(head_dim - 8)

    pairs = itertools.product(range(24, 2 * max(n.num_heads, 32) + 1), (2, 4, 6, 8, 12, 16, 24, 32, 64))
    for dim, head_dim in sorted(pairs, key=lambda pair: cost(*pair)):
        yield {"dim": dim, "head_dim": head_dim}


def _layers(n: Numbers) -> Iterator[_Changes]:
    return _each(num_layers=range(n.stages, 3 * n.stages + 6), first_dense=range(3), moe_every=range(1, 4))


def _experts(n: Numbers) -> Iterator[_Changes]:
    """Of zero-computation experts one or two of each kind, or all where a router or a balance term wants them. Where
    experts travel, each rank owns one."""
    own, each = n.zero_computation, max(1, len(n.moe_layers) // n.stages)
    owners = n.axes["edp"] * n.ep if n.moe_cfg.placement.travels else 0
    for extra in dict.fromkeys([tuple(min(count, 2) for count in own), own]):
        for experts in range(n.ep, 16 * n.ep + 1, n.ep):
            if experts * each < owners:
                continue
            most = min(experts + sum(extra), 8)
            taken = [k for k in range(1, most + 1) if _takes(n.moe_cfg, num_experts=experts, extra=extra, top_k=k)]
            yield from _each(num_experts=[experts], top_k=taken, zero_computation=[extra])


def _takes(moe: MoEConfig, *, num_experts: int, extra: tuple[int, ...], top_k: int) -> bool:
    """Whether its router and balance terms can work with so many."""
    try:
        router, counts = configs.replace(moe.router, top_k=top_k), _counts(moe, extra)
        configs.replace(
            moe, num_experts=num_experts, router=router, zero_computation=counts, per_layer=PerLayer()
        ).check()
    except UserError:
        return False
    return True


def _counts(moe: MoEConfig, extra: tuple[int, ...]) -> ZeroComputationConfig:
    return configs.replace(moe.zero_computation, **dict(zip(KINDS, extra, strict=True)))


def _batch(n: Numbers) -> Iterator[_Changes]:
    enough = [a for a in range(1, 2 * n.pp + 3) if n.pp == 1 or not too_few(n.pipeline, pp=n.pp, micro_batches=a)]
    return _each(micro_batch=(1, 2), accumulation=enough)


def _hidden(n: Numbers) -> Iterator[_Changes]:
    return _each(hidden=range(16, 129))


def _vocabulary(n: Numbers) -> Iterator[_Changes]:
    return _each(pad_vocab_to=(8, 4, 16, 12, 6, 3, 2, 1), vocab_size=range(128, 257))


# ---- back to a config


def _apply(cfg: Config, n: Numbers) -> Config:
    """``cfg`` with these numbers; nodes of which no number changes stay the same objects."""
    m = cfg.model
    moe = configs.replace(
        m.moe, num_experts=n.num_experts, hidden=n.hidden, shared_hidden=n.shared_hidden,
        router=configs.replace(m.moe.router, top_k=n.top_k), zero_computation=_counts(m.moe, n.zero_computation),
        rounding=m.moe.rounding.shrunk(
            top_k=n.top_k, num_experts=n.num_experts, tokens=n.seq_len, sequences=n.micro_batch
        ),
        dispatcher=m.moe.dispatcher.shrunk(
            was=_spanned(m.moe, cfg.layout.edp, cfg.layout), ranks=_spanned(m.moe, n.axes["edp"], n)
        ),
        per_layer=_per_layer(m.moe, n), fp8_tile=min(m.moe.fp8_tile, TILES[0]),
    )  # fmt: skip
    own = {f.name for f in fields(m)} & {f.name for f in fields(n)}
    shapes = {name: getattr(n, name) for name in own} | {"windows": _windows(cfg, n)}
    if m.head_dim is None and n.num_heads * n.head_dim == n.dim:
        shapes["head_dim"] = None
    model = configs.replace(m, **shapes, moe=moe, init_std=max(m.init_std, INIT_STD))
    train = configs.replace(
        cfg.train, batch=n.dp * n.micro_batch * n.accumulation, micro_batch=n.micro_batch, seq_len=n.seq_len
    )
    ignored = sorted({token % n.vocab_size for token in cfg.data.ignore_tokens})[: n.vocab_size // 8]
    recompute = configs.replace(cfg.recompute, layers=_covered(cfg, n))
    return configs.replace(
        cfg, model=model, train=train, recompute=recompute, data=configs.replace(cfg.data, ignore_tokens=ignored),
        layout=configs.replace(cfg.layout, **{name: getattr(n, name) for name in _AXES}),
        pipeline=configs.replace(cfg.pipeline, stages=None),
    )  # fmt: skip


def _windows(cfg: Config, n: Numbers) -> list[int]:
    """The different ones in turn: of the new rows the same part, at least four keys so that attention stays one, and
    never all where they were not all."""
    if n.windows == (0,):
        return []
    old, new = cfg.train.seq_len, n.seq_len
    kept = n.windows[: n.num_layers]
    return list(kept) if old == new else [max(min(w * new // old, new - 1), 4) if 0 < w < old else 0 for w in kept]


def _spanned(moe: MoEConfig, edp: int, n: Numbers | Layout) -> int:
    """Ranks that tokens travel among."""
    return moe.placement.span(Grid(edp, n.ep)) * n.etp


def _per_layer(moe: MoEConfig, n: Numbers) -> PerLayer:
    """Lists as long as there are MoE layers now, of two numbers: the least of old is the least, the others the next.

    The first step is an early one: its top-k stay different where they fit.
    """
    old, layers = moe.per_layer, len(n.moe_layers)

    def resampled(numbers: list[int], length: int) -> list[int]:
        return [numbers[i * (len(numbers) - 1) // max(1, length - 1)] for i in range(length if numbers else 0)]

    extra, most = n.zero_computation, n.num_experts + sum(n.zero_computation)
    less = n.top_k > 1 and _takes(moe, num_experts=n.num_experts, extra=extra, top_k=n.top_k - 1)
    early = resampled(old.early_top_k, min(layers, len(old.early_top_k)))
    return PerLayer(
        experts=[n.num_experts * (1 + (e > min(old.experts))) for e in resampled(old.experts, layers)],
        top_k=[n.top_k if k == max(old.top_k) else n.top_k - less for k in resampled(old.top_k, layers)],
        early_top_k=[min(n.top_k + (k > max(old.top_k, default=moe.router.top_k)), most) for k in early],
        early_steps=min(old.early_steps, 1),
    )


def _covered(cfg: Config, n: Numbers) -> list[int] | None:
    """The layers to recompute, of dense ones and of MoE ones: all where all were, the last where some were."""
    if cfg.recompute.layers is None or n.num_layers == cfg.model.num_layers:
        return cfg.recompute.layers
    old, new, found = set(cfg.model.moe_layers), set(n.moe_layers), set()
    for was, now in ((old, new), (set(range(cfg.model.num_layers)) - old, set(range(n.num_layers)) - new)):
        if now and was & set(cfg.recompute.layers):
            found |= now if was <= set(cfg.recompute.layers) else {max(now)}
    return sorted(found) or [n.num_layers - 1]


def _for_one_step(cfg: Config) -> Config:
    """One step at the full learning rate and at the full batch, without checkpoints on the way."""
    decay = None if cfg.optim.decay is None else 1
    ramp = configs.replace(cfg.train.ramp, start=0)
    return configs.replace(
        cfg, train=configs.replace(cfg.train, steps=1, ramp=ramp),
        optim=configs.replace(cfg.optim, warmup=0, decay=decay),
        checkpoint=configs.replace(cfg.checkpoint, every=0),
    )  # fmt: skip


_CHANGED: tuple[tuple[str, str, Callable[[Config], Any]], ...] = (
    ("model.init_std", "routing is decisive, no gradient is tiny", lambda cfg: cfg.model.init_std),
    ("train.steps", "one step is run", lambda cfg: cfg.train.steps),
    ("optim.warmup", "step 0 has the full learning rate", lambda cfg: cfg.optim.warmup),
    ("optim.decay", "step 0 has the full learning rate", lambda cfg: cfg.optim.decay),
    ("checkpoint.every", "nothing is saved", lambda cfg: cfg.checkpoint.every),
    ("recompute.layers", "some of the new layers", lambda cfg: cfg.recompute.layers),
    ("model.windows", "rows are shorter", lambda cfg: cfg.model.windows),
    ("model.moe.dispatcher", "smaller groups of experts", lambda cfg: cfg.model.moe.dispatcher),
    ("model.moe.fp8_tile", "experts are narrower", lambda cfg: cfg.model.moe.fp8_tile),
    ("model.moe.rounding", "an expert has fewer tokens", lambda cfg: cfg.model.moe.rounding),
    ("data.ignore_tokens", "ids below the new vocabulary's size", lambda cfg: len(cfg.data.ignore_tokens)),
)
