"""The loss of float8 experts beside bfloat16 and float32: one small MoE model on real text, the same seeds for all.

    python benchmarks/fp8_loss.py                    # trains what is not there yet in runs/fp8-loss, an hour
    python benchmarks/fp8_loss.py --seeds 1 --steps 100 --no-write

Every run is ``moetrain train`` with ``experiment=quickstart`` on one rank and one thread; runs of a seed differ in
nothing but what is multiplied in which precision. What seeds do to the loss is the measure of what precision does.
Prints the table of docs/kernels.md and writes results/fp8-loss-cpu.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from saving import begin, end

RESULTS = Path(__file__).parent / "results" / "fp8-loss-cpu.json"
VARIANTS = {
    "float32": ["train.dtype=float32"],
    "bfloat16": ["train.dtype=bfloat16"],
    "bfloat16, experts in float8": ["train.dtype=bfloat16", "model.moe.fp8_tile=128"],
}
BASE = "bfloat16"
LAST = 50  # steps that a run's training loss is the mean of
EVERY = 100  # steps between validations


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dir", type=Path, default=Path("runs/fp8-loss"))
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    words = [
        "experiment=quickstart", "layout.dp=1", "layout.ep=1", f"train.steps={args.steps}", "train.threads=1",
        f"train.validate_every={EVERY}", "train.validate_samples=256", "train.bigram=false", "train.device=cpu",
        "health.pairs=false", "checkpoint.every=0", f"run.dir={args.dir}",
    ]  # fmt: skip
    began, runs = time.monotonic(), []
    report = begin(
        "the quickstart's model on one rank: its loss with the experts' products in float8 (e4m3, tiles of 128)",
        words=words, variants=VARIANTS, last=LAST, validate_every=EVERY,
    )  # fmt: skip
    for seed in range(1, args.seeds + 1):
        for variant, own in VARIANTS.items():
            name = f"{variant.replace(', ', '-').replace(' ', '-')}-{args.steps}-seed-{seed}"
            mine = [*words, *own, f"seed={seed}", f"run.name={name}"]
            log = args.dir / f"{name}.log"
            args.dir.mkdir(parents=True, exist_ok=True)
            with log.open("w") as out:
                done = subprocess.run([sys.executable, "-m", "moetrain", "train", *mine], stdout=out, stderr=out)
            if done.returncode:
                sys.exit(f"{name} ended with code {done.returncode}: see {log}")
            runs.append({"variant": variant, "seed": seed, **read(args.dir / name / "metrics.jsonl")})
            print(f"{name}: held out {runs[-1]['held_out'][-1]:.4f}", flush=True)
    print("\n".join(table(runs)))
    end(report | {"runs": runs}, RESULTS, began=began, write=not args.no_write)
    return 0


def read(path: Path) -> dict:
    """The curves of a run: mean training loss of every 10 steps, the last ones' mean, held-out losses."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    held_out = [r["nats_per_token"] for r in records if "validation" in r]
    return {
        "loss": [round(statistics.mean(losses[i : i + 10]), 5) for i in range(0, len(losses), 10)],
        "last": statistics.mean(losses[-LAST:]), "held_out": held_out,
        "largest_norm": max(r["grad_norm"] for r in records if "grad_norm" in r and r["step"] > LAST),
    }  # fmt: skip


def table(runs: list[dict]) -> list[str]:
    """Means over seeds; differences from ``BASE`` seed by seed, with their standard deviation."""
    seeds = sorted({r["seed"] for r in runs})
    of = {(r["variant"], r["seed"]): r for r in runs}
    steps = [EVERY * (i + 1) for i in range(len(runs[0]["held_out"]))]
    lines = [
        f"| experts | {' | '.join(f'held out, step {s}' for s in steps)} | less {BASE}'s, last step | training, last "
        f"{LAST} steps | less {BASE}'s |",
        "|---|" + "---|" * (len(steps) + 3),
    ]
    for variant in VARIANTS:
        mine, base = ([of[v, s] for s in seeds] for v in (variant, BASE))
        held = [f"{statistics.mean(r['held_out'][i] for r in mine):.4f}" for i in range(len(steps))]
        far = [a["held_out"][-1] - b["held_out"][-1] for a, b in zip(mine, base, strict=True)]
        trained = [a["last"] - b["last"] for a, b in zip(mine, base, strict=True)]
        last = f"{statistics.mean(r['last'] for r in mine):.4f}"
        lines.append(
            f"| {variant} | {' | '.join(held)} | {_spread(far, variant)} | {last} | {_spread(trained, variant)} |"
        )
    spread = [of[BASE, s]["held_out"][-1] for s in seeds]
    if len(seeds) > 1:
        lines += [
            "",
            f"Between seeds {BASE}'s last held-out loss has a standard deviation of {statistics.stdev(spread):.4f}.",
        ]
    return lines


def _spread(differences: list[float], variant: str) -> str:
    if variant == BASE:
        return ""
    deviation = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.4f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
