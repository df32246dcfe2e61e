"""How far a ratio of two medians can be trusted. Standard library only."""

import random
import statistics


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """95% interval of (median of theirs) / (median of ours), bootstrapped over pairs (ours, theirs)."""
    rng = random.Random(0)
    ratios = []
    for _ in range(5000):
        drawn = rng.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(b for _, b in drawn) / statistics.median(a for a, _ in drawn))
    ratios.sort()
    return ratios[125], ratios[4874]


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """How many times as long theirs take as ours, of runs that took turns: of the medians, and its 95% interval."""
    pairs = list(zip(ours, theirs, strict=True))
    return statistics.median(theirs) / statistics.median(ours), *interval(pairs)


def shown(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"
