"""``moetrain memory``: the bytes of a rank of each pipeline stage, from a dry run of the trainer's own step."""

import json
import time
import warnings
from dataclasses import asdict
from enum import Enum

from moetrain import config as configs
from moetrain.cli.compose import compose
from moetrain.config import UserError, config, nearest
from moetrain.job import Config, check
from moetrain.layouts import Layout
from moetrain.memory.dry import Estimate, estimate
from moetrain.memory.ledger import Kind
from moetrain.model.flops import size
from moetrain.world import Device

_USAGE = """\
usage: moetrain memory [key=value ...] [memory.KEY=VALUE ...] [--stage N] [--json]

Bytes of a rank at the peak of a training step, one row a rank of the pipeline: the trainer's own step, run in this
process on tensors without memory, as a rank of a world whose other ranks do not exist. Any layout, any size; no GPU,
no data.

    key=value   as for moetrain train; the layout says how many ranks there are
    --config F  or the config.yaml of a run, and overrides of its keys
    memory.world=N      how many ranks, where layout.dp is -1 [the fewest that the layout allows]
    memory.imbalance=X  the most loaded rank of an expert group receives X times its even share of rows [1.0]
    memory.device=D     cuda: the code that runs on GPUs, cpu: that on CPUs [cpu with train.device=cpu, else cuda]
    --stage N   only the pipeline's rank that has this stage
    --json      bytes, as JSON
"""
_FLAGS = ("--config", "--stage", "--json", "--help")


class Code(Enum):
    cpu = "cpu"
    cuda = "cuda"


_CODE = {Code.cpu: "CPU", Code.cuda: "GPU"}


@config
class MemoryConfig:
    """Keys of ``memory.``: what is assumed, beside the run's own config."""

    world: int | None = None
    imbalance: float = 1.0
    device: Code | None = None

    def __post_init__(self) -> None:
        if self.world is not None and self.world < 1:
            raise UserError(f"memory.world={self.world}: has to be at least 1")
        if not self.imbalance > 0:
            raise UserError(f"memory.imbalance={self.imbalance}: has to be above 0; 1 is an even load")


def main(argv: list[str]) -> int:
    """Runs ``moetrain memory ARGV``; raises ``UserError`` for the caller to print."""
    if any(word in ("-h", "--help") for word in argv):
        print(_USAGE, end="")
        return 0
    stage, as_json, assumed, words = _parse(argv)
    cfg = compose(words)
    world = assumed.world or cfg.layout.world
    layout = check(cfg, world=world)
    pp, last = layout.pp, layout.pp * cfg.pipeline.stages_a_rank - 1 if layout.pp > 1 else 0
    if stage is not None and not 0 <= stage <= last:
        raise UserError(f"--stage {stage}: layout.pp={pp} has stages 0 to {last}")
    device = assumed.device or (Code.cpu if cfg.train.device is Device.cpu else Code.cuda)
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            estimate(cfg, world=world, at=at, imbalance=assumed.imbalance, gpu=device is Code.cuda)
            for at in (range(pp) if stage is None else [cfg.pipeline.rank_of(stage, pp=pp)])
        ]
    seconds = time.monotonic() - start
    if as_json:
        print(json.dumps(_data(cfg, layout, assumed, device, found), indent=1))
    else:
        print("\n".join(_page(cfg, layout, assumed, device, found, seconds)))
    return 0


def _parse(argv: list[str]) -> tuple[int | None, bool, MemoryConfig, list[str]]:
    """(the stage, whether --json is there, what is assumed, the words for ``compose``)."""
    stage, as_json, mine, words, rest = None, False, [], [], iter(argv)
    for word in rest:
        option, equals, text = word.partition("=")
        if word == "--config":
            words += [word, *([path] if (path := next(rest, None)) else [])]
        elif word == "--json":
            as_json = True
        elif option == "--stage":
            text = text if equals else next(rest, "")
            if not text.isdecimal():
                raise UserError(f"--stage {text or 'without a number'}: give a stage, for example --stage 0")
            stage = int(text)
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}{nearest(option, _FLAGS)} (there are: {', '.join(_FLAGS)})")
        elif word.startswith("memory."):
            mine.append(word)
        else:
            words.append(word)
    return stage, as_json, _assumed(mine), words


def _assumed(words: list[str]) -> MemoryConfig:
    data: dict = {}
    for word in words:
        key, equals, text = word.removeprefix("memory.").partition("=")
        if not equals:
            raise UserError(f"{word!r} is not key=value: write for example memory.imbalance=1.5")
        data[key] = _value(text)
    return configs.load(data, MemoryConfig, "memory")


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _page(
    cfg: Config, layout: Layout, assumed: MemoryConfig, device: Code, found: list[Estimate], seconds: float
) -> list[str]:
    t = cfg.train
    ranks = f"{layout.world:,} rank{'s' * (layout.world > 1)}"
    micro_batches = t.batch // (layout.dp * t.micro_batch)
    lines = [
        f"{size(cfg.model)}; {ranks}, layout {layout}",
        f"{t.dtype.value}, {t.micro_batch} x {t.seq_len:,} tokens a micro-batch, {micro_batches} a step; GiB of a rank "
        "at the peak of a step",
        "",
    ]
    rows: list[tuple[str, ...]] = [("stage", "layers", "rank", *(kind.value for kind in Kind), "peak", "in")]
    for e in found:
        numbers = (*e.peak.by_kind.values(), e.peak.total)
        stages = ",".join(map(str, e.stages))
        rows.append(
            (
                stages,
                ",".join(_words(n) for n in e.layers),
                str(e.rank),
                *(f"{n / 2**30:.3f}" for n in numbers),
                e.peak.when,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    ran = " to ".join(map(str, sorted({min(e.micro_batches for e in found), max(e.micro_batches for e in found)})))
    lines += [
        "",
        f"{seconds:.1f} s, on tensors without memory, by the code for {_CODE[device]}s: a step of each stage's first "
        "rank, which holds",
        f"the most where a split is uneven, of {ran} micro-batch{'es' * (ran != '1')}, which meet whatever "
        f"{micro_batches} do. Rows received: {assumed.imbalance:g} x an even",
        "share. Not counted: what kernels and communication libraries take for themselves, and what the allocator",
        "cannot fill.",
    ]
    return lines


def _words(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else str(layers.start)


def _data(cfg: Config, layout: Layout, assumed: MemoryConfig, device: Code, found: list[Estimate]) -> dict:
    return {
        "layout": asdict(layout), "world": layout.world, "dtype": cfg.train.dtype.value, "device": device.value,
        "imbalance": assumed.imbalance,
        "stages": [
            {
                "stages": e.stages, "layers": [[n.start, n.stop] for n in e.layers], "rank": e.rank,
                "micro_batches": e.micro_batches, "in": e.peak.when, "peak": e.peak.total,
                "at_peak": {kind.value: n for kind, n in e.peak.by_kind.items()},
                "between_steps": {kind.value: n for kind, n in e.between_steps.by_kind.items()},
            }
            for e in found
        ],
    }  # fmt: skip
