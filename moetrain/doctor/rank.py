"""One rank of a doctor: with the others, every check that takes several; rank 0 judges, and tells each finding."""

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from moetrain import comm, where
from moetrain import config as configs
from moetrain.config import UserError, config
from moetrain.doctor import groups, here, pairs, storage
from moetrain.doctor.findings import Finding, Level, bad, ok
from moetrain.job import Config
from moetrain.mesh import Mesh
from moetrain.telemetry.sinks import open_log
from moetrain.watchdog import Watchdog
from moetrain.world import World, die_with, join, leave

Tell = Callable[[Finding], None]
_WAIT = 60.0
"""Seconds for a file to be seen: NFS looks at a folder again after so long at the most."""


@config
class DoctorConfig:
    """Keys of ``doctor.``: how long to look, and what is slow."""

    megabytes: list[float] = field(default_factory=lambda: [0.25, 16.0])  # a rank's buffers
    rounds: int = 5  # of which a rate is the median
    slow: float = 4.0  # times below the median of all pairs, from which on one is slow

    def __post_init__(self) -> None:
        if not self.megabytes or not all(0 < x <= 65536 for x in self.megabytes):
            raise UserError(f"doctor.megabytes={self.megabytes}: a list of sizes above 0, for example [0.25,16]")
        if self.rounds < 1:
            raise UserError(f"doctor.rounds={self.rounds}: has to be at least 1")
        if not self.slow > 1:
            raise UserError(f"doctor.slow={self.slow}: has to be above 1, times below the median")


def be_rank(cfg: Config, own: DoctorConfig, tell: Tell, *, folder: Path | None) -> None:
    """Be one of the ranks that were started. ``folder``: where all of them write; None: one of ``run.dir``, made here.

    Raises ``UserError``; ``RuntimeError`` where the ranks do not meet, or a collective fails.
    """
    t = cfg.train
    world = join(
        device=t.device, communication=t.communication, timeout=t.timeout, threads=t.threads, folder=cfg.run.folder
    )
    name = _said(world, f".doctor-{secrets.token_hex(4)}")
    place = folder or Path(cfg.run.dir).expanduser() / name
    log = open_log(folder, rank=world.rank, quiet=True) if folder else _on_stderr()
    watchdog = Watchdog(world, place, life=1, log=log)
    try:
        examine(cfg, own, world, tell, place=place)
    except Exception:
        log.error(traceback.format_exc())
        raise
    finally:
        watchdog.close()
        if folder is None and world.main:
            with contextlib.suppress(OSError):
                place.rmdir()
    leave(world)


def _on_stderr() -> logging.Logger:
    log = logging.getLogger("moetrain")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    return log


def examine(cfg: Config, own: DoctorConfig, world: World, tell: Tell, *, place: Path) -> None:
    """Collective. ``place``: a folder that is to be made, and gone afterwards."""
    where.at("a doctor's question to all ranks")
    hosts = _hosts(cfg, world, tell)
    where.at("a doctor's sum on its device")
    computed = _gathered(_computed(world.device), world)
    if world.main:
        wrong = {r: words for r, words in enumerate(computed) if words}
        for r, words in wrong.items():
            tell(bad("device", f"rank {r} ({hosts[r]}) on {world.device.type}: {words}"))
        if not wrong:
            tell(ok("device", f"every rank's {world.device.type} computes what is known"))
    if world.size > 1:
        _communicate(cfg, own, world, tell, hosts)
    where.at("a doctor's look at shared storage")
    wait = min(_WAIT, world.watch / 3)
    folder = place / "storage"
    mine = storage.begin(folder) if world.main else {}
    if not _said(world, mine.get("error", "")) and not world.main:
        mine = storage.answer(folder, world.rank, wait=wait)
    told = _gathered(mine, world)
    if world.main:
        for finding in storage.end(folder, told, wait=wait):
            tell(finding)
    comm.barrier(world.host_group)


def _communicate(cfg: Config, own: DoctorConfig, world: World, tell: Tell, hosts: list[str]) -> None:
    layout, sizes = cfg.layout.solve(world.size), sorted(int(1e6 * x) for x in own.megabytes)
    mesh = Mesh.build(layout, rank=world.rank, world=world.size, device=world.device, timeout=world.limit)
    kinds = groups.of_layout(layout)
    for kind in kinds:
        where.at(f"a doctor's look at {kind}")
        found = groups.measure(kind, mesh, bytes=sizes, rounds=own.rounds, device=world.device)
        of_ranks = _gathered(found, world)
        if world.main:
            for finding in groups.judged(kind, of_ranks, hosts):
                tell(finding)
    where.at("a doctor's look at pairs of ranks")
    turns = pairs.chosen(kinds, world=world.size)
    found = pairs.measure(turns, world, bytes=sizes[-1], rounds=own.rounds)
    of_ranks = _gathered(found, world)
    if world.main:
        rates = {pair: rate for of in of_ranks for pair, rate in of.items()}
        for finding in pairs.judged(rates, hosts, slow=own.slow):
            tell(finding)


def _hosts(cfg: Config, world: World, tell: Tell) -> list[str]:
    """On rank 0, each rank's host, and findings: who is where, who has other versions, what is not well elsewhere."""
    host = socket.gethostname()
    first = _said(world, host)
    look = world.local_rank == 0 and host != first
    notes = [f.encode() for f in here.look(cfg) if f.level is not Level.ok] if look else []
    every = _gathered({"host": host, "versions": here.versions(), "notes": notes}, world)
    if not world.main:
        return []
    hosts = [it["host"] for it in every]
    there = {host: [r for r, h in enumerate(hosts) if h == host] for host in hosts}
    words = ", ".join(f"{host} ({len(ranks)})" for host, ranks in there.items())
    over = f" over {world.backend}" if world.backend else ", alone: no groups and no pairs"
    tell(ok("ranks", f"{world.size} on {world.device.type}{over}, on {len(there)} host(s): {words}", there))
    for name in every[0]["versions"]:
        of = {it["versions"][name]: it["host"] for it in reversed(every)}
        if len(of) > 1:
            tell(bad("versions", f"{name} differs: " + ", ".join(f"{v or 'none'} on {h}" for v, h in of.items())))
    for it in every:
        for note in map(Finding.decode, it["notes"]):
            tell(Finding(note.level, f"{it['host']}, {note.what}", note.words, note.data))
    return hosts


def _computed(device: torch.device) -> str | None:
    """What is wrong with a matmul of whole numbers, which has one result in any order."""
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.arange(256 * 256, device=device) % 2).view(256, 256).to(dtype)
            if not torch.equal((x @ x.t()).double().cpu(), torch.full((256, 256), 128.0, dtype=torch.double)):
                return f"a matmul in {dtype} is wrong"
    except RuntimeError as error:
        return f"cannot compute: {str(error).splitlines()[0]}"
    return None


def _gathered(mine: Any, world: World) -> list[Any]:
    """On rank 0, what all ranks have; elsewhere nothing."""
    if world.size == 1:
        return [mine]
    found: list[Any] = [None] * world.size
    with where.inside("gathering of what ranks found"):
        dist.gather_object(mine, found if world.main else None, dst=0, group=world.host_group)
    return found if world.main else []


def _said(world: World, words: str) -> str:
    """By rank 0, known to all."""
    said = [words]
    if world.size > 1:
        with where.inside("word from rank 0"):
            dist.broadcast_object_list(said, src=0, group=world.host_group)
    return said[0]


def end(code: int) -> NoReturn:
    """Of a rank that has left the others, at once: torch 2.13 over gloo was seen to abort every second such process
    while the interpreter took itself apart ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def local(folder: Path) -> int:
    """One of the ranks that ``moetrain doctor`` starts itself; rank 0 leaves what is found in ``found.json``."""
    cfg, found = configs.read(folder / "config.yaml", Config), []

    def tell(finding: Finding) -> None:
        found.append(finding.encode())
        temporary = folder / "found.tmp"
        temporary.write_text(json.dumps(found))
        os.replace(temporary, folder / "found.json")

    own = configs.load(json.loads((folder / "doctor.json").read_text()), DoctorConfig, "doctor")
    rank = os.environ.get("RANK", "0")
    try:
        be_rank(cfg, own, tell, folder=folder)
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        print(f"rank {rank}: {failure(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    die_with(int(os.environ["MOETRAIN_PARENT"]))  # a killed doctor takes its ranks along
    end(local(Path(sys.argv[1])))
