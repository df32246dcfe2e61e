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


def _merge(load_E: list[int], most: int) -> list[float]:
    run = -(-len(load_E) // most)
    parts = [load_E[i : i + run] for i in range(0, len(load_E), run)]
    return [sum(p) / len(p) for p in parts]
