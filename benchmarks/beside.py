"""What it brings to compute the shared expert while rows travel: two hosts, one core each, a cable of so many Gbit/s.

    python benchmarks/beside.py [--write]          root (network namespaces, tc); four minutes

The hosts are network namespaces, and ``tc`` (tbf) makes their cable slow, so that a row takes its time without taking
a core's. Whole training steps of one trainer in turns: as they are, and with the same collectives waited for before
the shared expert is begun. What can be hidden is at most what ``waited`` says of the second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from chaos import Network
from intervals import ratio, shown
from saving import begin, end

from moetrain import comm
from moetrain.config import load
from moetrain.job import Config, Data
from moetrain.train import Trainer
from moetrain.verify.tokens import Synthetic
from moetrain.where import here
from moetrain.world import Communication, Device, join, leave

RESULTS = Path(__file__).parent / "results" / "beside-cpu.json"
MODEL = {
    "vocab_size": 1000, "dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
    "moe": {"num_experts": 8, "hidden": 256, "shared_hidden": 1024, "router": {"kind": "topk", "top_k": 2}},
}  # fmt: skip
TRAIN = {"steps": 10**6, "batch": 8, "micro_batch": 4, "seq_len": 256, "device": "cpu", "threads": 1}
GBITS, PAIRS = (0.5, 1.0, 2.0), 24


def main(args: argparse.Namespace) -> None:
    began, report = time.monotonic(), begin("the shared expert beside the all-to-all", ranks=2, pairs=args.pairs)
    report["rows"] = {}
    for gbit in GBITS:
        beside, after, waited_beside, waited_after = hosts(gbit, args.pairs)
        found = ratio(beside, after)
        row = {
            "beside, ms": 1e3 * statistics.median(beside), "after, ms": 1e3 * statistics.median(after),
            "waited beside, ms": 1e3 * statistics.median(waited_beside),
            "waited after, ms": 1e3 * statistics.median(waited_after),
        }  # fmt: skip
        print(f"\n{gbit} Gbit/s: after / beside {shown(found)}; {', '.join(f'{k} {v:.0f}' for k, v in row.items())}")
        report["rows"][str(gbit)] = row | {"ratio": found}
    end(report, RESULTS, began=began, write=args.write)


def hosts(gbit: float, pairs: int) -> list[list[float]]:
    """Both ranks of one measurement; what rank 0 found."""
    network, ranks = Network(), []
    try:
        for host in network.hosts:
            slow = ["tbf", "rate", f"{gbit}gbit", "burst", "256kb", "latency", "400ms"]
            subprocess.run(["tc", "-n", host, "qdisc", "add", "dev", "v0", "root", *slow], check=True)
        for i, host in enumerate(network.hosts):
            env = os.environ | {
                "RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "v0",
            }  # fmt: skip
            words = ["ip", "netns", "exec", host, sys.executable, __file__, "--rank", "--pairs", str(pairs)]
            ranks.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
        said = [rank.communicate(timeout=600)[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit("a rank failed")
    finally:
        for rank in ranks:
            rank.kill()
        network.close()
    return json.loads(said[0].splitlines()[-1])


def after(x_ND, beside, *, recv, send, group):
    """The same rows, waited for at once."""
    x_MD = comm.all_to_all(x_ND, recv=recv, send=send, group=group)
    beside()
    return x_MD


def rank(args: argparse.Namespace) -> None:
    world = join(device=Device.cpu, communication=Communication.gloo, timeout=120.0, threads=1)
    cfg = load({"model": MODEL, "train": TRAIN, "layout": {"dp": 2, "ep": 2}, "optim": {"warmup": 0}}, Config)
    data = Synthetic(cfg.data, seq_len=TRAIN["seq_len"], vocab_size=MODEL["vocab_size"], seed=1)
    run, ways = Trainer(cfg, world, Data({}, data, {})), (comm.all_to_all_beside, after)
    times: list[list[float]] = [[], [], [], []]
    for block in range(args.pairs + 2):
        for i in (0, 1) if block % 2 else (1, 0):
            comm.all_to_all_beside = ways[i]
            dist.barrier()
            waited, since = here.waited, time.perf_counter()
            run.step().loss.item()
            seconds = torch.tensor(time.perf_counter() - since)
            comm.all_reduce_(seconds, group=dist.group.WORLD, op=dist.ReduceOp.MAX)
            if block >= 2:
                times[i].append(float(seconds))
                times[2 + i].append(here.waited - waited)
    if world.rank == 0:
        print(json.dumps(times))
    leave(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rank(options) if options.rank else main(options)
