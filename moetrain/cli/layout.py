"""``moetrain layout``: who sits where. Prints a layout's ranks, groups and folding, or every legal layout."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator

from moetrain import parallel
from moetrain.cli.compose import compose
from moetrain.config import UserError, nearest
from moetrain.job import Config
from moetrain.layouts import (
    AXES,
    Layout,
    ModelShape,
    broken_rule,
    coordinates,
    count_legal,
    divisors,
    folds,
    kinds,
    legal,
    slices,
    views,
)

_USAGE = """\
usage: moetrain layout [key=value ...] [--ranks N] [--node N] [--all]
       moetrain layout --legal N [--pp P] [key=value ...]

The first prints where every rank of a layout sits, its groups and which of them cross nodes; the second lists every
legal layout of N ranks, and those that the model refuses with the rule they break. Neither starts anything.

    key=value   as for moetrain train; layout.tp=2 may be written tp=2
    --config F  or the config.yaml of a run, and overrides of its keys
    --ranks N   how many ranks there are [what the layout asks for; with dp=-1 the fewest it allows]
    --node N    ranks of a node [8]
    --all       every node, where there are more than 64 ranks
    --pp P      only layouts of P pipeline stages
"""

_NUMBERS = ("--ranks", "--node", "--legal", "--pp")
_MOST_RANKS, _MOST_LINES, _SHORT = 100_000, 100_000, 64
_Cells = list[tuple[str, ...]]


def main(argv: list[str]) -> int:
    """Runs ``moetrain layout ARGV``; raises ``UserError`` for the caller to print."""
    if any(word in ("-h", "--help") for word in argv):
        print(_USAGE, end="")
        return 0
    numbers, everything, words = _parse(argv)
    if "--legal" in numbers:
        _refuse_beside_legal(numbers, everything, words)
        lines = _list_legal(numbers["--legal"], numbers.get("--pp"), compose(words))
    else:
        if "--pp" in numbers:
            raise UserError(f"--pp {numbers['--pp']} goes with --legal N: for one layout write pp={numbers['--pp']}")
        cfg = compose(words)
        layout, shape = _solve(cfg, numbers.get("--ranks"))
        lines = _describe(layout, shape, node=numbers.get("--node", 8), everything=everything)
    with _pipe():
        for line in lines:
            print(line)
    return 0


def _parse(argv: list[str]) -> tuple[dict[str, int], bool, list[str]]:
    """(the numbers, whether --all is there, the words for ``compose``)."""
    numbers: dict[str, int] = {}
    everything, words, rest = False, [], iter(argv)
    for word in rest:
        option, equals, text = word.partition("=")
        if word == "--config":
            words += [word, *itertools.islice(rest, 1)]
        elif word == "--all":
            everything = True
        elif option in _NUMBERS:
            text = text if equals else next(rest, "")
            if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= _MOST_RANKS):
                raise UserError(
                    f"{option} {text or 'without a number'}: give a whole number from 1 to {_MOST_RANKS:,}, "
                    f"for example {option} 8"
                )
            numbers[option] = int(text)
        elif word.startswith("-"):
            known = (*_NUMBERS, "--all", "--config", "--help")
            raise UserError(f"unknown option {word}{nearest(option, known)} (there are: {', '.join(known)})")
        else:
            words.append(f"layout.{word}" if option in (*AXES, "replicate") else word)
    return numbers, everything, words


def _refuse_beside_legal(numbers: dict[str, int], everything: bool, words: list[str]) -> None:
    given = [option for option in ("--ranks", "--node") if option in numbers] + ["--all"] * everything
    given += [word for word in words if word.startswith(("layout.", "layout="))]
    if given:
        raise UserError(f"{given[0]} says nothing beside --legal, which lists every layout of its ranks: leave it out")


def _solve(cfg: Config, ranks: int | None) -> tuple[Layout, ModelShape]:
    shape = parallel.shape(cfg.model, cfg.context)
    world = cfg.layout.world if ranks is None else ranks
    if world > _MOST_RANKS:
        raise UserError(f"layout {cfg.layout.words()} asks for {world:,} ranks: more than {_MOST_RANKS:,} is no table")
    layout = cfg.layout.solve(world, shape)
    if rule := broken_rule(layout, shape):
        raise UserError(rule)
    return layout, shape


def _list_legal(world: int, pp: int | None, cfg: Config) -> Iterator[str]:
    if pp is not None and world % pp:
        raise UserError(f"--pp {pp} does not divide the {world} ranks: use one of {divisors(world)}")
    if (count := count_legal(world, pp=pp)) > _MOST_LINES:
        raise UserError(
            f"--legal {world}: {count:,} layouts are more than a list of {_MOST_LINES:,}: give fewer ranks, or --pp P"
        )
    return _legal_lines(legal(world, pp=pp), parallel.shape(cfg.model, cfg.context))


def _legal_lines(found: list[Layout], shape: ModelShape) -> Iterator[str]:
    width, fit = max(len(layout.words()) for layout in found), 0
    for layout in found:
        rule = broken_rule(layout, shape, near=0)
        fit += rule is None
        yield f"{layout.words():{width}}  edp={layout.edp}" + (f"  refused: {rule}" if rule else "")
    yield f"{_count(len(found), 'layout')} of {_count(found[0].world, 'rank')}; this model takes {fit:,}"


def _describe(layout: Layout, shape: ModelShape, *, node: int, everything: bool) -> Iterator[str]:
    world = layout.world
    nodes = -(-world // node)
    yield f"layout {layout}: {_count(world, 'rank')} on {_count(nodes, 'node')} of {node}"
    yield _fold_line(layout)
    for experts in shape.experts:
        part = f"1/{layout.etp} of each of " if layout.etp > 1 else ""
        yield f"{experts} experts, a rank holds {part}{experts // layout.ep}"
    shown = range(nodes) if everything or world <= _SHORT or nodes <= 2 else (0, nodes - 1)
    rows = [_header(layout, shape)]
    rows += [_row(layout, shape, r) for n in shown for r in range(n * node, min(n * node + node, world))]
    lines = iter(_table(rows))
    header = next(lines)
    for n in shown:
        if n and n - 1 not in shown:
            yield "\n..."
        yield f"\nnode {n}\n{header}"
        yield from (next(lines) for _ in range(n * node, min(n * node + node, world)))
    yield ""
    yield from _table([("group", "size", "stride", "groups", "across nodes"), *_group_rows(layout, node)])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _fold_line(layout: Layout) -> str:
    over = [f"{axis} folds over {', '.join(dense)}" for axis, dense in folds(layout).items() if dense]
    return "; ".join(over) if over else "nothing folds: one rank a stage"


def _header(layout: Layout, shape: ModelShape) -> tuple[str, ...]:
    more = ["replica"] * (layout.replicate > 1) + ["experts"] * len(shape.experts)
    return ("rank", "|", *views(layout)["dense"], "|", *views(layout)["moe"], *(["|", *more] if more else []))


def _row(layout: Layout, shape: ModelShape, rank: int) -> tuple[str, ...]:
    dense, moe, fsdp = (coordinates(views(layout)[name], rank) for name in ("dense", "moe", "fsdp"))
    more = [str(fsdp["replicate"])] * (layout.replicate > 1)
    for experts in shape.experts:
        each = experts // layout.ep
        first = moe["ep"] * each
        more.append(str(first) if each == 1 else f"{first}-{first + each - 1}")
    cells = ("|", *map(str, dense.values()), "|", *map(str, moe.values()), *(["|", *more] if more else []))
    return (str(rank), *cells)


def _group_rows(layout: Layout, node: int) -> Iterator[tuple[str, ...]]:
    for name, (view, *axes) in kinds(layout).items():
        groups = slices(views(layout)[view], tuple(axes))
        size = len(groups[0])
        if size == 1:
            yield name, "1", "-", "-", "-"
            continue
        across = sum(ranks[0] // node != ranks[-1] // node for ranks in groups)
        how_many = "none" if not across else "all" if across == len(groups) else f"{across} of {len(groups)}"
        yield name, str(size), str(groups[0][1] - groups[0][0]), str(len(groups)), how_many


def _table(rows: _Cells) -> list[str]:
    """Right-aligned columns; the first and the last to the left where they hold words."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = {i for i in (0, len(widths) - 1) if not rows[-1][i].replace("-", "").isdigit()}
    return [
        "  ".join(f"{cell:{'<' if i in words else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def _pipe() -> Iterator[None]:
    """A reader that has seen enough (``| head``) is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
