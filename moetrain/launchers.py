"""Which rank this process is, by its launcher's variables, and where the ranks meet. One place reads them.

torchrun, moetrain train    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
srun, one task a rank       SLURM_NODEID, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE
neither, or srun -n 1       this process alone, which starts ranks of its own where the layout asks for several
"""

import contextlib
import fcntl
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain.config import UserError

_OFF = "called off"
_SIOCGIFADDR = 0x8915  # Linux's; elsewhere no address is found, and the host's name is posted


@dataclass(frozen=True)
class RankInfo:
    """This process among the others; ``by``: torchrun, srun, or nobody ("")."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    by: str = ""
    own_gpu: bool = False  # its launcher shows it no GPU but its own


def rank_info(environ: Mapping[str, str] = os.environ) -> RankInfo:
    """By those of torchrun where both are there."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local = int(environ.get("LOCAL_RANK", rank)), int(environ.get("LOCAL_WORLD_SIZE", size))
        return RankInfo(rank, size, *local, by="torchrun")
    # A batch script and salloc's shell have SLURM_PROCID too, and srun --pty bash is a step of one task.
    if "SLURM_STEP_ID" not in environ or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return RankInfo()
    node, local_rank = int(environ["SLURM_NODEID"]), int(environ["SLURM_LOCALID"])
    tasks = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    rank = sum(tasks[:node]) + local_rank  # however tasks were dealt, those of a node are consecutive
    own_gpu = "SLURM_GPUS_PER_TASK" in environ
    return RankInfo(rank, sum(tasks), local_rank, tasks[node], by="srun", own_gpu=own_gpu)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's way of writing it: 4(x2),3 is 4, 4, 3."""
    found = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return found


def meet(here: RankInfo, limit: timedelta, *, folder: Path | None) -> Store | None:
    """A store of this life's own, opened by rank 0, which posts its addresses where the others look; None where the
    launcher has said an address that is good as it is.

    torchrun  posted in its agents' store. torch 2.13 would have the ranks meet in that store itself, without a prefix
              for each attempt of ``--max-restarts``, so that a second attempt reads the addresses of dead processes.
    srun      posted in ``folder``, on the disk that all ranks share, in a file of that step of the job.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agents = PrefixStore("moetrain", TCPStore(*where, is_master=False, timeout=limit))
        return _meet(
            here, limit, post=lambda text: agents.set("rank 0", text), read=lambda: agents.get("rank 0").decode(),
            board=f"the agents' store at {where[0]}:{where[1]}",
        )  # fmt: skip
    if here.by != "srun" or "MASTER_PORT" in os.environ:
        return None
    assert folder is not None
    path = _step_file(folder)
    return _meet(
        here, limit, post=lambda text: _post(path, text), read=lambda: path.read_text() if path.exists() else "",
        board=str(path),
    )  # fmt: skip


def call_off(folder: Path) -> None:
    """By rank 0, which will not come: tells the ranks of srun that wait for it, as a launcher's agents would."""
    if rank_info().by == "srun":
        with contextlib.suppress(OSError):  # then they wait
            _post(_step_file(folder), _OFF)


def _step_file(folder: Path) -> Path:
    names = "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"
    return folder / "meet" / "-".join(os.environ.get(name, "0") for name in names)


def _post(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.iterdir():
        old.unlink(missing_ok=True)
    (written := path.with_suffix(".tmp")).write_text(text)
    written.rename(path)


def _meet(
    here: RankInfo, limit: timedelta, *, post: Callable[[str], None], read: Callable[[], str], board: str
) -> Store:  # fmt: skip
    if here.rank == 0:
        store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=limit)
        name = secrets.token_hex(8)  # what is left of an earlier rank 0 does not answer, or by another name
        store.set("name", name)
        post(" ".join([name, str(store.port), *addresses()]))
        _pick_interface(here, store, "")
        return store
    until, found, why = time.monotonic() + limit.total_seconds(), "", ""
    while time.monotonic() < until:
        name, port, *hosts = (found := read()).split() or ("", "0")
        if found == _OFF:
            raise UserError("rank 0 has found something to mend, and says what")
        for host in hosts:
            if time.monotonic() > until:
                break
            try:
                store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=2))
                if store.get("name").decode() == name:
                    store.set_timeout(limit)
                    _pick_interface(here, store, host)
                    return store
                why = f"{host}:{port} is another run's"
            except (RuntimeError, OSError) as error:
                why = str(error).splitlines()[0]
        time.sleep(0.2)
    raise RuntimeError(
        f"rank {here.rank} of {here.size} found no rank 0 in {limit.total_seconds():.0f} s: posted in {board}: "
        f"{found or 'nothing'}{f' ({why})' if why else ''}; is rank 0 running, and is there a way to it?"
    )


def _pick_interface(here: RankInfo, store: Store, host: str) -> None:
    """The network for gloo, which else takes the one that the host's own name resolves to, on many hosts the loopback:
    the one by which another node has reached rank 0."""
    if "GLOO_SOCKET_IFNAME" in os.environ or here.local_size == here.size:
        return
    if here.rank == here.size - 1:
        store.set("reached", host)
    at = store.get("reached").decode()
    if here.rank >= here.local_size:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((at, 1))
            at = probe.getsockname()[0]
    else:
        at = socket.gethostbyname(at)
    if name := next((name for name, address in _interfaces() if address == at), None):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def addresses() -> list[str]:
    """Of this host, those first by which others are likeliest to reach it."""
    named = (os.environ.get("NCCL_SOCKET_IFNAME", ""), os.environ.get("GLOO_SOCKET_IFNAME", ""))
    first, rest, loopback = [], [], []
    if "MASTER_ADDR" in os.environ:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 1))
            first.append(probe.getsockname()[0])
    for name, address in _interfaces():
        (loopback if address.startswith("127.") else first if name in named else rest).append(address)
    return list(dict.fromkeys([*first, *rest, socket.gethostname(), *loopback]))


def _interfaces() -> list[tuple[str, str]]:
    """(name, IPv4 address) of those that have one."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                packed = fcntl.ioctl(any_, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(packed[20:24])))
    return found
