"""``moetrain verify``: proof, on the user's own config, that its layout is the same training run as one rank."""

import argparse
import contextlib
import random
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from moetrain.cli.compose import compose
from moetrain.config import UserError, nearest, replace
from moetrain.job import Config, DType, check
from moetrain.launchers import rank_info
from moetrain.layouts import Layout, legal
from moetrain.model.flops import size
from moetrain.verify import faults
from moetrain.verify import report as pages
from moetrain.verify import shrink as shrinking
from moetrain.verify.ranks import LocalRanks, Ranks, TheseRanks
from moetrain.verify.session import (
    ALONE,
    FailedError,
    Reference,
    Verdict,
    check_comparable,
    in_dtype,
    make_reference,
    verify,
)
from moetrain.world import join, launched, wanted_ranks

USAGE = """usage: moetrain verify [OPTION ...] [KEY=VALUE ...]

One training step under the config's layout and one on a single rank, from the same weights on the same samples:
choices of expert, loss, gradient norm, load, every gradient, the next weights, the expert bias. Keys are those of
moetrain train. Exit code 0: the same run; 1: different; 2: something in the input to mend. docs/verify.md says more.
"""


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; moetrain verify --help lists the options")


def _parser() -> _Options:
    parser = _Options(prog="moetrain verify", usage=argparse.SUPPRESS, description=USAGE, allow_abbrev=False,
                      formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--against", metavar="LAYOUT", help="compare with this layout, e.g. 'dp=8 ep=8', in place of one rank")
    add("--ranks", type=int, metavar="N", help="how many ranks the layout is meant for, where layout.dp is -1")
    add("--full", action="store_true", help="at the config's own shapes; without it they shrink first")
    add("--dtype", choices=[d.value for d in DType], help="compute in this, in place of train.dtype")
    add("--all-layouts", metavar="N[,N]", help="every legal layout of N ranks; layout keys are ignored")
    add("--case", action="append", default=[], metavar="NAME[@N[,N][ AXIS=D[,D] ...][/K]]:KEY=VALUE ...",
        help="sweep this variant of the config; on these ranks, with these degrees, a sample of K")  # fmt: skip
    add("--sample", type=int, metavar="K", help="only K of the layouts, drawn by --seed")
    add("--seed", type=int, default=0, metavar="S")
    add("--write", type=Path, metavar="FILE", help="write a sweep as a page of markdown")
    add("--append", action="store_true", help="to the end of the page that is there")
    add("--keep", type=Path, metavar="FOLDER", help="keep outcomes and logs there")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one step on the local ranks (120)")
    add("--inject", metavar="FAULT", help="plant a fault in the layout's ranks, to see it found")
    return parser


def main(argv: list[str]) -> int:
    parser = _parser()
    options, words = parser.parse_known_args(argv)
    for word in words:
        if word.startswith("-") and word != "--config":
            raise UserError(f"unknown option {word}{nearest(word, _flags(parser))}")
    for name, value in (("--ranks", options.ranks), ("--sample", options.sample), ("--timeout", options.timeout)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: has to be at least 1")
    try:
        if options.all_layouts:
            return _sweep(options, words, shlex.join(["moetrain", "verify", *argv]))
        for name in ("case", "sample", "write"):
            if getattr(options, name):
                raise UserError(f"--{name} is for a sweep: add --all-layouts N")
        return _one(options, words)
    except FailedError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def _one(options: argparse.Namespace, words: list[str]) -> int:
    cfg = _config(options, words)
    world = options.ranks or wanted_ranks(cfg.layout, device=cfg.train.device)
    if launched():
        world = rank_info().size
        if not options.full:
            raise UserError("under torchrun the layout is compared on the ranks that are there: add --full")
    cfg = replace(cfg, layout=cfg.layout.solve(world))
    check(cfg, world=world)
    if world == 1:
        raise UserError("the layout is one rank, which is what it is compared with: set layout.*, or --ranks N")
    against = pages.parse_layout(options.against) if options.against else ALONE
    if options.against and not options.full:
        raise UserError("--against needs --full: the config is shrunk for its own layout, not for another")
    if against.world not in (1, world):
        raise UserError(
            f"--against {options.against!r} is a layout of {against.world} ranks, the config's of {world}: give one of "
            f"{' or '.join(map(str, dict.fromkeys((1, world))))}"
        )
    check_comparable(cfg, against=against)
    if not options.full:
        shrunk = shrinking.shrink(cfg, world=world)
        cfg = shrunk.cfg
        print("\n".join([*shrinking.table(shrunk), ""]), flush=True)
    if options.inject:
        faults.require(options.inject, cfg, cfg.layout)
    with _folder(options, cfg) as folder, _ranks(options, cfg, folder) as ranks:
        reference = make_reference(cfg, ranks, folder / "reference", layout=against)
        verdict = verify(cfg.layout, reference, ranks, folder / "layout", fault=options.inject)
    if rank_info().rank == 0:
        print(f"{pages.words(cfg.layout)} beside {pages.words(against)}, {cfg.train.dtype.value}; {size(cfg.model)}")
        if verdict.report is not None:
            print("\n".join([*pages.groups(verdict.report), "", *pages.table(verdict.report)]))
        print(pages.conclusion(verdict), flush=True)
    return _code([verdict])


def _sweep(options: argparse.Namespace, words: list[str], command: str) -> int:
    if launched() or options.full or options.against or options.ranks:
        raise UserError(
            "--all-layouts starts local ranks, takes the config's shapes as they are and compares with one rank: "
            "leave torchrun, --full, --ranks and --against away"
        )
    cases = _cases(options)
    configs = {name: _config(options, [*words, *shlex.split(case.overrides)]) for name, case in cases.items()}
    first = next(iter(configs.values()))
    trials = {name: _trials(case, options.seed) for name, case in cases.items()}
    if options.inject and options.inject not in faults.FAULTS:
        raise UserError(f"--inject {options.inject}: no such fault{nearest(options.inject, faults.FAULTS)}")
    verdicts: dict[str, list[Verdict]] = {name: [] for name in cases}
    references: dict[str, Reference] = {}
    done, total = 0, sum(len(layouts) for of in trials.values() for layouts in of.values())
    worlds = sorted({world for of in trials.values() for world in of})
    with _folder(options, first) as folder:
        for world in worlds:
            with LocalRanks(world, folder=folder / f"ranks-{world}", timeout=options.timeout) as ranks:
                for name, cfg in configs.items():
                    if world not in trials[name]:
                        continue
                    if name not in references:
                        references[name] = make_reference(cfg, ranks, folder / name / "reference")
                    for layout in trials[name][world]:
                        if options.inject and faults.FAULTS[options.inject].needs(cfg, layout):
                            total -= 1
                            continue
                        here = folder / name / pages.words(layout).replace(" ", ",")
                        verdict = verify(layout, references[name], ranks, here, fault=options.inject)
                        if options.keep is None:
                            shutil.rmtree(here, ignore_errors=True)
                        verdicts[name].append(verdict)
                        done += 1
                        case = f"{name}  " if len(cases) > 1 else ""
                        print(f"[{done}/{total}] {case}{pages.line(verdict)}", flush=True)
    described = {
        name: pages.Case(case.where, configs[name].train.dtype.value, case.overrides) for name, case in cases.items()
    }
    page = pages.Page(command, str(size(first.model)), described, verdicts)
    print(pages.summary(page))
    if options.write:
        pages.write(page, options.write, append=options.append)
        print(f"written to {options.write}")
    return _code(page.all())


@dataclass(frozen=True)
class _Case:
    """A variant of the config, and on which layouts: all of these numbers of ranks, or ``sample`` of each."""

    overrides: str
    worlds: tuple[int, ...]
    degrees: dict[str, tuple[int, ...]]  # axis -> those to visit; an axis that is not there: all
    sample: int | None

    @property
    def where(self) -> str:
        ranks = ", ".join(map(str, self.worlds))
        degrees = "".join(f", {axis} = {', '.join(map(str, of))}" for axis, of in self.degrees.items())
        return f"{'all' if self.sample is None else self.sample} of {ranks} rank{'s' * (self.worlds != (1,))}{degrees}"


def _cases(options: argparse.Namespace) -> dict[str, _Case]:
    """Name -> every variant of a sweep; without ``--case`` there is one, the config as it is."""
    everywhere = _worlds(options.all_layouts, f"--all-layouts {options.all_layouts}")
    found: dict[str, _Case] = {}
    for text in options.case:
        shape = re.fullmatch(
            r"([\w .,-]+?)(?:@([\d,]+)((?: +(?:pp|dp|cp|tp|ep|etp|replicate)=[\d,]+)*)(?:/(\d+))?)? *:(.*)",
            text,
            re.DOTALL,
        )
        if not shape or shape[1] in found or shape[4] == "0":
            raise UserError(
                f"--case {text!r} is not NAME:KEY=VALUE ... or NAME@RANKS AXIS=DEGREES/SAMPLE:KEY=VALUE ..., "
                f"with a name of its own, of letters and digits"
            )
        worlds = _worlds(shape[2], f"--case {text!r}") if shape[2] else everywhere
        pairs = (word.split("=") for word in (shape[3] or "").split())
        degrees = {axis: _worlds(of, f"--case {text!r}") for axis, of in pairs}
        found[shape[1]] = _Case(shape[5].strip(), worlds, degrees, int(shape[4]) if shape[4] else options.sample)
    return found or {"config": _Case("", everywhere, {}, options.sample)}


def _worlds(text: str, where: str) -> tuple[int, ...]:
    for word in text.split(","):
        if not word.isdigit() or int(word) < 1:
            raise UserError(f"{where}: {word!r} is not a number of ranks; write 4 or 2,4,8")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def _trials(case: _Case, seed: int) -> dict[int, list[Layout]]:
    """Ranks -> the layouts to visit, in a fixed order."""
    found = {}
    for world in case.worlds:
        copies = case.degrees.get("replicate", (1,))
        layouts = [replace(n, replicate=r) for n in legal(world) for r in copies if n.dp % r == 0]
        layouts = [n for n in layouts if all(getattr(n, axis) in of for axis, of in case.degrees.items())]
        if case.sample is not None and case.sample < len(layouts):
            drawn = random.Random(seed).sample(range(len(layouts)), case.sample)
            layouts = [layouts[i] for i in sorted(drawn)]
        found[world] = layouts
    return found


def _config(options: argparse.Namespace, words: list[str]) -> Config:
    cfg = compose(words)
    if options.dtype is None:
        return cfg
    found = in_dtype(cfg, DType(options.dtype))
    if found.optim.weight_dtype != cfg.optim.weight_dtype and rank_info().rank == 0:
        print(f"optim.weight_dtype is left out: in {options.dtype} there is nothing to round", flush=True)
    return found


def _code(verdicts: list[Verdict]) -> int:
    return int(any(v.kind in ("different", "failed") for v in verdicts))


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return ["--config", *(word for action in parser._actions for word in action.option_strings)]


def _ranks(options: argparse.Namespace, cfg: Config, folder: Path) -> Ranks:
    """The launcher's ranks, or new ones on this machine."""
    if not launched():
        return LocalRanks(cfg.layout.world, folder=folder / "ranks", timeout=options.timeout)
    t = cfg.train
    return TheseRanks(
        join(
            device=t.device, communication=t.communication, timeout=t.timeout, threads=t.threads, folder=cfg.run.folder
        )
    )


@contextlib.contextmanager
def _folder(options: argparse.Namespace, cfg: Config) -> Iterator[Path]:
    """Where outcomes go: what ``--keep`` names, else one that is removed; every rank of a launcher sees it."""
    keep: Path | None = options.keep or (cfg.run.folder / "verify" if launched() else None)
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="moetrain-verify-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{keep} cannot be written ({e.strerror}): name a folder that can by --keep") from e
    yield keep
    if options.keep is None and rank_info().rank == 0:
        shutil.rmtree(keep, ignore_errors=True)
