"""A few numbers from a few seeds: spread, and the difference of two groups with its interval."""

import math
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of two groups, paired by seed: the mean, and a Student t interval of ``LEVEL`` from two seeds on."""

    seeds: int
    mean: float
    half: float | None  # of the interval's width

    @property
    def verdict(self) -> str:
        """Says only what the interval shows; with one seed there is none."""
        if self.half is None:
            return "one seed: no interval"
        if abs(self.mean) <= self.half:
            return "not distinguishable"
        return "lower" if self.mean < 0 else "higher"


def paired(group: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Seed -> value of each; None where they have no seed in common."""
    differences = [group[seed] - baseline[seed] for seed in sorted(group.keys() & baseline.keys())]
    if not differences:
        return None
    n, deviation = len(differences), spread(differences)
    half = None if deviation is None else t_quantile(n - 1) * deviation / math.sqrt(n)
    return Difference(n, mean(differences), half)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: list[float]) -> float | None:
    """The sample standard deviation (n - 1); None of one value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((x - middle) ** 2 for x in values) / (len(values) - 1))


def median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def t_quantile(freedom: int, *, level: float = LEVEL) -> float:
    """The t within which Student's distribution of ``freedom`` degrees has ``level`` of its mass."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = total = cosine if odd else 1.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
