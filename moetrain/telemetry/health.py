"""Router health: what the MoE layers of a run look like at a logging step, the same under every layout.

A step that is logged is watched (``moe/watch.py``): each rank puts its part of what is not known everywhere into one
flat vector, which is summed over all ranks together with the step's other metrics, in one all-reduce, and read in one
copy. A maximum cannot be summed: each rank writes its own into a slot of its own, and a sum with zeros is exact, so the
rank with a NaN is known too. Between logging steps there is no collective and no copy: the smoothed load is
averaged on the device from the load that a step all-reduces anyway.

Shape letters:
    L MoE layers of the model   E experts, zero-computation experts last, of the layer with the most   P pairs of them
    R ranks   G ranks of a stage's edp x ep grid
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moetrain.config import UserError, config
from moetrain.mesh import Mesh
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.watch import pair_at
from moetrain.telemetry.alerts import METRICS, AlertConfig

MOST_LOADS = 4096
"""Loads in a record of metrics.jsonl; where a model has more experts, the means of neighbours."""

_COLUMNS = 10
"""Numbers a layer that ``brief`` leaves, before its load and the copies of its experts."""


@config
class HealthConfig:
    """``smoothing``: what the smoothed load keeps of itself each step (0.95: it looks back some 20 steps)."""

    enabled: bool = True
    smoothing: float = 0.95
    pairs: bool = True  # count pairs of experts: 4 E^2 bytes a layer in the all-reduce of a logging step
    alerts: list[AlertConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"health.smoothing={self.smoothing}: has to be at least 0 and below 1 (try 0.95)")
        if self.alerts and not self.enabled:
            raise UserError("health.alerts need health.enabled=true: switch it on, or set health.alerts=[]")


@dataclass(frozen=True)
class Reading:
    """The health of every MoE layer at one step."""

    layers: dict[int, dict[str, float]]  # layer -> its METRICS
    load: list[list[float]]  # of each layer the load of every expert / the mean load
    top_pair: list[tuple[int, int]]  # the experts of the most frequent pair
    logit_rank: list[int]  # the rank that saw the largest logit, or the first one that is not a number
    copies: list[list[int]]  # of each layer how many replicas every expert has; [] where none travel

    @property
    def not_finite(self) -> str | None:
        """The first layer with a router logit that is infinite or not a number, in words."""
        found = [
            f"largest router logit {values['largest_logit']} in layer {layer} on rank {rank}"
            for (layer, values), rank in zip(self.layers.items(), self.logit_rank, strict=True)
            if not math.isfinite(values["largest_logit"])
        ]
        return found[0] + (f" (and {len(found) - 1} more layers)" if found[1:] else "") if found else None

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl: metric -> a number a layer, four digits; ``load``, of ``neighbours`` where it is long."""
        series: dict[str, Any] = {name: [_short(x[name]) for x in self.layers.values()] for name in METRICS}
        run = -(-sum(map(len, self.load)) // MOST_LOADS)
        series["load"] = [[round(x, 2) for x in _merged(load, run)] for load in self.load]
        series["top_pair_experts"] = [list(pair) for pair in self.top_pair]
        if any(map(any, self.copies)) and sum(map(len, self.copies)) <= MOST_LOADS:
            series["copies"] = self.copies
        return series | ({"neighbours": run} if run > 1 else {})


class Health:
    """Makes a run's readings on one rank. Every rank holds one; nothing of a batch is kept but the smoothed load."""

    def __init__(self, cfg: HealthConfig, *, layers: dict[int, MoEConfig], mesh: Mesh) -> None:
        """``layers``: the model's MoE layers, wherever they are, by their number."""
        self.cfg, self.layers, self.mesh, self.moes = cfg, list(layers), mesh, list(layers.values())
        choices = [moe.num_choices for moe in self.moes]
        L, E, n = len(layers), max(choices), mesh.layout
        self.travels = any(moe.placement.travels for moe in self.moes)
        P = E * (E - 1) // 2 if cfg.pairs and any(moe.router.top_k > 1 for moe in self.moes) else 0
        self.sizes = {
            "dropped": (L,),
            "bias": (L,),
            "logit": (L, mesh.world),
            "rows": (L, n.edp * n.ep),
            "pairs": (L, P),
            "home": (L, n.edp * n.ep * self.travels),
            "copies": (L, max(moe.num_experts for moe in self.moes) * self.travels),
            "moved": (L * self.travels,),
        }
        self.smooth_LE = torch.zeros(L, E, dtype=torch.float64, device=mesh.device)
        self.choices_L = torch.tensor(choices, device=mesh.device)

    def smooth(self, load_LE: Tensor) -> None:
        """After every step, given its global load: on the device, nobody waits."""
        share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp_min(1).double()
        self.smooth_LE.lerp_(share_LE, 1 - self.cfg.smoothing)

    def part(self, layers: Iterable[MoE]) -> Tensor:
        """This rank's layers after a watched step -> its part of the flat float64 vector, whose SUM ``brief`` takes."""
        flat = torch.zeros(sum(map(math.prod, self.sizes.values())), dtype=torch.float64, device=self.mesh.device)
        parts = self._parts(flat)
        for layer in layers:
            i, watch = self.layers.index(layer.layer), layer.watch
            assert watch is not None, "the step was not watched"
            parts["dropped"][i] = layer.dropped_ME.sum()
            parts["logit"][i, self.mesh.rank] = watch.logit_M.amax()
            parts["rows"][i] = _rows_sent(layer, parts["rows"].shape[1])
            if self.travels:
                at = layer.placement
                parts["home"][i].scatter_add_(0, at.owner_E.to(flat.device), _kept(layer).double())
                parts["moved"][i] = layer.experts.sent / 1e6
                if layer.rank == 0 and self.mesh.index("moe", "etp") == 0:
                    parts["copies"][i, : layer.cfg.num_experts] = at.holds_RE.sum(0) - 1
            if parts["pairs"].shape[1]:
                parts["pairs"][i, : len(watch.pairs_P)] = watch.pairs_P
            if self.mesh.index("moe", "edp", "ep", "etp") == 0:  # one of the ranks that all know it
                parts["bias"][i] = layer.bias_E.double().norm()
        return flat

    def brief(self, flat: Tensor, load_LE: Tensor) -> Tensor:
        """The summed vector and the step's global load -> (L, 8 + E) float64, all that the host needs to know."""
        parts = self._parts(flat)
        logit_L, rank_L = parts["logit"].max(1)  # a NaN is the largest
        rows_LG, pairs_LP = parts["rows"], parts["pairs"]
        home_LG = parts["home"] if self.travels else rows_LG
        pairs_LP = pairs_LP if pairs_LP.shape[1] else pairs_LP.new_zeros(len(self.layers), 1)
        most_L, place_L = pairs_LP.max(1)
        smooth_L = self.smooth_LE.sum(1) / self.choices_L
        columns = [
            parts["dropped"], parts["bias"], logit_L, rank_L, rows_LG.amax(1) / rows_LG.mean(1),
            most_L / pairs_LP.sum(1).clamp_min(1), place_L, self.smooth_LE.amax(1) / smooth_L - 1,
            home_LG.amax(1) / home_LG.mean(1), parts["moved"] if self.travels else torch.zeros_like(parts["bias"]),
        ]  # fmt: skip
        return torch.cat([torch.stack([c.double() for c in columns], 1), load_LE.double(), parts["copies"]], 1)

    @property
    def columns(self) -> int:
        """Of what ``brief`` returns."""
        return _COLUMNS + self.smooth_LE.shape[1] + self.sizes["copies"][1]

    def read(self, rows: list[list[float]], *, tokens: int) -> Reading:
        """``brief``, on the host; ``tokens`` of the step that are not padding."""
        layers, load, top_pair, logit_rank, copies = {}, [], [], [], []
        for layer, moe, row in zip(self.layers, self.moes, rows, strict=True):
            dropped, bias, logit, rank, overload, pair, place, smooth, home, moved, *load_E = row
            copies_E = [int(n) for n in load_E[self.smooth_LE.shape[1] :]][: moe.num_experts]
            load_E = load_E[: moe.num_choices]
            total, E, sent = max(1.0, sum(load_E)), len(load_E), sum(load_E[: moe.num_experts])
            even_E = [x * E / total for x in load_E]
            layers[layer] = {
                "max_violation": max(even_E) - 1, "smooth_max_violation": smooth,
                "variation": math.sqrt(sum((x - 1) ** 2 for x in even_E) / E), "entropy": _entropy(load_E),
                "dead": sum(x == 0 for x in load_E), "drop_rate": dropped / max(1.0, sent),
                "overload": 1.0 if math.isnan(overload) else overload,
                "home_overload": 1.0 if math.isnan(home) else home, "replicas": sum(copies_E), "moved": moved,
                "bias_norm": bias, "largest_logit": logit,
                "top_pair": pair, "ffn_experts": sent / tokens,
            }  # fmt: skip
            load.append(even_E)
            copies.append(copies_E)
            top_pair.append(pair_at(int(place)))
            logit_rank.append(int(rank))
        return Reading(layers, load, top_pair, logit_rank, copies)

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> its view of the vector."""
        pieces = flat.split([math.prod(size) for size in self.sizes.values()])
        return {name: x.view(size) for (name, size), x in zip(self.sizes.items(), pieces, strict=True)}


def _kept(layer: MoE) -> Tensor:
    """(experts,) int64: this rank's assignments to each that were not dropped."""
    return (layer.load_ME - layer.dropped_ME).sum(0)[: layer.cfg.num_experts]


def _rows_sent(layer: MoE, places: int) -> Tensor:
    """(G,) int64: how many assignments of this rank's tokens each rank of the experts' grid computes."""
    kept_E = _kept(layer)
    where, span = layer.placement, layer.placement.span
    target_EJ = where.target_EJ(layer.rank, kept_E.device, etp=layer.etp)
    peer_E = target_EJ[:, 0] // (where.num_slots * layer.etp) + layer.rank // span * span
    return kept_E.new_zeros(places).scatter_add_(0, peer_E, kept_E)


def _entropy(load_E: list[float]) -> float:
    total = sum(load_E)
    shares = [x / total for x in load_E if x] if total else []
    return -sum(p * math.log(p) for p in shares) / math.log(len(load_E)) if len(load_E) > 1 else 1.0


def _merged(values: list[float], run: int) -> list[float]:
    parts = [values[i : i + run] for i in range(0, len(values), run)]
    return [sum(p) / len(p) for p in parts]


def _short(x: float) -> float | int:
    return x if isinstance(x, int) else float(f"{x:.4g}")
