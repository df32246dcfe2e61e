"""What computing, travelling and attention cost on these ranks: measured in a few steps of a run, the same on all.

Forwards are timed where they run; a backward is taken for two. On a CPU it is the processor's time, not that of others
who had it meanwhile. What travels is timed alone: every rank sends one expert to the next.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain import comm, world
from moetrain.model.transformer import Transformer
from moetrain.moe.placement.types import Costs
from moetrain.moe.types import Rows

_TIMES = 5


class Stopwatch:
    """Times every forward of attention and of experts in the blocks with MoE, by steps, until ``stop``."""

    def __init__(self, model: Transformer) -> None:
        self.attention: list[float] = []  # seconds of each forward
        self.experts: list[float] = []
        self.rows: list[int] = []
        self.steps: list[tuple[float, int]] = []  # of experts: seconds, rows
        self._began: dict[nn.Module, Any] = {}
        self._device = next(model.parameters()).device
        self._hooks = []
        for layer in model.moe_layers():
            block = model.get_submodule(f"blocks.{layer.layer}")
            for module, times in ((block.get_submodule("attention"), self.attention), (layer.experts, self.experts)):
                self._hooks.append(module.register_forward_pre_hook(self._begin))
                self._hooks.append(module.register_forward_hook(self._end(times)))

    def end_step(self) -> None:
        self.steps.append((sum(self.experts), sum(self.rows)))
        self.experts.clear()
        self.rows.clear()

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.thread_time()

    def _begin(self, module: nn.Module, args: tuple) -> None:
        if isinstance(args[0] if args else None, Rows):
            self.rows.append(int(args[0].offsets_S[-1]))
        self._began[module] = self._now()

    def _end(self, times: list[float]) -> Callable:
        return lambda module, args, out: times.append(self._now() - self._began.pop(module))


def costs(
    watch: Stopwatch, *, dim: int, expert: int, dtype: torch.dtype, group: ProcessGroup | None,
    every: ProcessGroup | None, gathers: int, reduces: int,
) -> Costs:  # fmt: skip
    """Where a step brings a replica ``gathers`` times and sends its gradient back ``reduces`` times.

    ``expert``: numbers of one; ``group``: who experts travel among; ``every``: who has to agree. Collective.
    """
    device = watch._device
    computed = torch.tensor(watch.steps, dtype=torch.float64, device=device)
    steps = comm.all_reduce_(computed, group=every).tolist()  # of all ranks: one with few rows takes long for a row
    seconds_row = 3 * min(seconds / max(1, rows) for seconds, rows in steps)
    shared = world.ranks_a_processor(device)
    attention = 3 * statistics.median(watch.attention) * max(1, gathers // 2) if watch.attention else 0.0
    one = _trip(expert, group, dtype, device) / shared
    hop = 4 * dim * one / expert  # there and back, forward and backward
    hidden = 0.0 if world.on_cpu(device) else attention  # who computes on a CPU also carries
    found = torch.tensor(
        [seconds_row, hop, one * (gathers + reduces), hidden, shared * 1e-6], dtype=torch.float64, device=device
    )
    comm.all_reduce_(found, group=every, op=dist.ReduceOp.MAX)
    return Costs(*(float(f"{1e6 * x:.3g}") for x in found.tolist()))


def _trip(numbers: int, group: ProcessGroup | None, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds until every rank has sent one expert to the next and has one."""
    if group is None:
        return 0.0
    ranks, rank = group.size(), group.rank()
    send, recv = ([int(r == (rank + step) % ranks) for r in range(ranks)] for step in (1, -1))
    x, into = (torch.zeros(1, numbers, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(_TIMES):
        dist.barrier(group=group)
        since = time.perf_counter()
        into.copy_(x)  # out of the weights, and into the gradient
        comm.start_all_to_all(into, x, recv=recv, send=send, group=group).wait()  # pyright: ignore
        _done(into)
        times.append(time.perf_counter() - since)
    return min(times)  # what it takes, not what others took


def _done(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
