"""Faults, one after the other, in real runs under torchrun; the run that is left has to be the unbroken one.

    python benchmarks/chaos.py --faults 120             drawn by the commit's hash and three fresh seeds
    python benchmarks/chaos.py --faults 15 --kinds ...

Each run is trained to its end through a few faults. Then its weights, optimizer state and last loss are compared with
those of the unbroken run: bit for bit, or to 1e-9 (float64) where the number of ranks changed on the way. Faults that
need root (network namespaces, a small tmpfs) are left out without it, and that is said.
"""

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moetrain import checkpoint
from moetrain.data.tokenize import tokenize
from moetrain.logical import Chunk, Logical

ROOT = Path(__file__).parent.parent
TIMEOUT = 8.0
"""train.timeout of the runs: a hang is found after so many seconds."""
LIFE = 600.0
"""Seconds that a life may take before the harness, like a cluster's, ends it."""
GRACE = 40.0
"""Seconds that the other hosts' agents get once one has ended: torchrun's own half a minute, and some."""
PHASES = "forward", "backward", "optimizer", "save", "commit", "load"
KINDS = {
    "kill in forward": "forward",
    "kill in backward": "backward",
    "kill in optimizer": "optimizer",
    "kill in save": "save",
    "kill in commit": "commit",
    "kill in load": "load",
    "kill agent": "",
    "SIGTERM": "",
    "straggler": "",
    "hang": "",
    "disk full": "forward",
    "damage": "forward",
    "cut, healed": "",
    "cut": "",
    "old writer": "commit",
}
"""Fault -> its phase; drawn where there is none."""
ENDS = ("kill agent", "SIGTERM", "cut", "old writer")
"""After which torchrun is not there any more, or not alone."""
STAYS = ("straggler", "disk full", "cut, healed")
"""Which end no life."""
ROOTS = ("disk full", "cut", "cut, healed")
CAUSES = {
    "kill": r"exitcode\s*:? ?-9|Signal 9|exitcode: -9",
    "damage": r"is damaged: ",
    "SIGTERM": r"asked to stop by a signal",
    "hang": r"hang: rank|a hang: for",
    "disk full": r"(is not saved, and the run goes on: |cannot be written ).*No space left",
    "cut": r"hang: rank|a hang: for|Connection|timed? ?out",
    "old writer": r"was taken over by life",
    "straggler": r"is the slowest|stood still for",
    "cut, healed": r"",
    "kill agent": r"said nothing of its end",
}
"""Fault -> what names it in the logs; a cut that is healed in two seconds leaves nothing to name: nobody sees it."""

SMALL = [
    "model.vocab_size=512", "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2",
    "model.moe.num_experts=4", "model.moe.hidden=16", "balance=[switch,expert_bias]", "train.batch=8",
    "train.micro_batch=2", "train.seq_len=16", "train.device=cpu", "train.threads=1", "train.validate_samples=4",
    "train.dtype=float64", f"train.timeout={TIMEOUT}", "optim.warmup=1", "logging.every=1", "data=folder",
    "checkpoint.every=2", "checkpoint.keep=4",
]  # fmt: skip
COSTS = [
    f"model.moe.placement.costs.{k}={v}" for k, v in {"row": 1e-6, "hop": 1e-6, "expert": 1e-6, "hidden": 0}.items()
]
FSSDP = ["placement=fssdp", "model.moe.placement.reshard_every=5", *COSTS]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "ep": (2, ["layout.dp=2", "layout.ep=2"]),
    "tp": (2, ["layout.tp=2", "layout.ep=2"]),
    "pp": (2, ["layout.pp=2"]),
    "fssdp": (2, ["layout.dp=2", "layout.ep=2", *FSSDP]),
    "pp+fssdp": (4, ["layout.pp=2", "layout.dp=2", "layout.ep=2", *FSSDP]),
    "tp+ep": (4, ["layout.dp=2", "layout.tp=2", "layout.ep=4"]),
}
"""Name -> ranks, the words of a command."""


@dataclass
class Leg:
    """Faults under one layout."""

    layout: str
    faults: list[dict[str, Any]]
    nodes: int = 1


@dataclass
class Episode:
    name: str
    folder: Path
    legs: list[Leg]
    steps: int
    problems: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[dict[str, Any]]:
        return [fault for leg in self.legs for fault in leg.faults]

    def fired(self, fault: dict[str, Any]) -> bool:
        return (self.folder / f"fired-{fault['id']}").exists()

    @property
    def done(self) -> bool:
        return (self.folder / "run" / "summary.txt").exists()

    def leg(self) -> Leg:
        return next((leg for leg in self.legs if not all(map(self.fired, leg.faults))), self.legs[-1])

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Network:
    """Two hosts of network namespaces with a cable between them."""

    def __init__(self) -> None:
        self.id = f"mt{os.getpid() % 10000}"
        self.hosts = [f"{self.id}a", f"{self.id}b"]
        _sh("ip", "netns", "add", f"{self.id}s")
        _sh("ip", "-n", f"{self.id}s", "link", "add", "br0", "type", "bridge")
        _sh("ip", "-n", f"{self.id}s", "link", "set", "br0", "up")
        for i, host in enumerate(self.hosts):
            _sh("ip", "netns", "add", host)
            cable = ["type", "veth", "peer", "name", f"p{i}", "netns", f"{self.id}s"]
            _sh("ip", "link", "add", "v0", "netns", host, *cable)
            _sh("ip", "-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "v0")
            for device in ("lo", "v0"):
                _sh("ip", "-n", host, "link", "set", device, "up")
            _sh("ip", "-n", f"{self.id}s", "link", "set", f"p{i}", "master", "br0")
            _sh("ip", "-n", f"{self.id}s", "link", "set", f"p{i}", "up")

    def cable(self, state: str) -> None:
        _sh("ip", "-n", f"{self.id}s", "link", "set", "br0", state)

    def close(self) -> None:
        for host in (*self.hosts, f"{self.id}s"):
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def _sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def start(episode: Episode, leg: Leg, corpus: Path, network: Network | None, life: int) -> list[subprocess.Popen]:
    """The agents of a life: torchrun, one on each host."""
    ranks, words = LAYOUTS[leg.layout]
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--monitor-interval=0.2"]
    left = [f for f in leg.faults if not episode.fired(f) and f["kind"] not in (*STAYS, *ENDS)]
    alone = any(f["kind"] == "old writer" and not episode.fired(f) for f in leg.faults)  # it is not to start again
    restarts = 0 if alone or not left else len(left) - (leg is not episode.legs[-1])
    torchrun += [f"--max-restarts={restarts}"]
    program = [str(ROOT / "benchmarks" / "chaos_rank.py"), str(episode.folder / "plan.json"), "train", *SMALL, *words]
    program += [f"data.corpora.text.path={corpus}", f"train.steps={episode.steps}", f"run.dir={episode.folder}"]
    program += ["run.name=run"]
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CHAOS": episode.name, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",
    }  # fmt: skip
    log = (episode.folder / f"torchrun-{life}.log").open("ab")
    if leg.nodes == 1 or network is None:
        command = [*torchrun, "--standalone", f"--nproc-per-node={ranks}", *program]
        return [subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=episode.folder, start_new_session=True)]
    agents = []
    for i, host in enumerate(network.hosts):
        address = f"10.77.0.{i + 1}"
        command = [
            "ip", "netns", "exec", host, *torchrun, f"--nnodes={leg.nodes}", f"--nproc-per-node={ranks // leg.nodes}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=10.77.0.1:{29400 + life}", f"--local-addr={address}",
            f"--rdzv-conf=is_host={int(i == 0)}", f"--rdzv-id={episode.name}-{life}", *program,
        ]  # fmt: skip
        there = env | {"GLOO_SOCKET_IFNAME": "v0"}
        agents.append(
            subprocess.Popen(command, env=there, stdout=log, stderr=log, cwd=episode.folder, start_new_session=True)
        )
    return agents


def processes(name: str) -> list[int]:
    """Of an episode, by its name in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"CHAOS={name}\0".encode() in (path / "environ").read_bytes() and "Z" not in _state(path):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def _state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(") ")[2][:1]


def run(episode: Episode, corpus: Path, network: Network | None) -> None:
    """Life after life, until it is done."""
    lives = 0
    old: list[int] = []
    while not episode.done and lives < 4 + 2 * len(episode.faults):
        leg = episode.leg()
        agents = start(episode, leg, corpus, network, lives)
        lives += 1
        old = _live(episode, agents, network, old)
        if network:
            network.cable("up")
    if not episode.done:
        episode.problems.append(f"not done after {lives} lives")
    until = time.monotonic() + 30
    for pid in old:
        _kill(pid, signal.SIGCONT)
    while (left := processes(episode.name)) and time.monotonic() < until:
        time.sleep(0.2)
    if left:
        episode.problems.append(f"processes left: {left}")
        for pid in left:
            _kill(pid, signal.SIGKILL)


def _live(episode: Episode, agents: list[subprocess.Popen], network: Network | None, old: list[int]) -> list[int]:
    """One life's end, and what the harness does meanwhile; the processes of one that is to come back."""
    since, cut_at, woken = time.monotonic(), None, not old
    together = since
    ballast, cut = episode.folder / "run" / "ballast", episode.folder / "cut"
    first = len(episode.events())
    while any(agent.poll() is None for agent in agents):
        time.sleep(0.1)
        events = episode.events()[first:]
        if not woken and any(e["what"] == "step" and e["pid"] not in old for e in events):
            woken = True
            for pid in old:
                _kill(pid, signal.SIGCONT)
        if ballast.exists() and "No space left" in logs(episode):
            ballast.unlink()
        fired = [e for e in events if e["what"] == "fired" and e["pid"] not in old]
        if fired and fired[-1]["kind"] == "old writer" and woken:
            stopped = [pid for pid in processes(episode.name) if pid not in old]
            for pid in stopped:
                _kill(pid, signal.SIGSTOP)
            return stopped
        if cut.exists() and network:
            network.cable("down")
            cut.unlink()
            cut_at = time.monotonic()
        if cut_at and network and fired[-1]["kind"] == "cut, healed" and time.monotonic() > cut_at + 2:
            network.cable("up")
            cut_at = None
        if all(agent.poll() is None for agent in agents):
            together = time.monotonic()
        # as a cluster ends a job whose host it does not reach, or on one of whose hosts nothing is left
        if (cut_at and time.monotonic() > cut_at + TIMEOUT + 12) or time.monotonic() > together + GRACE:
            break
        if time.monotonic() > since + LIFE:
            episode.problems.append(f"a life was ended after {LIFE:.0f} s")
            break
    ended = any(agent.poll() is None for agent in agents)
    for agent in agents:
        if agent.poll() is None:
            _kill(agent.pid, signal.SIGKILL)
        agent.wait()
    if ended:
        for pid in processes(episode.name):
            if pid not in old:
                _kill(pid, signal.SIGKILL)
    ballast.unlink(missing_ok=True)
    return [] if woken else old


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def logs(episode: Episode) -> str:
    paths = [*episode.folder.glob("torchrun-*.log"), *(episode.folder / "run" / "logs").glob("*.log")]
    return "\n".join(path.read_text(errors="replace") for path in paths)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    whole = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in checkpoint.read_index(path).items()}
    boxes = {n: Logical(tuple(t.shape), t.dtype, (Chunk((0,) * t.dim(), t),)) for n, t in whole.items()}
    checkpoint.load(path, boxes, group=None)
    return whole


def last_loss(folder: Path) -> float:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [r["loss"] for r in records if r.get("loss") is not None][-1]


def compare(episode: Episode, unbroken: Path) -> str:
    """Whether the end is that of the unbroken run, in words; what is not goes to ``problems``."""
    mine, want = episode.folder / "run", unbroken / "run"
    found = checkpoint.latest(mine / "checkpoints")
    if found is None:
        episode.problems.append("no checkpoint at the end")
        return ""
    a, b = tensors(found), tensors(checkpoint.latest(want / "checkpoints") or want)
    a, b = ({n: x for n, x in some.items() if not n.startswith("placement.")} for some in (a, b))
    changed = len({LAYOUTS[leg.layout][0] for leg in episode.legs}) > 1
    if a.keys() != b.keys():
        episode.problems.append("other tensors than the unbroken run's")
        return ""
    off = [n for n in a if not torch.equal(a[n], b[n])]
    if last_loss(mine) != last_loss(want):
        off.append("the last loss")
    if not off:
        return "bit for bit"
    worst = max(((a[n] - b[n]).double().norm() / b[n].double().norm().clamp(min=1e-12)).item() for n in a)
    if not changed or worst > 1e-9 or abs(last_loss(mine) / last_loss(want) - 1) > 1e-9:
        episode.problems.append(f"not the unbroken run: {', '.join(off[:3])} ({worst:.1e})")
    return f"{worst:.0e}"


def whole(episode: Episode) -> None:
    """Every committed checkpoint that is left has to be whole, but for those that were damaged on purpose."""
    damaged = {e["file"].split()[1].split("/")[0] for e in episode.events() if e.get("kind") == "damage"}
    for path in checkpoint.marked(episode.folder / "run" / "checkpoints"):
        try:
            checkpoint.check_files(path)
        except checkpoint.DamagedError as error:
            if path.name not in damaged:
                episode.problems.append(str(error))


def report(episode: Episode) -> list[dict[str, Any]]:
    """One record for each fault that happened in its phase."""
    events, text, found = episode.events(), logs(episode), []
    fired = {e["id"]: e for e in events if e["what"] == "fired"}
    for leg in episode.legs:
        for fault in leg.faults:
            if (e := fired.get(fault["id"])) is None:
                episode.problems.append(f"{fault['kind']} did not happen")
                continue
            later = [x for x in events if x["time"] > e["time"]]
            kind = fault["kind"]
            starts = [x["time"] for x in later if x["what"] in ("start", "end")]
            new = {x["pid"] for x in later if x["what"] == "start"}
            steps = [x for x in later if x["what"] == "step" and (kind in STAYS or x["pid"] in new)]
            before = [x["step"] for x in events if x["what"] == "step" and x["time"] <= e["time"]]
            cause = CAUSES.get(kind, CAUSES["kill"])
            named = not cause or re.search(cause, text) is not None
            if not named:
                episode.problems.append(f"{kind} is not named in any log")
            record = {
                "kind": kind, "phase": e["phase"], "where": e["where"], "step": e["step"], "named": named,
                "layout": leg.layout, "ranks": LAYOUTS[leg.layout][0], "episode": episode.name,
                "detected": None if kind in STAYS or not starts else starts[0] - e["time"],
                "recovered": steps[0]["time"] - e["time"] if steps else None,
                "lost": max(0, (before[-1] if before else 0) + 1 - steps[0]["step"]) if steps else None,
            }  # fmt: skip
            found.append(record)
    return found


def draw(count: int, seeds: list[str], kinds: list[str], base: Path) -> list[Episode]:
    """Episodes of one to three faults; kinds, phases and layouts dealt evenly, in an order drawn by the seed."""
    rng = random.Random("".join(seeds))
    kinds = rng.sample(kinds, len(kinds))
    dealt = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(dealt)
    phases = [p for p in PHASES if p not in ("load",)] * count
    names = [n for n in LAYOUTS if n != "one"] * count
    layouts = [names[i] for i in range(count)]
    rng.shuffle(layouts)
    rng.shuffle(phases)
    episodes: list[Episode] = []
    while dealt:
        several = [dealt.pop() for _ in range(min(len(dealt), rng.choice([2, 3, 3, 4])))]
        cable = any(kind.startswith("cut") for kind in several)
        killed = ("kill in forward", "kill in backward", "kill in optimizer")
        if "kill in load" in several and not any(kind in killed for kind in several):
            several.insert(0, "kill in forward")  # for there to be a load
        alone = ["one"] * (not {"hang", "straggler"} & {*several})  # which nobody but itself would see
        a, b = layouts.pop(), rng.choice([*alone, "ep", "pp", "tp", "tp+ep", "fssdp"])
        several.sort(key=lambda kind: kind == "kill in load")  # there has to be something to load: the save of step 2
        first = 5 if "kill in load" in several else 3
        faults = []
        for i, kind in enumerate(several):
            phase = KINDS[kind] or phases.pop()
            parts = ["before", "index", "marker"] + ["rename"] * (kind != "old writer")
            where = {"optimizer": rng.choice(["before", "after"]), "commit": rng.choice(parts)}
            faults.append(
                {
                    "id": f"{i}-{kind.replace(' ', '-').replace(',', '')}", "kind": kind, "phase": phase,
                    "where": where.get(phase, ""), "rank": 0 if phase == "commit" else rng.randrange(4),
                    "step": 4 * i + rng.randint(first, first + 2), "calls": rng.randrange(4),
                }
            )  # fmt: skip
        at = rng.randrange(1, len(faults)) if len(faults) > 1 and not cable else 0
        if at and faults[at - 1]["kind"] in STAYS:
            at = 0
        other = LAYOUTS[a][0] != LAYOUTS[b][0]
        legs = [Leg(a, faults[:at]), Leg(b, faults[at:])] if at and other else [Leg(a, faults)]
        if cable:
            legs = [Leg(a, faults, nodes=2)]
        name = f"{len(episodes):03d}-{secrets.token_hex(3)}"
        episodes.append(Episode(name, base / name, legs, steps=4 * len(faults) + 10))
    return episodes


def prepare(episode: Episode, *, tmpfs: bool) -> None:
    run = episode.folder / "run"
    run.mkdir(parents=True)
    if tmpfs:
        _sh("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(run))
    plan = {
        "faults": episode.faults,
        "checkpoints": str(run / "checkpoints"),
    }
    (episode.folder / "plan.json").write_text(json.dumps(plan))


def clean(episode: Episode, *, keep: bool) -> None:
    if keep:
        there = episode.folder.with_name(episode.name + "-kept")
        shutil.copytree(episode.folder, there, dirs_exist_ok=True)
    if os.path.ismount(episode.folder / "run"):
        _sh("umount", str(episode.folder / "run"))
    shutil.rmtree(episode.folder, ignore_errors=True)


def table(records: list[dict[str, Any]]) -> str:
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_kind[record["kind"]].append(record)
    lines = [
        "| fault | count | ranks' time until it shows, s | until steps go on, s | steps done again |",
        "|---|---|---|---|---|",
    ]

    def middle(some: list[dict[str, Any]], key: str) -> str:
        values = [r[key] for r in some if r[key] is not None]
        return f"{statistics.median(values):.1f} (to {max(values):.1f})" if values else "-"

    for kind in KINDS:
        if some := by_kind.get(kind):
            cells = [kind, str(len(some)), *(middle(some, key) for key in ("detected", "recovered", "lost"))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=120)
    parser.add_argument("--seed", action="append", help="instead of the commit's hash and three fresh ones")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--dir", type=Path, default=Path("/tmp") / f"chaos-{os.getpid()}")
    parser.add_argument("--out", type=Path, help="a JSON file that records are added to")
    parser.add_argument(
        "--keep", action="store_true", help="keep the folders of every run, not only of those with problems"
    )
    args = parser.parse_args()
    root = os.geteuid() == 0 and shutil.which("ip") is not None
    kinds = [kind for kind in args.kinds if root or kind not in ROOTS]
    if left_out := [kind for kind in args.kinds if kind not in kinds]:
        print(f"left out, they need root and ip: {', '.join(left_out)}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    seeds = args.seed or [commit.stdout.strip(), *(secrets.token_hex(8) for _ in range(3))]
    args.dir.mkdir(parents=True, exist_ok=True)
    names = sorted(str(p) for p in Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    corpus = tokenize(
        names, output=args.dir / "corpus", vocab_size=512, valid_fraction=0.1, log=lambda line: None
    ).path  # fmt: skip
    episodes = draw(args.faults, seeds, kinds, args.dir)
    print(f"{args.faults} faults in {len(episodes)} runs; --seed " + " --seed ".join(seeds), flush=True)
    unbroken: dict[tuple[str, int], Path] = {}
    records, bad, ends = [], 0, Counter()
    for episode in episodes:
        first = episode.legs[0].layout
        if (first, episode.steps) not in unbroken:
            straight = Episode(
                f"straight-{first}-{episode.steps}",
                args.dir / f"straight-{first}-{episode.steps}",
                [Leg(first, [])],
                episode.steps,
            )
            prepare(straight, tmpfs=False)
            run(straight, corpus, None)
            unbroken[first, episode.steps] = straight.folder
        network = Network() if any(leg.nodes > 1 for leg in episode.legs) else None
        since = time.monotonic()
        try:
            prepare(episode, tmpfs=any(f["kind"] == "disk full" for f in episode.faults))
            run(episode, corpus, network)
        finally:
            if network:
                network.close()
        found, end = report(episode), ""
        if episode.done:
            end = compare(episode, unbroken[first, episode.steps])
            whole(episode)
        changed = len({LAYOUTS[leg.layout][0] for leg in episode.legs}) > 1
        for record in found:
            record |= {"changed": changed, "seeds": seeds, "end": end, "problems": episode.problems}
        ends[end or "not done"] += 1
        layouts = " then ".join(f"{leg.layout} ({', '.join(f['kind'] for f in leg.faults)})" for leg in episode.legs)
        print(f"{episode.name} {layouts}: {end}; {time.monotonic() - since:.0f} s", flush=True)
        for problem in episode.problems:
            bad += 1
            print(f"  PROBLEM {problem}", flush=True)
        clean(episode, keep=args.keep or bool(episode.problems))
        records += found
        if args.out:
            before = json.loads(args.out.read_text())["faults"] if args.out.exists() else []
            args.out.write_text(json.dumps({"what": "chaos", "faults": before + found}, indent=1) + "\n")
    print("\n" + table(records))
    phases = Counter(r["phase"] for r in records)
    parts = {
        "tp > 1": sum("tp" in r["layout"] for r in records),
        "ep > 1": sum(r["layout"] not in ("one", "pp") for r in records),
        "pp > 1": sum("pp" in r["layout"] for r in records), "FSSDP": sum("fssdp" in r["layout"] for r in records),
        "other numbers of ranks on the way": sum(r["changed"] for r in records),
    }  # fmt: skip
    print(f"\nphases: {dict(phases)}\n{parts}\nends: {dict(ends)}\n{bad} problems")
    if not args.keep and not bad:
        shutil.rmtree(args.dir, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
