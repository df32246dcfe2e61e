"""Which rank this process is, on which device, and the process group it joins. One place reads the environment."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Store  # pyright: ignore[reportPrivateImportUsage]

from moetrain.config import UserError
from moetrain.launchers import meet, rank_info
from moetrain.layouts import Layout


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Communication(Enum):
    auto = "auto"  # NCCL where every rank of a node has a GPU of its own, else gloo
    gloo = "gloo"
    nccl = "nccl"


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str  # "" where this rank is alone
    host_group: ProcessGroup | None = None  # gloo over all ranks, for what travels between hosts' memories
    watch: float = 600.0  # seconds at one place that are a hang
    limit: timedelta = timedelta(minutes=15)  # of every collective, where nobody has ended it before

    def new_host_group(self) -> ProcessGroup | None:
        """Another gloo group of all ranks, for collectives beside the others'; None for a rank alone. Collective."""
        return made(dist.new_group(backend="gloo", timeout=self.limit)) if self.size > 1 else None

    @property
    def main(self) -> bool:
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher (torchrun, srun) has told this process its rank."""
    return bool(rank_info().by)


def ranks_here() -> int:
    """How many ranks the launcher has started on this node; 0 where none has."""
    return rank_info().local_size if launched() else 0


def pick_device(wanted: Device, *, local_rank: int = 0) -> torch.device:
    """The device of a rank; raises ``UserError`` if a GPU is asked for and torch sees none."""
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError(
            "train.device=cuda: torch sees no GPU here; use train.device=cpu or install a CUDA build of torch"
        )
    if wanted is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # ranks may share a GPU


def wanted_ranks(layout: Layout, *, device: Device) -> int:
    """Ranks to start on this machine: what the layout says; with dp = -1 every usable GPU, on a CPU the fewest."""
    least = layout.world
    if layout.dp != -1 or pick_device(device).type == "cpu":
        return least
    return max(least, torch.cuda.device_count() // least * least)


def made(group: ProcessGroup | int | None) -> ProcessGroup:
    """What ``new_group`` returns to a member."""
    assert isinstance(group, ProcessGroup)
    return group


def join(
    *,
    device: Device,
    communication: Communication,
    timeout: float,
    threads: int | None,
    folder: Path | None = None,
    store: Store | None = None,
) -> World:
    """Read the launcher's variables, pick the device, join the process group. ``leave`` undoes it.

    ``folder``, on a disk that all ranks share, is where those of srun find each other. ``store``: where the ranks meet,
    if not at the launcher's address.
    """
    here = rank_info()
    rank, size, local_rank, local_size = here.rank, here.size, here.local_rank, here.local_size
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    where = pick_device(device, local_rank=local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    if size == 1:
        return World(rank, size, local_rank, local_size, where, "")
    backend = _backend(communication, where, 1 if here.own_gpu else local_size)
    limit = timedelta(seconds=1.25 * timeout + 10)  # the watchdog speaks first
    store = store or meet(here, limit, folder=folder)
    if backend == "gloo":
        if local_size == size:  # all on this machine: the host name need not resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=limit, store=store)
        return World(rank, size, local_rank, local_size, where, backend, dist.group.WORLD, timeout, limit)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", rank=rank, world_size=size, timeout=limit, device_id=where, store=store
    )
    host_group = made(dist.new_group(backend="gloo", timeout=limit))
    return World(rank, size, local_rank, local_size, where, backend, host_group, timeout, limit)


def die_with(parent: int) -> None:
    """End when process ``parent`` does, however it ends: a rank left alone would write into the next one's files."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def keep_freed_memory() -> None:
    """Have glibc reuse what a step frees, not return it: else every step faults its pages in anew (docs/LOG.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not there on macOS or musl
    if sys.platform == "linux" and mallopt is not None:
        for option, size in ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20)):  # mmap and trim thresholds, top pad
            mallopt(option, size)


def leave(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def ranks_a_processor(device: torch.device) -> float:
    """How many ranks of this machine take turns on one core, each of their threads counted, or on one GPU."""
    if device.type == "cuda":
        return max(1.0, ranks_here() / torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, ranks_here() * torch.get_num_threads() / cores)


def on_cpu(at: Tensor | torch.device) -> bool:
    """Whether the code for CPUs runs there. A dry run (``memory/``), whose tensors are nowhere, answers for a GPU."""
    return (at.device if isinstance(at, Tensor) else at).type == "cpu"


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A batch's tensor on ``device``; to a GPU by way of pinned memory, so that the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def allow_fixed_order(device: torch.device) -> None:
    """Once, before the first matmul: what ``fixed_order`` needs on a GPU."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward is not reproducible; chosen in the forward
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def fixed_order(device: torch.device, *, on: bool) -> Iterator[None]:
    """A backward run inside adds in a fixed order. On a GPU, attention's would otherwise add by atomics."""
    if not on or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _backend(wanted: Communication, device: torch.device, local_size: int) -> str:
    fits = device.type == "cuda" and local_size <= torch.cuda.device_count()
    if wanted is Communication.nccl and not fits:
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise UserError(
            f"train.communication=nccl needs a GPU for each of the {local_size} ranks of this node, there are {have}: "
            f"use train.communication=gloo or start {have or 'fewer'} ranks"
        )
    return "nccl" if fits and wanted is not Communication.gloo else "gloo"
