"""Which rank this process is, on which device, and the process group it joins. One place reads the environment."""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain.config import UserError
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
    """Whether a launcher (torchrun) has told this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_here() -> int:
    """How many ranks the launcher has started on this node; 0 where none has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0))


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
    store: Store | None = None,
) -> World:
    """Read the launcher's variables, pick the device, join the process group. ``leave`` undoes it.

    ``store``: where the ranks meet, if not at the launcher's address.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    where = pick_device(device, local_rank=local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    if size == 1:
        return World(rank, size, local_rank, local_size, where, "")
    backend = _backend(communication, where, local_size)
    limit = timedelta(seconds=1.25 * timeout + 10)  # the watchdog speaks first
    store = store or _meet(rank, size, limit)
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


def _meet(rank: int, size: int, limit: timedelta) -> Store | None:
    """A store of this life's own, where torchrun would have its ranks meet in one that outlives them.

    torch 2.13 shares the agents' store between the attempts of ``--max-restarts`` without a prefix, so that a second
    attempt reads the addresses of processes that are dead. Here rank 0 opens a store and says where; what is left of
    an earlier rank 0 does not answer, or by another name.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = PrefixStore("moetrain", TCPStore(*where, is_master=False, timeout=limit))
    if rank == 0:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # the address by which the agent is reached
            probe.connect(where)
            host = probe.getsockname()[0]
        own = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        name = secrets.token_hex(8)
        own.set("name", name)
        agents.set("rank 0", f"{host} {own.port} {name}")
        return own
    until = time.monotonic() + limit.total_seconds()
    while True:
        host, port, name = agents.get("rank 0").decode().split()
        try:
            own = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=2))
            if own.get("name").decode() == name:
                own.set_timeout(limit)
                return own
        except RuntimeError:
            pass
        if time.monotonic() > until:
            raise RuntimeError(
                f"rank {rank} of {size} found no rank 0 at {host}:{port} in {limit.total_seconds():.0f} s"
            )
        time.sleep(0.2)


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
