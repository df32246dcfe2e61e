"""Where a run's words and numbers go: console on rank 0, a log file on every rank, ``metrics.jsonl`` always.

What shows them elsewhere follows that file (``follow.py``).
"""

import contextlib
import errno
import importlib.util
import json
import logging
import netrc
import os
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from moetrain.config import UserError, config
from moetrain.telemetry.follow import Follower
from moetrain.telemetry.redact import looks_like_key

_KEPT = 100_000
"""Lines that wait for room on a disk, at the most."""


class Wandb(Enum):
    off = "off"
    offline = "offline"  # files in the run folder, for `wandb sync`
    online = "online"

    @classmethod
    def _missing_(cls, value: object) -> "Wandb | None":
        return cls.off if value is False else None  # which is what YAML makes of a bare off


@config
class LoggingConfig:
    every: int = 10  # steps between looks at the device (the only host syncs of a dense step)
    progress: bool = True  # a progress bar where the console is a terminal
    heat_map: bool = True  # at the end a picture of layers x experts, likewise
    straggler: float = 1.5  # times the median rank's time outside of collectives: a warning; 0 = none
    load_trace: bool = False  # the load of every expert in every step, to loads.jsonl
    norms: bool = False  # at logging steps the norm of all parameters, and how many gradients are exactly zero
    tensorboard: bool = False  # event files in the run folder; the extra tensorboard
    wandb: Wandb = Wandb.off  # Weights & Biases; the extra wandb
    wandb_project: str = "moetrain"
    wandb_entity: str | None = None  # None = the key's own
    wandb_name: str | None = None  # None = run.name
    nvml_every: float = 10.0  # seconds between looks at the counters of each rank's GPU; 0 = none
    sink_timeout: float = 30.0  # seconds that W&B's server has to answer, and a sink to finish at the end

    def __post_init__(self) -> None:
        for name in ("wandb_project", "wandb_entity", "wandb_name"):
            if looks_like_key(getattr(self, name) or ""):
                raise UserError(
                    f"logging.{name} looks like an API key, which has no place in a config: take it out, and set "
                    f"WANDB_API_KEY in the environment or run `wandb login`"
                )
        if not self.sink_timeout > 0:
            raise UserError(f"logging.sink_timeout={self.sink_timeout}: seconds have to be above 0, 30 is usual")
        if not 0 <= self.nvml_every < float("inf"):
            raise UserError(f"logging.nvml_every={self.nvml_every}: seconds have to be 0, for no looks, or more")


def check_sinks(cfg: LoggingConfig) -> None:
    """Raises ``UserError`` where a sink that is asked for cannot be there."""
    wanted = {"wandb": ("wandb", cfg.wandb is not Wandb.off), "tensorboard": ("tensorboardX", cfg.tensorboard)}
    for sink, (library, on) in wanted.items():
        if on and importlib.util.find_spec(library) is None:
            value = cfg.wandb.value if sink == "wandb" else "true"
            raise UserError(
                f"logging.{sink}={value} needs {library}, which is not installed: pip install 'moetrain[{sink}]', or "
                f"leave it out (metrics.jsonl is always written)"
            )
    if cfg.wandb is Wandb.online and not _has_key():
        raise UserError(
            "logging.wandb=online finds no API key: set WANDB_API_KEY in the environment or run `wandb login`, or use "
            "logging.wandb=offline"
        )


def _has_key() -> bool:
    """Where wandb looks for one; a key in ~/.netrc is of whichever host."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def followers(cfg: LoggingConfig, folder: Path, *, name: str, log: logging.Logger) -> list[Follower]:
    """Of ``metrics.jsonl``, which is there: those that are asked for."""
    options: dict[str, Any] = {"timeout": cfg.sink_timeout}
    found = [Follower("tensorboard", folder, options, log=log)] if cfg.tensorboard else []
    if cfg.wandb is not Wandb.off:
        words = {"project": cfg.wandb_project, "entity": cfg.wandb_entity, "name": cfg.wandb_name or name}
        found.append(Follower("wandb", folder, options | {"mode": cfg.wandb.value} | words, log=log))
    return found


def open_log(folder: Path, *, rank: int, quiet: bool) -> logging.Logger:
    """The rank's logger: ``logs/rank-<n>.log``, and plain lines on stdout unless ``quiet``."""
    log = logging.getLogger("moetrain")
    log.setLevel(logging.INFO)
    log.propagate = False
    close_log(log)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "logs" / f"rank-{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    if not quiet:
        console = _Console()
        console.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(console)
    return log


class _Console(logging.Handler):
    """Plain lines on whatever stdout is now: a progress bar takes its place and prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def close_log(log: logging.Logger) -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class Bar:
    """Progress on a terminal; nothing where the console is a file (the log's lines say it there)."""

    def __init__(self, *, total: int, done: int, shown: bool) -> None:
        shown = shown and sys.stdout.isatty()
        words = TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.completed}/{task.total}"), words)
        bar = Progress(*columns, console=Console(), transient=True)
        self._bar = bar if shown else None
        self._task = bar.add_task("training", total=total, completed=done, words="")
        if self._bar:
            self._bar.start()

    def update(self, done: int, words: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, words=words)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class Series:
    """A file of JSON lines, maybe after a header. Steps that a resumed run repeats are written once."""

    def __init__(self, path: Path, *, resume_at: int, header: dict[str, Any] | None = None) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            if header is not None:
                file.write(json.dumps(header) + "\n")
            for line in _whole_lines(path):
                step = json.loads(line).get("step")
                if step is not None and step <= resume_at:
                    file.write(line)
        os.replace(temporary, path)
        self._file = path.open("ab", buffering=0)
        self._kept: list[bytes] = []  # what a full disk did not take

    def write(self, records: list[dict[str, Any]]) -> None:
        """What cannot be written now (a full disk) is kept for the next time, and said."""
        self._kept += [json.dumps(r).encode() + b"\n" for r in records]
        end = self._file.seek(0, os.SEEK_END)
        data = b"".join(self._kept)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._kept = []
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            words = f"({error.strerror}): {len(self._kept)} lines wait for the next time"
            logging.getLogger("moetrain").error(f"{self._file.name} cannot be written {words}")
            del self._kept[:-_KEPT]

    def close(self) -> None:
        if self._kept:
            self.write([])
        self._file.close()


def _whole_lines(path: Path) -> Iterator[str]:
    """Lines of a file that may have been cut in the middle of its last one."""
    if path.exists():
        with path.open() as file:
            yield from (line for line in file if line.endswith("}\n"))
