"""A small run on a device, and ranks that share one GPU: spawned, since CUDA does not survive a fork."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain.config import load
from moetrain.job import Config, open_data
from moetrain.parallel import state
from moetrain.train import Trainer
from moetrain.world import World

BALANCE = {"switch": {"kind": "switch", "coef": 0.05}, "expert_bias": {"kind": "expert_bias", "rate": 0.01}}
MODEL = {
    "vocab_size": 512, "dim": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "first_dense": 1,
    "dense_hidden": 96, "qk_norm": "head", "init_std": 0.1,
    "moe": {"num_experts": 8, "hidden": 48, "shared_hidden": 16, "balance": BALANCE},
}  # fmt: skip
TRAIN = {"steps": 10, "batch": 8, "micro_batch": 2, "seq_len": 64, "dtype": "float32"}


def config(corpus: Path, folder: Path, **groups: dict) -> Config:
    """``groups`` are merged over the small run one level deep."""
    base: dict = {
        "seed": 3, "model": MODEL, "train": TRAIN, "optim": {"lr": 1e-2, "warmup": 2, "clip": 0.5},
        "data": {"corpora": {"small": {"path": str(corpus)}}}, "run": {"dir": str(folder.parent), "name": folder.name},
    }  # fmt: skip
    for name, keys in groups.items():
        base[name] = base.get(name, {}) | keys
    return load(base, Config)


def trainer(cfg: Config, device: torch.device, *, rank: int = 0, world: int = 1) -> Trainer:
    """A rank's trainer; with several, the default group is gloo over all of them."""
    group = dist.group.WORLD if world > 1 else None
    here = World(rank, world, rank, world, device, "gloo" if world > 1 else "", group)
    return Trainer(cfg, here, open_data(cfg, log=lambda line: None))


def weights(run: Trainer) -> dict[str, Tensor]:
    return {n: state.local(p).cpu().clone() for n, p in run.model.named_parameters()}


def curve(rank: int, world: int, device: str, cfg: Config, steps: int) -> list[list[float]]:
    """(loss, gradient norm) of each step, the loss summed over the ranks."""
    run, found = trainer(cfg, torch.device(device), rank=rank, world=world), []
    for _ in range(steps):
        result = run.step()
        loss = result.loss.double()
        if world > 1:
            dist.all_reduce(loss)
        found.append([loss.item(), result.norm.item()])
    return found


def spawn(world: int, fn: Callable[..., Any], *args: Any, device: torch.device, timeout: float = 150.0) -> list[Any]:
    """What ``fn(rank, world, device, *args)`` returned on each of ``world`` gloo ranks; all on one device."""
    context = multiprocessing.get_context("spawn")
    folder = Path(tempfile.mkdtemp(prefix="gpu-ranks-"))
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(rank, world, str(device), folder, theirs, pickle.dumps((fn, args)), timeout),
            daemon=True,
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        answers = [_receive(pipe, timeout) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    failed = [f"[rank {rank}] {value}" for rank, (ok, value) in enumerate(answers) if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def _receive(pipe: Connection, timeout: float) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout) else (False, f"no answer in {timeout:.0f} s")
    except EOFError:
        return False, "died"


def _serve(rank: int, world: int, device: str, folder: Path, pipe: Connection, call: bytes, timeout: float) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        fn, args = pickle.loads(call)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=timeout))
        reply = pickle.dumps((True, fn(rank, world, device, *args)))
        dist.destroy_process_group()
    except BaseException as error:
        reply = pickle.dumps((False, "".join(traceback.format_exception(error))))
    pipe.send_bytes(reply)
