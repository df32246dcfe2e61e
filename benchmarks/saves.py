"""What a save costs: training with and without one in turn, 1 GiB of state or more on each rank.

python benchmarks/saves.py [--ranks 2] [--pairs 10] [--write]

stall         the longest step of an interval with a save over the median step, and what the saver itself measured
added         time of an interval with a save, beside one without, just long enough for the save to end in it
copy          bytes a second of the snapshot, beside the same tensors copied by themselves
save, load    bytes a second of all ranks, nothing else running, beside plain files of the same size written and
              synced, or read, by as many processes at once; both read from the disk, not from the page cache
"""

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from saving import begin, end

from moetrain import checkpoint, comm
from moetrain.config import load
from moetrain.job import CheckpointConfig, Config, Data
from moetrain.resume import Start
from moetrain.saving import Saver
from moetrain.train import Trainer
from moetrain.verify.tokens import Synthetic
from moetrain.world import World

RESULTS = Path(__file__).parent / "results" / "saves-cpu.json"
MODEL = {
    "vocab_size": 1000, "dim": 256, "num_layers": 8, "num_heads": 4, "num_kv_heads": 4, "first_dense": 0,
    "moe": {"num_experts": 64, "hidden": 512, "router": {"kind": "topk", "top_k": 1, "renormalize": False}},
}  # fmt: skip
TRAIN = {"steps": 10**6, "batch": 2, "micro_batch": 1, "seq_len": 128, "device": "cpu", "threads": 1}


def rank(rank: int, world: int, folder: Path, args: argparse.Namespace, address: str) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.set_num_threads(1)
    here = World(rank, world, rank, world, torch.device("cpu"), "gloo", dist.group.WORLD)
    layout = {"dp": world, "ep": world}
    cfg = load({"model": MODEL, "train": TRAIN, "layout": layout, "run": {"dir": str(folder), "name": "run"}}, Config)
    data = Synthetic(cfg.data, seq_len=TRAIN["seq_len"], vocab_size=MODEL["vocab_size"], seed=1)
    run = Trainer(cfg, here, Data({}, data, {}))
    root = folder / "run" / "checkpoints"
    life = checkpoint.Life(root, checkpoint.Wire(here.host_group).decide(lambda: checkpoint.take_over(root).number))
    saver = Saver(CheckpointConfig(keep=1), here, root, life)
    log = logging.getLogger("saves")
    mine = sum(c.tensor.numel() * c.tensor.element_size() for x in run.tensors().values() for c in x.chunks)

    def interval(steps: int, *, save: bool) -> tuple[list[float], float]:
        """Seconds of each step, the first with the save's stall in it; and of all, until the save has ended."""
        times, began = [], time.perf_counter()
        for i in range(steps):
            since = time.perf_counter()
            if i == 0 and save:
                saver.save(*run.state(), log=log)
            run.step()
            saver.poll(log)
            times.append(time.perf_counter() - since)
        saver.finish(log, must=True)
        comm.barrier(here.host_group)
        return times, time.perf_counter() - began

    for _ in range(2):  # warm up: copies are made, the disk is touched
        times, _ = interval(4, save=True)
    steps = max(4, round(2.0 * saver.took / statistics.median(times[1:])))
    steps = int(comm.all_reduce_(torch.tensor(steps), group=here.host_group, op=dist.ReduceOp.MAX))
    with_, without, stalls, took = [], [], [], []
    for _ in range(args.pairs):
        without.append(interval(steps, save=False))
        with_.append(interval(steps, save=True))
        stalls.append(saver.stalled)
        took.append(saver.took)
    found = {
        "bytes": mine, "steps": steps, "without": without, "with": with_, "stalled": stalls, "took": took,
        "copied": sum(t.numel() * t.element_size() for t in saver._copies.values()),
        "copy": _copies(saver), "disk": [], "alone": [], "load": [], "read": [],
    }  # fmt: skip
    path = folder / f"plain-{rank}"
    for _ in range(args.pairs):
        found["disk"].append(_timed(here, lambda: _plain_write(path, found["copied"])))
        run.step()  # a step is saved once
        found["alone"].append(_timed(here, lambda: _save(saver, run, log)))
        saved = checkpoint.latest(root)
        assert saved is not None
        _forget([path, *saved.iterdir()])
        found["read"].append(_timed(here, lambda: _plain_read(path)))
        _forget([path, *saved.iterdir()])
        start = Start(saved)
        found["load"].append(_timed(here, partial(run.load, start)))
    dist.destroy_process_group()
    return found


def _timed(here: World, job) -> float:
    comm.barrier(here.host_group)
    since = time.perf_counter()
    job()
    comm.barrier(here.host_group)
    return time.perf_counter() - since


def _save(saver: Saver, run: Trainer, log: logging.Logger) -> None:
    saver.save(*run.state(), log=log)
    saver.finish(log, must=True)


def _copies(saver: Saver) -> list[float]:
    """Seconds to copy the snapshot's tensors by themselves."""
    sources = [copy.clone() for copy in saver._copies.values()]
    times = []
    for _ in range(5):
        since = time.perf_counter()
        for copy, source in zip(saver._copies.values(), sources, strict=True):
            copy.copy_(source)
        times.append(time.perf_counter() - since)
    return times


def _plain_write(path: Path, size: int) -> None:
    piece = os.urandom(2**22)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())


def _plain_read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(2**22):
            pass


def _forget(paths: list[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _entry(number: int, world: int, folder: str, args: argparse.Namespace) -> None:
    found = rank(number, world, Path(folder), args, f"file://{folder}/meet")
    torch.save(found, Path(folder) / f"found-{number}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--dir", type=Path, default=None, help="on the disk that is to be measured")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    began, report = time.monotonic(), begin("saves beside training", ranks=args.ranks, pairs=args.pairs)
    folder = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        torch.multiprocessing.spawn(_entry, (args.ranks, str(folder), args), nprocs=args.ranks)
        ranks = [torch.load(folder / f"found-{r}.pt", weights_only=True) for r in range(args.ranks)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    first, middle = ranks[0], statistics.median
    size = sum(r["copied"] for r in ranks)
    plain = middle(total for _, total in first["without"])
    step = middle(t for times, _ in first["without"] for t in times)
    longest = middle(max(max(r["with"][i][0]) for r in ranks) for i in range(args.pairs)) - step
    added = middle(b - a for (_, a), (_, b) in zip(first["without"], first["with"], strict=True))
    rows = {
        "state a rank, GiB": [r["bytes"] / 2**30 for r in ranks],
        "a step, s": step,
        "an interval without a save, s": plain,
        "steps of an interval": first["steps"],
        "longest step over the median step, s": longest,
        "of the interval": longest / plain,
        f"of {CheckpointConfig.every} steps, the default interval": longest / (CheckpointConfig.every * step),
        "training waited for the saver, s": middle(max(r["stalled"][i] for r in ranks) for i in range(args.pairs)),
        "added by a save, s": added,
        "added, of the interval": added / plain,
        f"added, of {CheckpointConfig.every} steps": added / (CheckpointConfig.every * step),
        "a save took, s": middle(max(r["took"][i] for r in ranks) for i in range(args.pairs)),
        "snapshot, GB/s a rank": middle(r["copied"] / middle(r["stalled"]) / 1e9 for r in ranks),
        "the same copied by itself, GB/s a rank": middle(r["copied"] / middle(r["copy"]) / 1e9 for r in ranks),
        "save, GB/s": size / middle(first["alone"]) / 1e9,
        "save beside training, GB/s": size / middle(first["took"]) / 1e9,
        "plain files written, GB/s": size / middle(first["disk"]) / 1e9,
        "load, GB/s": size / middle(first["load"]) / 1e9,
        "plain files read, GB/s": size / middle(first["read"]) / 1e9,
    }
    for name, value in rows.items():
        print(f"{name:44} {value if not isinstance(value, float) else f'{value:.3g}'}")
    report |= {"rows": rows, "ranks_found": ranks}
    end(report, RESULTS, began=began, write=args.write)


if __name__ == "__main__":
    main()
