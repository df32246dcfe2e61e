"""One rank of a run that is to break: ``chaos_rank.py PLAN train KEY=VALUE ...``, started by torchrun (see chaos.py).

The product is as it is; a few of its functions are wrapped to know when a phase is reached. PLAN names the faults, in
order: each happens once, on one rank, in its phase, at or after its step. What happened is appended to events.jsonl.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from moetrain import signals

PLAN = json.loads(Path(sys.argv[1]).read_text())
HERE = Path(sys.argv[1]).parent
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def tell(what: str, **more: Any) -> None:
    line = json.dumps({"time": time.time(), "pid": os.getpid(), "rank": RANK, "what": what} | more) + "\n"
    file = os.open(HERE / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line.encode())
    os.fsync(file)
    os.close(file)


def reached(phase: str, step: int, where: str = "") -> None:
    """Have the next fault happen, if it is this rank's and this is its place."""
    fault = next((f for f in PLAN["faults"] if not (HERE / f"fired-{f['id']}").exists()), None)
    if fault is None or fault["phase"] != phase or fault["rank"] % WORLD != RANK or step < fault["step"]:
        return
    if fault.get("where", "") != where:
        return
    if fault["kind"] == "damage" and len(list(Path(PLAN["checkpoints"]).glob("step-????????"))) < 2:
        return
    if phase in ("forward", "backward"):
        fault["calls"] -= 1
        if fault["calls"] >= 0 and step == fault["step"]:
            return
    try:
        os.close(os.open(HERE / f"fired-{fault['id']}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    happen(fault, phase, step, where)


def happen(fault: dict[str, Any], phase: str, step: int, where: str) -> None:
    kind, me = fault["kind"], os.getpid()
    more: dict[str, Any] = {}
    if kind == "damage":
        more["file"] = damage(fault)
    tell("fired", id=fault["id"], kind=kind, phase=phase, step=step, where=where, **more)
    if kind.startswith("kill") or kind == "damage":
        os.kill(os.getppid() if kind == "kill agent" else me, signal.SIGKILL)
        time.sleep(60 if kind != "kill agent" else 0)
    elif kind == "SIGTERM":
        os.kill(me, signal.SIGTERM)
    elif kind in ("straggler", "hang", "old writer"):
        if kind == "straggler":
            subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {me}"], start_new_session=True)
        os.kill(me, signal.SIGSTOP)
        time.sleep(0.01)
    elif kind == "disk full":
        with open(Path(PLAN["checkpoints"]).parent / "ballast", "wb", buffering=0) as file:
            try:
                while file.write(bytes(2**20)) == 2**20:
                    pass
            except OSError:
                pass
    elif kind.startswith("cut"):
        (HERE / "cut").touch()
        time.sleep(0.5)  # until the harness has pulled the cable


def damage(fault: dict[str, Any]) -> str:
    """Flip a byte of the newest checkpoint, cut a file of it short, or remove one."""
    drawn = random.Random(fault["id"])
    newest = max(Path(PLAN["checkpoints"]).glob("step-????????"))
    path = drawn.choice(sorted(p for p in newest.iterdir()))
    data = bytearray(path.read_bytes())
    how = drawn.choice(["flip", "flip", "truncate", "remove"])
    if path.name == "COMMITTED":  # without it, it is no checkpoint
        how = "flip"
    if how == "flip":
        data[drawn.randrange(min(len(data), 64) if path.name == "COMMITTED" else len(data))] ^= 1 << drawn.randrange(8)
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[: drawn.randrange(len(data))])
    else:
        path.unlink()
    return f"{how} {newest.name}/{path.name}"


def wrap() -> None:
    from moetrain import loop
    from moetrain.checkpoint import life, reading, writing
    from moetrain.moe.layer import MoE
    from moetrain.optim import Optimizer
    from moetrain.where import here

    forward = MoE.forward

    def forward_(self, x, carry, ctx):
        if ctx.training:
            reached("forward", here.step)
        y, carry = forward(self, x, carry, ctx)
        if y.requires_grad:
            y.register_hook(lambda g: reached("backward", here.step))
        return y, carry

    MoE.forward = forward_
    step = Optimizer.step

    def step_(self, *args, **more):
        reached("optimizer", here.step, "before")
        step(self, *args, **more)
        reached("optimizer", here.step, "after")

    Optimizer.step = step_
    sync = os.fsync

    def sync_(file):
        if threading.current_thread().name == "save" or here.part == "saving":
            reached("save", here.step)
        sync(file)

    writing.os.fsync = sync_
    publish, write_synced, rename = life.publish, life.write_synced, life.Life.rename

    def publish_(prepared, folder, **more):
        reached("commit", here.step, "before")
        publish(prepared, folder, **more)

    def write_(path, data):
        write_synced(path, data)
        reached("commit", here.step, {"index.json": "index", "COMMITTED": "marker"}.get(path.name, ""))

    def rename_(self, source, target):
        rename(self, source, target)
        reached("commit", here.step, "rename")

    writing.publish, life.write_synced, life.Life.rename = publish_, write_, rename_
    fill = reading._fill

    def fill_(*args):
        reached("load", 10**9)
        fill(*args)

    reading._fill = fill_
    loop_step = loop.Loop.step

    def loop_step_(self):
        loop_step(self)
        if RANK == 0:
            tell("step", step=self.trainer.steps)

    loop.Loop.step = loop_step_
    leave = os._exit

    def leave_(code):
        tell("end", code=code)
        leave(code)

    os._exit = leave_  # a watchdog's


def main() -> int:
    signals.catch(hold=False)
    tell("start")
    wrap()
    tell("ready")
    from moetrain.cli.main import main as run

    code = run(sys.argv[2:])
    tell("end", code=code)
    return code


if __name__ == "__main__":
    sys.exit(main())
