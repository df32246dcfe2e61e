"""Marks on a device's stream; on the host's clock where the device is a CPU (a dry run: such figures mean nothing).

What takes turns is timed here too, and how long anything may take.
"""

import gc
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

L2_BYTES = 256 * 2**20  # several times the largest L2


class Timer:
    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def mark(self) -> Any:
        """Now, in the order of the stream's work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the later one."""
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, call: Callable[[], Any], *, repeats: int = 10, warmup: int = 3) -> float:
        """Seconds of a call, the L2 overwritten before each."""
        times = []
        for i in range(warmup + repeats):
            self.flush()
            start = self.mark()
            call()
            end = self.mark()
            if i >= warmup:
                times.append((start, end))
        return statistics.median(self.seconds(*marks) for marks in times)

    def flush(self) -> None:
        """Overwrite the L2, so that nothing of the last run is in it."""
        if self._flush is not None:
            self._flush.zero_()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def begin_peak(self) -> int:
        """Bytes that are allocated; from here on the peak counts."""
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0


class Clock:
    """How much time is left: of a stage ``GPU_SECONDS``, none named = enough."""

    def __init__(self, seconds: float | None = None) -> None:
        self.end = time.monotonic() + (float(os.environ.get("GPU_SECONDS", "1e9")) if seconds is None else seconds)

    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, parts: int) -> "Clock":
        """One of so many equal parts of what is left."""
        return Clock(self.left() / parts)


class OutOfTime(Exception):
    """Something was given so many seconds, and was not done."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` inside after so many seconds, as soon as Python runs there (main thread only)."""

    def over(*_: object) -> None:
        raise OutOfTime(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_turns(
    runs: dict[str, Callable[[int], list[float]]], *, rounds: int, enough: Callable[[], bool] = lambda: False
) -> dict[str, list[list[float]]]:
    """Each run once a round, A B C, B C A, ...: name -> what it returned, round by round; fewer where time is up.

    A run is given the number of the round, to rotate its inputs by. Who runs out of memory drops out, with its rounds.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in runs}
    for i in range(rounds):
        if i >= 3 and enough():
            break
        names = list(found)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            try:
                found[name].append(runs[name](i))
            except torch.OutOfMemoryError:
                del found[name]
                free()
    return found


def one_line(error: BaseException, *, most: int = 200) -> str:
    """What went wrong, for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:most]


def free() -> None:
    """What nobody holds goes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
