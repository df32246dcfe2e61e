"""Alerts: a bound on a health metric of any layer, and what to do where it is passed for some logging steps on end."""

from dataclasses import dataclass
from enum import Enum

from moetrain.config import UserError, config, nearest

METRICS = {
    "max_violation": "max load / mean load - 1, of the step",
    "smooth_max_violation": "the same of the load averaged exponentially over steps",
    "variation": "standard deviation of the load / its mean",
    "entropy": "entropy of the load / log(experts): 1 is even, 0 one expert",
    "dead": "experts without an assignment in the step",
    "drop_rate": "assignments dropped / assignments to experts, zero-computation experts not counted",
    "overload": "rows of the fullest rank of the experts' grid / mean over its ranks",
    "home_overload": "the same if every token went to its experts' owners",
    "replicas": "copies of the layer's experts beside their owners', over all ranks",
    "moved": "MB of experts' weights and gradients that travelled in the step, over all ranks",
    "bias_norm": "2-norm of the selection bias",
    "largest_logit": "largest absolute router logit",
    "top_pair": "share of the most frequent pair of experts among all pairs that tokens chose",
    "ffn_experts": "experts that a token chose, zero-computation experts not counted, mean over tokens",
}
"""What is known of every MoE layer at a logging step; each a number."""


class Action(Enum):
    warn = "warn"  # a line in the log
    stop = "stop"  # save, and end the run with exit code 3


@config
class AlertConfig:
    """Fires where a layer's ``metric`` is above ``above`` or below ``below`` at ``after`` logging steps on end."""

    metric: str = ""
    above: float | None = None
    below: float | None = None
    action: Action = Action.warn
    after: int = 1

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(
                f"health.alerts: metric={self.metric!r}: no such metric{nearest(self.metric, METRICS)} "
                f"(there are: {', '.join(METRICS)})"
            )
        if self.above is None and self.below is None:
            raise UserError(f"health.alerts: {self.metric} has no bound: give above=X, below=X or both")
        if self.after < 1:
            raise UserError(f"health.alerts: {self.metric}: after={self.after}: has to be at least 1 logging step")

    def passed(self, value: float) -> str | None:
        """The bound that ``value`` is past, in words; a NaN is past every bound."""
        if self.above is not None and not value <= self.above:
            return f"above {self.above:g}"
        if self.below is not None and not value >= self.below:
            return f"below {self.below:g}"
        return None


@dataclass(frozen=True)
class Fired:
    action: Action
    line: str  # layer, metric, value, bound


class Alerts:
    """A run's alerts, and for how many logging steps on end each layer has been past each of them.

    Every rank sees the same numbers, so all of them stop together without asking each other.
    """

    def __init__(self, alerts: list[AlertConfig]) -> None:
        self.alerts = alerts
        self._times: list[dict[int, int]] = [{} for _ in alerts]

    def look(self, layers: dict[int, dict[str, float]]) -> list[Fired]:
        """At the values of a logging step, layer -> metric -> value: what fires now, at most one line an alert.

        A warning is said once, and again only after all was well in between.
        """
        found = []
        for alert, times in zip(self.alerts, self._times, strict=True):
            due = []
            for layer, values in layers.items():
                bound = alert.passed(values[alert.metric])
                times[layer] = times.get(layer, 0) + 1 if bound else 0
                if bound and times[layer] == alert.after:
                    due.append((abs(values[alert.metric]), layer, bound))
            if due:
                _, layer, bound = max(due) if alert.above is not None else min(due)
                value = layers[layer][alert.metric]
                steps = f" at {alert.after} logging steps on end" if alert.after > 1 else ""
                more = f" ({len(due) - 1} more layer{'s' * (len(due) > 2)} too)" if len(due) > 1 else ""
                line = f"{alert.metric} of layer {layer} is {value:.4g}, {bound}{steps}{more}"
                found.append(Fired(alert.action, line))
        return found
