"""Dispatch and combine alone: microseconds, bytes against the copy ceiling, kernels launched, host syncs.

    python benchmarks/dispatch.py cuda "NVIDIA H200" [--small]
    torchrun --nproc-per-node 4 benchmarks/dispatch.py cuda "NVIDIA H200"       ranks of one expert group; prints only

Every dispatcher of the project, at two of the layer's shapes: logits -> top-k -> sort -> rows by slot -> gathered ->
weighted, as one that computes nothing would give them back -> each token's sum; forward, and backward alike. The bytes
are those of rows that have to move: a row read and written by the gather and by the sum, forward and backward, and on N
ranks what others send. Kernels are counted by the profiler (copies and fills among them), syncs by torch's own mode,
in one forward and backward after the warm-up.
"""

import statistics
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial

import ceilings
import torch
from gpu_results import (
    DISPATCH_SHAPES,
    DISPATCHERS,
    dispatch_cell,
    failed,
    measured,
    named,
    not_measured,
    record,
    versions_here,
)
from gpu_timing import Timer, free, in_turns, one_line
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import comm
from moetrain.config import OPTIONS, UserError
from moetrain.kernels import routing
from moetrain.moe.routers.topk import TopK
from moetrain.moe.rows import gather, gather_sum
from moetrain.moe.types import Context, Dispatcher, Slots, Tokens
from moetrain.world import Communication, Device, World, join, leave

ROUNDS, INPUTS = 20, 3


@dataclass
class Case:
    """One dispatcher on this rank's tokens."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    group: ProcessGroup | None
    timer: Timer
    rows: int = 0  # that the last call gathered on this rank

    def __post_init__(self) -> None:
        T, D, _, E, K = self.shape
        ranks = comm.size(self.group)
        option, _, fused = self.name.partition(", ")
        self.dispatcher: Dispatcher = OPTIONS["dispatcher"][option]()
        if fused:  # by the kernels of kernels/routing.py
            routing.check(device=self.device, dtype=torch.bfloat16)
        self.router = TopK(top_k=K, fused=bool(fused))
        self.slots = Slots(torch.arange(E, device=self.device)[:, None], E // ranks, self.group)
        self.position_S = torch.arange(T, device=self.device)
        sample_B = torch.zeros(1, dtype=torch.int64)
        self.tokens = Tokens(1, self.position_S, sample_B=sample_B)
        self.ctx = Context(step=0, micro_batch=0, sample_B=sample_B, position_S=self.position_S, routed_tokens=float(T))
        self.bias_E = torch.zeros(E, device=self.device)
        self.inputs = [
            (torch.randn(T, D, device=self.device, dtype=torch.bfloat16), torch.randn(T, E, device=self.device))
            for _ in range(INPUTS)
        ]
        self.grad_TD = torch.randn(T, D, device=self.device, dtype=torch.bfloat16)

    def forward(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        chosen = replace(self.router(logits_TE, self.bias_E, ctx=self.ctx, layer=0), fused=self.router.fused)
        rows, ticket = self.dispatcher.dispatch(x_TD, chosen, tokens=self.tokens, slots=self.slots)
        x_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged)
        self.rows = x_MD.shape[0]
        y_MD = x_MD * rows.weights_M[:, None].to(x_MD.dtype)
        return self.dispatcher.combine(gather_sum(y_MD, rows.index_M, rows.back_NJ, ragged=rows.ragged), ticket)

    def __call__(self, i: int) -> list[float]:
        """Seconds of a forward and of its backward."""
        x_TD, logits_TE = (x.detach().requires_grad_() for x in self.inputs[i % INPUTS])
        self.timer.flush()
        start = self.timer.mark()
        y_TD = self.forward(x_TD, logits_TE)
        middle = self.timer.mark()
        torch.autograd.grad(y_TD, [x_TD, logits_TE], self.grad_TD)
        end = self.timer.mark()
        return [self.timer.seconds(start, middle), self.timer.seconds(middle, end)]

    def moved(self) -> int:
        """Bytes of rows that one way needs: read and written by the gather, read by the sum, which writes the tokens'.

        Backward is the mirror. Others' rows come on top: dropless sends each assignment, all-gather each token.
        """
        T, D, _, _, K = self.shape
        ranks = comm.size(self.group)
        away = 0 if ranks == 1 else 2 * 2 * D * T * K * (ranks - 1) // ranks
        return 2 * D * (3 * self.rows + T) + away

    def counted(self) -> tuple[int, int]:
        """Kernels launched and host syncs made by one forward and backward; -1 where there is no GPU to ask."""
        if not self.timer.cuda:
            self(0)
            return -1, -1
        x_TD, logits_TE = (x.detach().requires_grad_() for x in self.inputs[0])

        def once() -> None:
            torch.autograd.grad(self.forward(x_TD, logits_TE), [x_TD, logits_TE], self.grad_TD)

        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                once()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        syncs = sum("synchroniz" in str(w.message) for w in caught)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            once()
            torch.cuda.synchronize()
        kernels = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in found.events() or [])
        return kernels, syncs


def measure(
    cases: dict[str, Case], tops: ceilings.Ceilings, *, rounds: int
) -> dict[str, dict]:  # name of the dispatcher -> cell
    counts = {name: case.counted() for name, case in cases.items()}
    for case in cases.values():
        for i in range(3):
            case(i)
    found = in_turns({name: partial(Case.__call__, case) for name, case in cases.items()}, rounds=rounds)
    cells = {}
    for name, case in cases.items():
        forward, backward = (statistics.median(t[i] for t in found[name]) for i in (0, 1))
        kernels, syncs = counts[name]
        floor = case.moved() / tops.copy
        asked = {"kernels": kernels, "host_syncs": syncs} if kernels >= 0 else {}
        cells[name] = measured(
            (forward + backward) * 1e6, "us forward and backward",
            forward=f"{forward * 1e6:.0f} us, {floor / forward:.0%} of the copy ceiling",
            backward=f"{backward * 1e6:.0f} us, {floor / backward:.0%}",
            rows=f"{case.rows:,}",
            moved=f"{case.moved() / 2**30:.3g} GiB each way ({tops.copy / 1e12:.3g} TB/s copied)",
            **asked,
        ) | {"data": {"seconds": found[name], "versions": versions_here()}}  # fmt: skip
    return cells


def main(world: World, name: str, *, small: bool) -> int:
    bad, device = 0, world.device
    alone = world.size == 1
    group = None if alone else torch.distributed.group.WORLD
    tops = ceilings.measure(device, small=small)
    if world.rank == 0:
        print(tops, flush=True)
    for shape in DISPATCH_SHAPES:
        T, D, F, E, K = shape
        used = (T // 256, D // 8, F // 8, E // 8, max(2, K // 4)) if small else shape
        try:
            timer = Timer(device)
            cases, absent = {}, {}
            for n in DISPATCHERS:
                try:
                    cases[n] = Case(n, used, device, group, timer)
                except UserError as error:
                    absent[n] = not_measured(one_line(error))
            cells = measure(cases, tops, rounds=3 if small else ROUNDS) | absent
        except Exception as error:
            bad, cells = 1, {n: failed(one_line(error)) for n in DISPATCHERS}
        for dispatcher, cell in cells.items():
            if world.rank == 0:
                print(f"{named(shape)} as {used}, {world.size} ranks over {world.backend or 'nothing'}: {dispatcher}",
                      {k: v for k, v in cell.items() if k != "data"}, flush=True)  # fmt: skip
            if alone:
                record(name, {dispatch_cell(shape, dispatcher): cell})
        cases = {}
        free()
    return bad


if __name__ == "__main__":
    where = Device(torch.device(sys.argv[1]).type)
    joined = join(device=where, communication=Communication.auto, timeout=120.0, threads=None)
    code = main(joined, sys.argv[2], small="--small" in sys.argv)
    leave(joined)
    sys.exit(code)
