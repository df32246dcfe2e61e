"""Sinks beside ``metrics.jsonl``: each is a process that follows that file, so that nothing of it can hold up a step.

What a sink shows is made of the file, and a life begins it anew: whatever became of a life before, killed, gone back or
without this sink, every step is there once. The process reads on until its standard input ends, which it does when the
rank ends, however that ends; then it has ``logging.sink_timeout`` to finish.
"""

import contextlib
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

_LOOK = 1.0
"""Seconds between looks at the file."""
MODULES = {"wandb": "moetrain.telemetry.wandb_sink", "tensorboard": "moetrain.telemetry.tensorboard_sink"}


class Sink(Protocol):
    """Made by ``open_sink(folder, options)`` of its module; both may raise, and wait for long."""

    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def caught_up(self) -> None:
        """All that the file had so far is written."""

    def close(self) -> None: ...


class Follower:
    """A sink's process, of the main rank."""

    def __init__(self, sink: str, folder: Path, options: dict[str, Any], *, log: logging.Logger) -> None:
        self.sink, self.log, self.timeout = sink, log, options["timeout"]
        words = [sink, str(folder.resolve()), json.dumps(options)]
        with (folder / "logs" / f"{sink}.log").open("a") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "moetrain.telemetry.follow", *words], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        self._listener = Thread(target=self._listen, name=sink, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.log.warning(f"{self.sink}: {line.rstrip()}")

    def end(self) -> None:
        """There will be no more lines."""
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()

    def wait(self) -> None:
        """Until it has finished, or its time is over."""
        try:
            self._child.wait(self.timeout + 5)  # it ends itself before
        except subprocess.TimeoutExpired:
            self.log.warning(f"{self.sink}: not done {self.timeout:g} s after the end: {_LEFT}")
            os.killpg(self._child.pid, signal.SIGKILL)  # what it has started, too
            self._child.wait()
        self._listener.join(5)


def close(followers: list[Follower], *, patient: bool) -> None:
    """Where one is not ``patient``, they finish by themselves."""
    for follower in followers:
        follower.end()
    for follower in followers if patient else []:
        follower.wait()


_LEFT = "ended; metrics.jsonl has every number, and the next life begins the series anew"


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers by name. A list of numbers (one a layer) is its least, mean and largest; of a validation the
    name of what was held out is part of the names."""
    record = {k: v for k, v in record.items() if k != "step"}
    prefix = f"validation/{held_out}/" if isinstance(held_out := record.pop("validation", None), str) else ""
    return dict(_flat(record, prefix))


def _flat(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
        elif isinstance(value, list) and value and all(isinstance(x, int | float) for x in value):
            found = {"min": min(value), "mean": sum(value) / len(value), "max": max(value)}
            yield from ((f"{prefix}{name}/{kind}", float(x)) for kind, x in found.items())


def follow(path: Path, sink: Sink, ended: int) -> None:
    """Give the sink every whole line of ``path``, until the file descriptor ``ended`` can be read and all is read."""
    since, behind = 0, True
    last = False
    while True:
        with path.open("rb") as file:  # anew each time: on shared storage others' lines are seen on opening
            file.seek(since)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                since += len(line)
                record = json.loads(line)
                if "step" in record:
                    sink.write(record["step"], numbers(record))
        if behind:
            sink.caught_up()
            behind = False
        if last:
            return
        last = bool(select.select([ended], [], [], _LOOK)[0])


def main(argv: list[str]) -> int:
    name, folder, options = argv[0], Path(argv[1]), json.loads(argv[2])
    signal.signal(signal.SIGALRM, _late)
    try:
        sink = importlib.import_module(MODULES[name]).open_sink(folder, options)
        follow(folder / "metrics.jsonl", sink, sys.stdin.fileno())
        signal.alarm(max(1, round(options["timeout"])))
        sink.close()
    except BaseException as error:
        words = (str(error).strip() or "no message").splitlines()[0]
        with contextlib.suppress(OSError):  # nobody listens where the rank is gone
            print(f"given up ({type(error).__name__}: {words}): {_LEFT}", flush=True)
        return 1
    return 0


def _late(*_: Any) -> None:
    raise TimeoutError("no answer in time")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # not waiting for threads and exit hooks of libraries
