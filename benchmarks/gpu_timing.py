"""Marks on a device's stream; on the host's clock where the device is a CPU (a dry run: such figures mean nothing)."""

import time
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

    def flush(self) -> None:
        """Overwrite the L2, so that nothing of the last run is in it."""
        if self._flush is not None:
            self._flush.zero_()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0
