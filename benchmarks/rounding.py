"""Loss with weights kept in bfloat16, rounded stochastically or to nearest, beside float32 masters: real text, a CPU.

    python benchmarks/rounding.py                    # 400 steps each; prints a table, writes results/rounding-cpu.json
    python benchmarks/rounding.py --runs 'masters 0.003 0' --steps 20

The quickstart's model and data on one rank, a thread, 8 x 128 tokens a step, everything computed in bfloat16; what
differs is what is kept between two steps. Runs of one seed begin with the same weights (in bfloat16: those rounded to
nearest) and see the same samples in the same order. Rounding to nearest is here alone: moetrain does not offer it. A
run that is in the results already is not run again: remove the file to start anew.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from saving import begin, end, save
from torch import Tensor

from moetrain.cli.compose import compose
from moetrain.job import open_data
from moetrain.optim import rounding
from moetrain.train import Trainer
from moetrain.world import World

KEPT = {
    "masters": [],
    "stochastic": ["optim.weight_dtype=bfloat16"],
    "nearest": ["optim.weight_dtype=bfloat16"],
    "stochastic, state bf16": ["optim.weight_dtype=bfloat16", "optim.state_dtype=bfloat16"],
    "masters, state bf16": ["optim.state_dtype=bfloat16"],
}
RATES = [3e-4, 3e-3]
LAST = 20
"""Steps that a training loss is the mean of."""
RESULTS = Path(__file__).parent / "results" / "rounding-cpu.json"


def to_nearest(x: Tensor, bits: Tensor) -> None:
    x.copy_(x.bfloat16())


def run(kept: str, rate: float, seed: int, steps: int) -> dict:
    cfg = compose([
        "experiment=quickstart", "layout=auto", "train.dtype=bfloat16", "train.device=cpu", "train.batch=8",
        "train.micro_batch=8", "train.seq_len=128", f"train.steps={steps}", f"optim.warmup={min(40, steps)}",
        f"optim.lr={rate}", f"seed={seed}", *KEPT[kept],
    ])  # fmt: skip
    right = rounding.round_
    try:
        if kept == "nearest":
            rounding.round_ = to_nearest
        trainer = Trainer(cfg, World(0, 1, 0, 1, torch.device("cpu"), ""), open_data(cfg, log=print))
        losses = [trainer.step().loss.item() for _ in range(steps)]
        means = [statistics.mean(losses[i : i + LAST]) for i in range(0, steps, LAST)]
        (held_out,) = (score.nats_per_token for score in trainer.validate().values())
    finally:
        rounding.round_ = right
    return {"kept": kept, "lr": rate, "seed": seed, "steps": steps, "held_out": held_out, "losses": means}


def table(runs: list[dict]) -> list[str]:
    """Held-out and last training losses, and how far they are from masters of the same rate and seed."""
    lines = [
        "| what is kept | lr | runs | held-out loss | beside masters | training loss, last steps | beside masters |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    masters = {(r["lr"], r["seed"]): r for r in runs if r["kept"] == "masters"}
    for rate in dict.fromkeys(r["lr"] for r in runs):
        for kept in KEPT:
            found = [r for r in runs if (r["kept"], r["lr"]) == (kept, rate)]
            if not found:
                continue
            cells = []
            for value in (lambda r: r["held_out"], lambda r: r["losses"][-1]):
                apart = [value(r) - value(masters[rate, r["seed"]]) for r in found if (rate, r["seed"]) in masters]
                cells.append(f"{statistics.mean(map(value, found)):.4f}")
                cells.append(", ".join(f"{x:+.4f}" for x in apart) if kept != "masters" else "")
            lines.append(f"| {kept} | {rate:g} | {len(found)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs", nargs="+", metavar="'KEPT LR SEED'", help="these alone; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.runs:
        for words in args.runs:
            kept, rate, seed = words.rsplit(" ", 2)
            found = run(kept, float(rate), int(seed), args.steps)
            print(words, f"held-out {found['held_out']:.4f}", " ".join(f"{x:.3f}" for x in found["losses"]))
        return
    began, before = time.monotonic(), json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    report = begin(f"losses in nats a token; those of training are means of the last {LAST} steps", runs=before)
    done = {(r["kept"], r["lr"], r["seed"], r["steps"]) for r in before}
    for seed in range(args.seeds):
        for kept in KEPT:
            for rate in RATES:
                if (kept, rate, seed, args.steps) not in done:
                    found = run(kept, rate, seed, args.steps)
                    assert math.isfinite(found["held_out"]), found
                    report["runs"].append(found)
                    save(report, RESULTS)
                    print(f"{kept}, {rate:g}, seed {seed}: held-out loss {found['held_out']:.4f}", flush=True)
    end(report, RESULTS, began=began, write=True)
    print("\n".join(table([r for r in report["runs"] if r["steps"] == args.steps])))


if __name__ == "__main__":
    main()
