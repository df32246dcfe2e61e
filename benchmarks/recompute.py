"""What each choice of recompute costs and frees: whole steps in turns, seconds a step against GiB at its peak.

    python benchmarks/recompute.py [--write] [--device cuda] [key=value ...]          tiny on this CPU; two minutes

Keys are those of `moetrain train`, of one rank. The peak is what `moetrain memory` foretells; of a GPU it is measured.
The last column is what to choose by: milliseconds that a step takes longer for each 100 MiB less at its peak.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from intervals import ratio, shown
from saving import begin, end

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.cli.compose import compose
from moetrain.job import Config, Data
from moetrain.memory.dry import estimate
from moetrain.train import Trainer
from moetrain.verify.tokens import Synthetic
from moetrain.world import World

RESULTS = Path(__file__).parent / "results" / "recompute-cpu.json"
CHOICES = {
    "none": [],
    "norm": ["recompute.mode=selective", "recompute.parts=[norm]"],
    "norm, experts_activation (selective)": ["recompute.mode=selective"],
    "attention": ["recompute.mode=selective", "recompute.parts=[attention]"],
    "moe": ["recompute.mode=selective", "recompute.parts=[moe]"],
    "norm, attention, moe": ["recompute.mode=selective", "recompute.parts=[norm,attention,moe]"],
    "full": ["recompute.mode=full"],
    "none, loss_rows=256": ["recompute.loss_rows=256"],
    "full, loss_rows=256": ["recompute.mode=full", "recompute.loss_rows=256"],
}
PAIRS = 20


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    began, report = time.monotonic(), begin("recompute: time against memory", keys=args.keys, pairs=args.pairs)
    trainers, peaks = {}, {}
    for name, keys in CHOICES.items():
        cfg = compose(
            [
                "model=tiny",
                "layout.dp=1",
                "train.batch=4",
                "optim.warmup=0",
                f"train.device={device.type}",
                *args.keys,
                *keys,
            ]
        )
        if device.type == "cpu":
            peaks[name] = estimate(cfg, world=1).peak.total
        trainers[name] = trainer(cfg, device)
    seconds: dict[str, list[float]] = {name: [] for name in CHOICES}
    for block in range(args.pairs + 2):
        order = list(CHOICES)[block % len(CHOICES) :] + list(CHOICES)[: block % len(CHOICES)]
        for name in order:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            since = time.perf_counter()
            trainers[name].step().loss.item()
            if block >= 2:
                seconds[name].append(time.perf_counter() - since)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated()
    report["rows"], plain = {}, statistics.median(seconds["none"])
    print("\n| recompute | step, ms | beside none (95%) | peak, MiB | freed, MiB | ms for 100 MiB |")
    print("|---|---|---|---|---|---|")
    for name, times in seconds.items():
        longer, freed = statistics.median(times) - plain, (peaks["none"] - peaks[name]) / 2**20
        cost = f"{1e3 * longer / freed * 100:.1f}" if freed > 0 else "-"
        found = ratio(seconds["none"], times)
        print(
            f"| `{name}` | {1e3 * statistics.median(times):.0f} | {shown(found)} | {peaks[name] / 2**20:.0f} | "
            f"{freed:.0f} | {cost} |"
        )
        report["rows"][name] = {"ms": 1e3 * statistics.median(times), "ratio": found, "peak": peaks[name]}
    end(report, RESULTS, began=began, write=args.write)


def trainer(cfg: Config, device: torch.device) -> Trainer:
    data = Synthetic(cfg.data, seq_len=cfg.train.seq_len, vocab_size=cfg.model.vocab_size, seed=1)
    return Trainer(cfg, World(0, 1, 0, 1, device, ""), Data({}, data, {}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    main(options)
