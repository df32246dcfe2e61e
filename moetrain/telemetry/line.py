"""The words of a logging step: on the console's line, in the logs and beside the progress bar."""

import time
from typing import Any

from moetrain.telemetry.health import Reading


class StepLine:
    """Knows how long steps have taken in this life, saves and validation included, for the time that is left."""

    def __init__(self, *, total: int) -> None:
        self.total = total
        self._since: float | None = None
        self._done = 0  # steps since then

    def words(self, records: list[dict[str, Any]], reading: Reading | None, *, now: float | None = None) -> str:
        """Of the last of the steps since the words before. The first words say no time left: a life's first steps
        are slower than others."""
        last, now = records[-1], time.monotonic() if now is None else now
        parts = [f"loss {last['loss']:.4f}", f"grad norm {last['grad_norm']:.3f}"]
        if "param_norm" in last:
            parts.append(f"param norm {last['param_norm']:.2f}, {last['zero_grads']:,} zero grads")
        parts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in last:
            parts.append(f"MFU {last['mfu']:.1%}")
        if reading:
            layers = reading.layers.values()
            parts.append(f"overload {max(x['max_violation'] for x in layers) + 1:.2f}")
            parts.append(f"dropped {sum(x['drop_rate'] for x in layers) / len(layers):.2%}")
        parts.append(f"lr {last['lr']:.2e}")
        if self._since is None:
            self._since = now
        else:
            self._done += len(records)
            left = (self.total - last["step"]) * (now - self._since) / self._done
            parts.append(f"ETA {duration(left)}")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """3 d 04 h, 4 h 05 min, 5 min 06 s, 7 s."""
    whole = round(seconds)
    for name, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part:02} {smaller}"
    return f"{whole} s"
