"""Layouts as integers: one list of ranks, reshaped under different names for different parts of the model (folding).

    dense:   (pp, dp, cp, tp)                     attention, gates, shared experts, dense layers
    moe:     (pp, edp, ep, etp)                   routed experts; ep may exceed dp: it folds over dp, cp and tp
    fsdp:    (pp, replicate, dp*cp/replicate, tp) storage of dense parameters: context ranks hold the same weights
    experts: (pp, replicate, edp/replicate, ep*etp) storage of experts; whole replicas where they divide edp

The pipeline axis comes first in every view, so a rank is on the same stage whichever view it looks through
(arXiv 2504.14960 with the pipeline outermost). No torch here: ``mesh.py`` makes process groups of these integers.
"""

import itertools
import math
from dataclasses import dataclass

from moetrain.config import UserError, config, replace

AXES = ("pp", "dp", "cp", "tp", "ep", "etp")
_NO_AXIS = ("replicate",)  # how dp is stored, not another way to split the work


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a layout has to divide."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    experts: tuple[int, ...] = ()  # the different numbers of experts that its MoE layers have, ascending
    ulysses: bool = False  # context parallelism deals heads, not keys and values


@config
class Layout:
    """How many ways each thing is split. ``dp`` = -1 takes the ranks that are left; ``edp`` always does.

    ``replicate`` copies of the weights are kept within dp, each sharded over dp / replicate * cp ranks (HSDP).
    """

    pp: int = 1
    dp: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    replicate: int = 1

    def __post_init__(self) -> None:
        for axis in (*AXES, *_NO_AXIS):
            value = getattr(self, axis)
            if value < 1 and not (axis == "dp" and value == -1):
                also = " (or -1: the ranks that are left)" if axis == "dp" else ""
                raise UserError(f"layout.{axis}={value}: a degree is at least 1{also}")

    @property
    def edp(self) -> int:
        """Expert data parallel degree of a solved layout."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def world(self) -> int:
        """Ranks that a layout asks for: exactly, or at the least where dp = -1."""
        if self.dp != -1:
            return self.pp * self.dp * self.cp * self.tp
        inner, experts = self.replicate * self.cp * self.tp, self.ep * self.etp
        return self.pp * math.lcm(inner, experts)

    def solve(self, world: int, shape: ModelShape | None = None) -> "Layout":
        """Fill in ``dp`` and check that both views tile the world exactly; raises ``UserError`` with the numbers.

        ``shape`` is not checked here; given, the layouts that the error proposes fit that model.
        """
        if rule := _world_rule(self, world):
            raise UserError(rule + _nearest_words(self, world, shape))
        return self if self.dp != -1 else replace(self, dp=world // (self.pp * self.cp * self.tp))

    def words(self) -> str:
        """As a user writes it: "pp=1 dp=2 cp=1 tp=2 ep=4 etp=1"."""
        axes = AXES if self.replicate == 1 else (*AXES, *_NO_AXIS)
        return " ".join(f"{axis}={getattr(self, axis)}" for axis in axes)

    def __str__(self) -> str:
        copies = f" replicate{self.replicate}" if self.replicate > 1 else ""
        return " ".join(f"{axis}{getattr(self, axis)}" for axis in AXES) + f" edp{self.edp}" + copies


def views(layout: Layout) -> dict[str, dict[str, int]]:
    """Name -> axis -> size of a solved layout, outermost first. Pure arithmetic, testable without any process."""
    n, copies = layout, math.gcd(layout.replicate, layout.edp)
    return {
        "dense": {"pp": n.pp, "dp": n.dp, "cp": n.cp, "tp": n.tp},
        "moe": {"pp": n.pp, "edp": n.edp, "ep": n.ep, "etp": n.etp},
        "fsdp": {"pp": n.pp, "replicate": n.replicate, "shard": n.dp * n.cp // n.replicate, "tp": n.tp},
        "experts": {"pp": n.pp, "replicate": copies, "shard": n.edp // copies, "ep_etp": n.ep * n.etp},
    }


def slices(view: dict[str, int], axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Every group of ranks that differ only along ``axes``, in rank order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, at in enumerate(itertools.product(*map(range, view.values()))):
        fixed = tuple(i for i, axis in zip(at, view, strict=True) if axis not in axes)
        groups.setdefault(fixed, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def kinds(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Name -> (view, axes) of every kind of group that ranks communicate in."""
    found = {
        "tp": ("dense", "tp"),
        "cp": ("dense", "cp"),
        "dp": ("dense", "dp"),
        "sequence = cp*tp": ("dense", "cp", "tp"),
        "dp*cp storage": ("fsdp", "shard"),
        "ep*etp": ("moe", "ep", "etp"),
        "ep": ("moe", "ep"),
        "etp": ("moe", "etp"),
        "edp": ("moe", "edp"),
        "pp": ("dense", "pp"),
    }
    if layout.replicate > 1:
        found = {name.replace("dp*cp", f"dp*cp/{layout.replicate}"): of for name, of in found.items()}
        found["replicate"] = ("fsdp", "replicate")
    return found


@dataclass(frozen=True)
class Groups:
    """The groups of one kind of a layout: how many, of how many ranks, so far apart, how many of them across nodes."""

    name: str
    size: int
    stride: int = 0
    count: int = 0
    across: int = 0


def groups(layout: Layout, node: int) -> list[Groups]:
    """Every kind of group of a solved layout, where a node holds ``node`` ranks; those of one rank have a size only."""
    found = []
    for name, (view, *axes) in kinds(layout).items():
        every = slices(views(layout)[view], tuple(axes))
        size = len(every[0])
        across = sum(ranks[0] // node != ranks[-1] // node for ranks in every)
        found.append(Groups(name, size, every[0][1] - every[0][0], len(every), across) if size > 1 else Groups(name, 1))
    return found


def coordinates(view: dict[str, int], rank: int) -> dict[str, int]:
    """Where a rank stands on each axis of a view."""
    found = {}
    for axis in reversed(view):
        rank, found[axis] = divmod(rank, view[axis])
    return {axis: found[axis] for axis in view}


def folds(layout: Layout) -> dict[str, tuple[str, ...]]:
    """ep, etp and edp of a solved layout -> the dense axes along which ranks of one such group differ, outermost first.

    For dp2 cp2 tp4 with ep4 etp2: {"ep": ("cp", "tp"), "etp": ("tp",), "edp": ("dp",)}. An axis of size 1: none.
    """
    seen = views(layout)
    moe, dense = seen["moe"] | {"pp": 1}, seen["dense"] | {"pp": 1}  # every stage is folded alike
    found = {}
    for axis in ("ep", "etp", "edp"):
        at = [[coordinates(dense, rank) for rank in ranks] for ranks in slices(moe, (axis,))]
        found[axis] = tuple(a for a in ("dp", "cp", "tp") if any(c[a] != group[0][a] for group in at for c in group))
    return found


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def legal(world: int, *, pp: int | None = None) -> list[Layout]:
    """Every layout of ``world`` ranks, without replicas: pp*dp*cp*tp = pp*edp*ep*etp = world. ``pp``: that depth only.

    10 / 46 / 146 / 460 / 371 / 1,460 at 2 / 4 / 8 / 12 / 16 / 24 ranks.
    """
    return [
        Layout(pp=stages, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp)
        for stages in divisors(world)
        if pp in (None, stages)
        for dp, cp, tp in _triples(world // stages)
        for _, ep, etp in _triples(world // stages)
    ]


def count_legal(world: int, *, pp: int | None = None) -> int:
    """``len(legal(world, pp=pp))``, without making them."""
    return sum(len(_triples(world // stages)) ** 2 for stages in divisors(world) if pp in (None, stages))


def broken_rule(layout: Layout, shape: ModelShape, *, near: int = 3) -> str | None:
    """What a layout with its ``dp`` filled in breaks, alone or for a model: one line, or None for a legal one.

    The line ends with the ``near`` nearest layouts of the same world size that break nothing. Nothing else is a rule:
    hidden widths and sequence lengths are padded to what a layout needs.
    """
    assert layout.dp != -1, "solve it first"
    rule = _world_rule(layout, layout.world) or _model_rule(layout, shape)
    return rule and rule + _nearest_words(layout, layout.world, shape, near)


def nearest_legal(layout: Layout, world: int, shape: ModelShape | None, count: int = 3) -> list[Layout]:
    """Layouts of ``world`` ranks that break no rule: fewest axes changed first, then the smallest changes by ratio.

    ``dp`` = -1 counts as unchanged whatever it becomes. ``replicate`` is kept where it divides dp, else it becomes 1.
    """
    found = []
    for pp in divisors(world):
        triples = _triples(world // pp)
        dense, experts = [], []  # no rule and no distance mixes the two, so the best of each make the best of all
        for a, b, c in triples:
            copies = layout.replicate if a % layout.replicate == 0 else 1
            dense.append({"pp": pp, "tp": c, "cp": b, "dp": a, "replicate": copies})
            experts.append({"etp": c, "ep": b})
        halves = []
        for half in (dense, experts):
            half.sort(key=lambda degrees: _distance(layout, degrees))
            fit = (h for h in half if shape is None or _model_rule(Layout(**h), shape) is None)
            halves.append(list(itertools.islice(fit, count)))
        found += [a | b for a, b in itertools.product(*halves)]
    found.sort(key=lambda degrees: _distance(layout, degrees))
    return [Layout(**degrees) for degrees in found[:count]]


def _distance(layout: Layout, degrees: dict[str, int]) -> tuple[int, float, tuple[int, ...]]:
    """(axes changed, sum of |log ratio|, the degrees: in a tie dp takes more, then cp)."""
    pairs = [(getattr(layout, axis), to) for axis, to in degrees.items()]
    moved = [(have, to) for have, to in pairs if have not in (to, -1)]
    return len(moved), round(sum(abs(math.log(to / have)) for have, to in moved), 9), tuple(degrees.values())


def _triples(n: int) -> list[tuple[int, int, int]]:
    """Every ordered (a, b, c) with a*b*c = n, the largest a first."""
    return sorted(((n // b // c, b, c) for c in divisors(n) for b in divisors(n // c)), key=lambda t: (-t[0], t[1:]))


def _nearest_words(layout: Layout, world: int, shape: ModelShape | None, count: int = 3) -> str:
    found = nearest_legal(layout, world, shape, count)
    return "; nearest legal: " + " or ".join(near.words() for near in found) if found else ""


def _world_rule(layout: Layout, world: int) -> str | None:
    n, rest = layout, layout.pp * layout.cp * layout.tp
    if n.dp == -1 and world % rest:
        return (
            f"layout pp*cp*tp = {n.pp}*{n.cp}*{n.tp} = {rest} does not divide the {world} ranks there are: start a "
            f"multiple of {rest} ranks or lower pp, cp or tp"
        )
    dp = world // rest if n.dp == -1 else n.dp
    if rest * dp != world:
        return (
            f"layout pp*dp*cp*tp = {n.pp}*{dp}*{n.cp}*{n.tp} = {rest * dp} does not equal the {world} ranks there are: "
            f"start {rest * dp} ranks or set layout.dp=-1"
        )
    experts = n.pp * n.ep * n.etp
    if world % experts:
        return (
            f"layout pp*ep*etp = {n.pp}*{n.ep}*{n.etp} = {experts} does not divide the {world} ranks there are: ep*etp "
            f"has to divide dp*cp*tp = {dp * n.cp * n.tp}"
        )
    if dp % n.replicate:
        return (
            f"layout.replicate={n.replicate} does not divide dp={dp}: each copy of the weights takes a whole number of "
            f"data-parallel ranks, use one of {divisors(dp)}"
        )
    return None


def _model_rule(layout: Layout, shape: ModelShape) -> str | None:
    n, heads, kv_heads = layout, shape.num_heads, shape.num_kv_heads
    if n.pp > shape.num_layers:
        return (
            f"layout.pp={n.pp} is more than model.num_layers={shape.num_layers}: a stage takes at least one layer, use "
            f"layout.pp={shape.num_layers} or less"
        )
    fits = [tp for tp in divisors(heads) if tp % kv_heads == 0 or kv_heads % tp == 0]
    if heads % n.tp:
        return f"layout.tp={n.tp} does not divide model.num_heads={heads}: use one of {fits}"
    if n.tp not in fits:
        return (
            f"layout.tp={n.tp} and model.num_kv_heads={kv_heads}: one has to divide the other, so that each rank has "
            f"whole key-value heads or a copy of one, use one of {fits}"
        )
    each = heads // n.tp
    if shape.ulysses and each % n.cp:
        return (
            f"layout.cp={n.cp} does not divide model.num_heads / layout.tp = {heads} / {n.tp} = {each}, as ulysses "
            f"needs: use one of {divisors(each)} or context.method=allgather"
        )
    for experts in shape.experts:
        if experts % n.ep:
            key = "num_experts=" if len(shape.experts) == 1 else "per_layer.experts: "
            return (
                f"layout.ep={n.ep} does not divide model.moe.{key}{experts}: use one of "
                f"{divisors(math.gcd(*shape.experts))}"
            )
    return None
