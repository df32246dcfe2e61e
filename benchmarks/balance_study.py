"""Writes docs/balance-study.md from the runs of `moetrain train -m sweep=balance_study`: what ways of balancing cost.

    make balance-study                                                # the runs, then this
    python benchmarks/balance_study.py runs/balance-study --write docs/balance-study.md

What is written by hand stands between two marks in the page, and is kept.
"""

import argparse
import sys
from pathlib import Path

from moetrain.cli import compose
from moetrain.config import UserError
from moetrain.job import Config
from moetrain.model.flops import size
from moetrain.report import tables
from moetrain.report.sweep_plots import draw
from moetrain.report.trials import LAST, Sweep, sweep

BEGIN, END = "<!-- by hand: begin -->", "<!-- by hand: end -->"
BASELINES = ("none", "switch")
EVEN = 0.15
"""Max violation of summed load that a selection bias should come under."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sweep", type=Path, help="the folder of the runs, runs/balance-study")
    parser.add_argument(
        "--write", type=Path, required=True, help="the page; its pictures go to the folder NAME beside it"
    )
    parser.add_argument("--last", type=int, default=LAST, help=f"last steps that the numbers are of ({LAST})")
    args = parser.parse_args(argv)
    try:
        by_hand = kept(args.write)
        found = sweep(args.sweep, last=args.last)
        if missing := {*BASELINES} - {g.label for g in found.groups}:
            raise UserError(
                f"{args.sweep} has no finished run of {' and '.join(sorted(missing))}: name the study's folder"
            )
        pictures = args.write.with_suffix("")
        pictures.mkdir(parents=True, exist_ok=True)
        draw(found, found.group(BASELINES[0]), pictures)
        args.write.write_text(page(found, by_hand, pictures.name))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(args.write)
    return 0


def kept(path: Path) -> str:
    """What stands between the marks of a page; raises ``UserError`` rather than lose it."""
    if not path.exists():
        return "\n"
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(
            f"{path} has not one {BEGIN} and one {END}: mend them, or move the page away to write a new one"
        )
    return text.split(BEGIN)[1].split(END)[0]


def page(found: Sweep, by_hand: str, pictures: str) -> str:
    cfg = found.trials[0].cfg
    methods = "".join(f"| `{g.label}` | {meaning(g.label)} |\n" for g in found.groups)
    parts = [
        "# What balancing costs\n",
        "`make balance-study` runs it and writes this page, but for the section by hand. "
        f"{'; '.join(tables.facts(found))}: start-up, held-out data and saves not counted.\n",
        f"{BEGIN}{by_hand}{END}\n",
        f"## Runs\n\n{setting(cfg)}\n",
        f"| method | |\n| --- | --- |\n{methods}",
        "A seed is one start and one order of the data, the same for every method.\n",
        f"## Loss and balance\n\n{tables.of_groups(found).markdown()}",
        "".join(f"- {note}.\n" for note in tables.notes(found)),
        f"{even(found)}\n",
        f"![Loss against balance]({pictures}/tradeoff.png)\n\n![Loss over steps]({pictures}/loss.png)\n\n"
        f"![Max violation over steps]({pictures}/balance.png)\n",
    ]
    for name in BASELINES:
        baseline = found.group(name)
        parts.append(f"## Against {name}\n\n{tables.against(found, baseline).markdown()}")
        parts.append(tables.comparison_note(baseline) + "\n")
    if found.left_out:
        parts.append(f"## Not counted\n\n{tables.not_counted(found).markdown()}")
    return "\n".join(parts)


def setting(cfg: Config) -> str:
    """The model and the data, in a few words."""
    model, moe, train = cfg.model, cfg.model.moe, cfg.train
    return (
        f"{size(model)}; {model.num_layers} layers of width {model.dim}, {len(model.moe_layers)} of them MoE: "
        f"{moe.num_experts} experts of {moe.hidden}, top-{moe.router.top_k}. {train.steps} steps of {train.batch} x "
        f"{train.seq_len} = {train.batch * train.seq_len:,} tokens in micro-batches of {train.micro_batch} samples, "
        f"{cfg.optim.kind.value} at {cfg.optim.lr:g}, {train.dtype.value}. Data: {', '.join(cfg.data.corpora)}, "
        f"{model.vocab_size:,} token ids. `configs/experiment/balance_study.yaml` has every choice."
    )


def meaning(method: str) -> str:
    """The comment in the method's file."""
    path = compose.folder() / "method" / f"{method}.yaml"
    comments = (
        [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("# ")] if path.exists() else []
    )
    return " ".join(line for line in comments if not line.startswith("@package"))


def even(found: Sweep) -> str:
    """Whether a selection bias evened out the summed load, in every layer of every seed."""
    group = next((g for g in found.groups if g.label == "expert_bias"), None)
    worst = group.of_seed("summed_worst") if group else {}
    if not worst:
        return "No finished run of `expert_bias` recorded its load."
    steps = min(trial.logged for trial in group.trials) if group else 0
    each = ", ".join(f"{x:.3f} (seed {seed})" for seed, x in sorted(worst.items()))
    if max(worst.values()) < EVEN:
        verdict = f"under {EVEN} in every layer of every seed"
    else:
        verdict = f"not under {EVEN} in every layer of every seed"
    return (
        f"`expert_bias`, load summed over {steps} logged steps of the last {found.last}: max violation of the worst "
        f"layer {each}: {verdict}. (Loads are kept to two digits, which moves this by at most 0.005.)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
