"""Load per expert as a small picture for a terminal."""

BARS = "▁▂▃▄▅▆▇█"


def draw(load_LE: list[tuple[int, list[int]]]) -> list[str]:
    """(layer, assignments per expert) pairs -> a line each; a bar of half height is an even share.

    Experts beyond 64 are drawn as the mean of neighbours. Max violation is max load / mean load - 1.
    """
    lines = []
    for layer, load_E in load_LE:
        mean = sum(load_E) / len(load_E) or 1.0
        bars = "".join(BARS[min(len(BARS) - 1, int(x / mean * len(BARS) / 2))] for x in _merge(load_E, 64))
        most, least = max(load_E) / mean, min(load_E) / mean
        lines.append(f"  layer {layer:>2} {bars}  max violation {most - 1:.2f}, least {least:.2f}x even")
    return lines


SHADES = ((0.05, " "), (0.5, "░"), (1.5, "▒"), (2.5, "▓"))
"""(load / mean load below which a cell has it, shade); above all of them it is full."""


def heat_map(loads: list[tuple[int, list[float]]], *, columns: int = 100, lines: int = 20) -> list[str]:
    """(layer, load of its experts in any unit) pairs -> at most ``lines`` lines of at most ``columns`` characters.

    A cell that stands for several layers or experts shows the most loaded of them.
    """
    if not loads:
        return []
    layers, load_LE = [layer for layer, _ in loads], [load_E for _, load_E in loads]
    E, down = max(map(len, load_LE)), -(-len(layers) // (lines - 2))
    label = 8 + len(str(layers[-1])) * (2 if down > 1 else 1) + (down > 1)
    right = -(-E // (columns - label - 3))
    wide = max(1, min(3, (columns - label - 3) // -(-E // right)))
    means = [sum(load_E) / len(load_E) or 1 for load_E in load_LE]
    even_LE = [[x / mean for x in load_E] for load_E, mean in zip(load_LE, means, strict=True)]
    cell = f", a cell: the most loaded of {down} x {right}" if down * right > 1 else ""
    found = [f"  load of layers x {E} experts{cell}"]
    for i in range(0, len(layers), down):
        some = even_LE[i : i + down]
        there = range(0, max(map(len, some)), right)
        most = [max(x for row in some for x in row[e : e + right]) for e in there]
        last = layers[min(i + down, len(layers)) - 1]
        name = f"{layers[i]}" if last == layers[i] else f"{layers[i]}-{last}"
        found.append(f"  layer {name:>{label - 8}} {''.join(_shade(x) * wide for x in most)}")
    return [*found, "  '░' below 0.5 of an even share, '▒' to 1.5, '▓' to 2.5, '█' above, ' ' below 0.05"]


def _shade(even: float) -> str:
    return next((shade for limit, shade in SHADES if even < limit), "█")


def _merge(load_E: list[int], most: int) -> list[float]:
    run = -(-len(load_E) // most)
    parts = [load_E[i : i + run] for i in range(0, len(load_E), run)]
    return [sum(p) / len(p) for p in parts]
