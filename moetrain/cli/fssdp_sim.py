"""``moetrain fssdp-sim``: what each placement policy would cost on a cluster, from recorded or made-up loads."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from torch import Tensor

from moetrain import config as configs
from moetrain.cli.compose import compose
from moetrain.cli.preset import read_cluster
from moetrain.config import OPTIONS, UserError, config, nearest
from moetrain.job import Config
from moetrain.model.flops import layer_flops, score_flops, size
from moetrain.moe.placement.fssdp import FSSDP
from moetrain.moe.placement.types import PlacementPolicy
from moetrain.simulate.cluster import Cluster
from moetrain.simulate.loads import TRACES, Zipf, recorded
from moetrain.simulate.price import Layer, Travel
from moetrain.simulate.runs import Outcome, Sample, priced, run

_USAGE = """\
usage: moetrain fssdp-sim [trace=T] [cluster=C] [ranks=[N,...]] [key=value ...] [--json]

The time of an MoE layer, the bytes that move and the memory of a rank under every placement policy, on clusters that
are not here: policies plan as in a run, one step late, and what comes of it is priced. No GPU, no ranks.

  what it works on
    trace=PATH      loads.jsonl, or the folder of a run that had logging.load_trace=true
    trace=zipf      made up: the i-th hottest expert gets i^-exponent [this]
    trace=drift     the same, and the hot experts wander
      trace.exponent=X [1.0]  trace.steps=N [200]   both
      trace.every=N    [20]   trace.share=X [0.25]  drift: every N steps X of the experts change places
    cluster=NAME    p3dn, p4d [this], h100: configs/cluster/NAME.yaml; or a YAML file of yours
      cluster.nodes  .ranks_per_node  .ranks_per_nic   ranks_per_nic share a network card
      cluster.intra  .inter   GB/s a rank each way, in a node and between nodes      cluster.latency   us
      cluster.peak  TFLOP/s   cluster.gemm  .attention  shares of it reached         cluster.memory    GiB
    ranks=[8,32]    how many ranks [one node, all nodes]; ep = as many as divide the experts, edp the rest
    policies=[...]  of static, fssdp, shadow, replicate_all [all]; static is always there
    model=NAME ...  and any other key=value as for moetrain train: a rank has train.micro_batch x train.seq_len tokens;
                    placement=fssdp model.moe.placement.reshard_every=50 sets up one of the policies
  what is assumed
    sim.steps=N [8]  sim.layers=N [4]   how many steps and layers are priced, spread evenly
    sim.travel=direct|relay      an expert goes to each rank from its owner [direct], or once into each node and on
    sim.rematerialize=B [false]  replicas are freed after forward and gathered again in backward
    sim.weight_bytes=N [2]  sim.gradient_bytes=N [4]  sim.state_bytes=N [16]   of a parameter: moved, moved back, kept

  what is printed, of each policy: means over steps and layers, of a layer and step, forward and backward
    MoE ms, layer ms      the MoE layer; with attention. MoE x, layer x: static's time over it
    compute tokens experts reshard    its parts, ms: the fullest rank's rows; four all-to-alls; experts' travel that
                          attention does not hide; owners that change, over the steps in between
    tok MB, exp MB        bytes of tokens and of experts that leave a rank, mean over ranks
    own GiB, repl GiB     state of the experts that a rank owns; weights of those that it only holds; of all layers
    load, worst           rows of the fullest rank / mean: mean and worst
    repl                  replicas of a layer on a rank

docs/fssdp-sim.md has the model, what it leaves out, and how it compares with published figures.
"""
_FLAGS = ("--config", "--json", "--help")
_MOST_RANKS = 16_384


@config
class SimConfig:
    """Keys of ``sim.``: what is assumed."""

    steps: int = 8
    layers: int = 4
    travel: Travel = Travel.direct
    rematerialize: bool = False
    weight_bytes: int = 2
    gradient_bytes: int = 4
    state_bytes: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "weight_bytes", "gradient_bytes", "state_bytes"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"sim.{name}={value}: has to be at least 1")


def main(argv: list[str]) -> int:
    """Runs ``moetrain fssdp-sim ARGV``; raises ``UserError`` for the caller to print."""
    if any(word in ("-h", "--help") for word in argv):
        print(_USAGE, end="")
        return 0
    as_json, mine, words = _parse(argv)
    named, cluster = _cluster(mine)
    assumed = configs.load(mine.pop("sim", {}), SimConfig, "sim")
    ranks = _ranks(mine.pop("ranks", None), cluster)
    cfg = compose(words)
    layer = _layer(cfg, assumed)
    policies = _policies(mine.pop("policies", None), cfg)
    trace, loads = _loads(mine, cfg, tokens=layer.tokens * max(ranks))
    steps, layers = priced(policies.values(), loads, Sample(assumed.steps, assumed.layers))
    found: dict[int, list[Outcome]] = {}
    refused: dict[int, list[str]] = {}
    for n in ranks:
        found[n], refused[n] = [], []
        for name, policy in policies.items():
            try:
                found[n].append(
                    run(name, policy, loads, layer=layer, cluster=cluster, ranks=n, steps=steps, layers=layers,
                        regather=cfg.sharding.experts == 3)
                )  # fmt: skip
            except UserError as e:
                refused[n].append(f"{name}: {e}")
    if as_json:
        print(json.dumps(_data(cluster, layer, trace, steps, layers, found, refused), indent=1))
        return 0
    print("\n".join(_head(cfg, named, cluster, layer, trace, steps, layers)))
    for n in ranks:
        print("\n".join(_table(found[n], refused[n], cluster)))
    return 0


def _parse(argv: list[str]) -> tuple[bool, dict[str, Any], list[str]]:
    """(whether --json is there, this command's own words as nested data, the words for ``compose``)."""
    as_json, own, words, rest = False, {}, [], iter(argv)
    for word in rest:
        key, equals, text = word.partition("=")
        group, _, name = key.partition(".")
        if word == "--config":
            words += [word, *([path] if (path := next(rest, None)) else [])]
        elif word == "--json":
            as_json = True
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}{nearest(key, _FLAGS)} (there are: {', '.join(_FLAGS)})")
        elif group not in ("trace", "cluster", "sim", "ranks", "policies"):
            words.append(word)
        elif not equals or not text:
            raise UserError(f"{word!r} is not key=value: write for example trace=zipf trace.exponent=1.2 ranks=[8,32]")
        elif name and group in ("trace", "cluster", "sim"):
            own.setdefault(group, {})[name] = _value(word, text)
        elif name or group == "sim":
            known = [f.name for f in fields(SimConfig)]
            raise UserError(
                f"unknown key '{key}' (write ranks=..., policies=..., or sim.KEY=... of {', '.join(known)})"
            )
        else:
            own[group + "=" * (group in ("trace", "cluster"))] = (
                text if group in ("trace", "cluster") else _value(word, text)
            )
    return as_json, own, words


def _value(word: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{word!r} cannot be parsed: write for example ranks=[8,32]") from e


def _cluster(own: dict[str, Any]) -> tuple[str, Cluster]:
    name = own.pop("cluster=", "p4d")
    return Path(name).stem, read_cluster(name, own.pop("cluster", {}), Cluster, slurm=False)


def _ranks(value: Any, cluster: Cluster) -> list[int]:
    node = cluster.ranks_per_node
    value = [node, node * cluster.nodes] if value is None else value if isinstance(value, list) else [value]
    ranks = sorted({*configs.load(value, list[int], "ranks")})
    if not ranks:
        raise UserError("ranks=[]: give how many ranks to simulate, for example ranks=[8,32]")
    if ranks[-1] > _MOST_RANKS:
        raise UserError(f"ranks={ranks[-1]}: more than {_MOST_RANKS:,} is not simulated")
    for n in ranks:
        cluster.check(n)
    return ranks


def _policies(value: Any, cfg: Config) -> dict[str, PlacementPolicy]:
    """Static first; the one that ``placement=`` names as the config sets it up."""
    known, own = OPTIONS["placement"], cfg.model.moe.placement
    names = configs.load(value if isinstance(value, list) else [value], list[str], "policies") if value else list(known)
    for name in names:
        if name not in known:
            raise UserError(f"policies={name}: no such policy{nearest(name, known)} (there are: {', '.join(known)})")
    if isinstance(own, FSSDP) and own.calibrate:
        raise UserError("model.moe.placement.calibrate=true is not simulated: plans are a step late; set it to false")
    return {name: own if type(own) is known[name] else known[name]() for name in ["static", *names]}


def _layer(cfg: Config, assumed: SimConfig) -> Layer:
    """Of the model's MoE layers, means where they differ."""
    model, flops = cfg.model, layer_flops(cfg.model)
    if not model.moe_layers:
        raise UserError(f"the model has no MoE layer (model.num_layers={model.num_layers}): choose another model=")
    expert = 3 * model.dim * model.moe.hidden
    rows = [moe.router.top_k * moe.num_experts / moe.num_choices for moe in model.moe_configs]
    scores = fmean(score_flops(model, i, seq_len=cfg.train.seq_len) for i in model.moe_layers)
    return Layer(
        dim=model.dim, top_k=fmean(rows), expert_params=expert, tokens=cfg.train.micro_batch * cfg.train.seq_len,
        other_flops=scores + fmean(flops[i] - 2 * int(r * expert) for i, r in zip(model.moe_layers, rows, strict=True)),
        weight_bytes=assumed.weight_bytes, gradient_bytes=assumed.gradient_bytes, state_bytes=assumed.state_bytes,
        again=assumed.rematerialize, travel=assumed.travel,
    )  # fmt: skip


def _loads(own: dict[str, Any], cfg: Config, *, tokens: int) -> tuple[str, list[Tensor]]:
    """(what they are, in words; of each MoE layer its (steps, E))."""
    name, settings = own.get("trace=", "zipf"), own.get("trace", {})
    moes = cfg.model.moe_configs
    if name in TRACES:
        made: Zipf = configs.load(settings, TRACES[name], "trace")
        words = ", ".join(f"{key} {value}" for key, value in configs.dump(made).items())
        loads = [
            made.load(experts=moe.num_experts, top_k=min(moe.router.top_k, moe.num_experts), tokens=tokens, layer=i,
                      seed=cfg.seed)
            for i, moe in enumerate(moes)
        ]  # fmt: skip
        return f"{name}, {words}, seed {cfg.seed}", loads
    if settings:
        raise UserError(
            f"trace.{next(iter(settings))} is of trace=zipf and trace=drift, {name} is recorded: leave it out"
        )
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"trace={name}: no such file{nearest(name, TRACES)} (give a run's loads.jsonl, or {' or '.join(TRACES)})"
        )
    found = recorded(path, experts=[m.num_experts for m in moes], top_k=[m.router.top_k for m in moes])
    return f"{name}: steps {found.steps[0]} to {found.steps[-1]}, {found.tokens:,} tokens a step", found.loads


def _head(
    cfg: Config, named: str, c: Cluster, layer: Layer, trace: str, steps: list[int], layers: list[int]
) -> list[str]:
    model = cfg.model
    return [
        f"{size(model)}; {len(model.moe_layers)} MoE layers, {layer.tokens:,} tokens a rank, an expert of "
        f"{layer.expert_params * layer.weight_bytes / 2**20:.1f} MiB",
        f"trace {trace}; {len(steps)} steps of {len(layers)} layers priced",
        f"cluster {named}: {c.nodes} nodes of {c.ranks_per_node}, {c.intra:g} GB/s a rank inside, {c.inter:g} between "
        f"({c.ranks_per_nic} to a card), {c.peak:g} TFLOP/s (experts reach {c.gemm:.0%}, the rest {c.attention:.0%}), "
        f"{c.memory:g} GiB",
    ]


def _table(found: list[Outcome], refused: list[str], cluster: Cluster) -> list[str]:
    header = (
        "policy", "MoE ms", "layer ms", "MoE x", "layer x", "compute", "tokens", "experts", "reshard", "tok MB",
        "exp MB", "own GiB", "repl GiB", "load", "worst", "repl",
    )  # fmt: skip
    static = found[0]
    rows: list[tuple[str, ...]] = [header]
    for o in found:
        numbers = (
            o.moe,
            o.layer,
            static.moe / o.moe,
            static.layer / o.layer,
            o.compute,
            o.tokens,
            o.experts,
            o.reshard,
        )
        memory = (o.owned_gib, o.replicas_gib, o.overload, o.worst_overload)
        moved = (o.token_bytes / 1e6, o.expert_bytes / 1e6)
        cells = [f"{x:.2f}" for x in numbers] + [f"{x:,.1f}" for x in moved] + [f"{x:.2f}" for x in memory]
        rows.append((o.policy, *cells, f"{o.replicas:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "",
        f"{static.ranks:,} ranks: ep {static.ep}, edp {static.edp}; {static.attention:.2f} ms of attention a layer",
    ]
    lines += ["  ".join(f"{x:{'<' if i == 0 else '>'}{widths[i]}}" for i, x in enumerate(row)) for row in rows]
    lines += [
        f"{o.policy} does not fit: {o.owned_gib + o.replicas_gib:.1f} GiB of experts, a rank has {cluster.memory:g}"
        for o in found
        if o.owned_gib + o.replicas_gib > cluster.memory
    ]
    return lines + refused


def _data(
    cluster: Cluster, layer: Layer, trace: str, steps: list[int], layers: list[int],
    found: dict[int, list[Outcome]], refused: dict[int, list[str]],
) -> dict[str, Any]:  # fmt: skip
    """Everything, times in ms, bytes as they are."""
    return {
        "trace": trace, "cluster": configs.dump(cluster), "layer": configs.dump(layer), "steps": steps,
        "layers": layers,
        "ranks": [
            {
                "ranks": n, "ep": rows[0].ep, "edp": rows[0].edp, "refused": refused[n],
                "policies": {
                    o.policy: asdict(o) | {
                        "moe": o.moe, "layer": o.layer,
                        "speedup_moe": rows[0].moe / o.moe, "speedup_layer": rows[0].layer / o.layer,
                    }
                    for o in rows
                },
            }
            for n, rows in found.items()
        ],
    }  # fmt: skip
