"""Weights & Biases, in a process of its own (``follow.py``): offline, or online and offline where nobody answers."""

import os
import re
import secrets
import shutil
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_SILENT", "true")

import wandb
import yaml


def open_sink(folder: Path, options: dict[str, Any]) -> "WandbSink":
    """``options``: mode, project, entity, name, timeout."""
    for place in ("CACHE", "DATA", "ARTIFACT"):  # else in the home folder
        os.environ.setdefault(f"WANDB_{place}_DIR", str(folder))
    mode, series = options["mode"], _series(folder)
    if mode == "online":
        try:
            signal.alarm(round(2 * options["timeout"]) + 5)  # where its own limit does not hold
            return WandbSink(_start(folder, options, series, mode="online"), folder, offline=False)
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            wandb.teardown(1)
            print(f"no answer ({why}): the run goes on offline, `wandb sync` sends it later", flush=True)
        finally:
            signal.alarm(0)
    return WandbSink(_start(folder, options, series, mode="offline"), folder, offline=True)


def _series(folder: Path) -> str:
    """The id of the run's series: made once, kept in its folder; another run in a folder of that name has another."""
    path = folder / "wandb" / "id"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        name = re.sub(r"[^0-9A-Za-z_-]+", "-", folder.name)[:40]
        new = path.with_suffix(".tmp")
        new.write_text(f"{name}-{secrets.token_hex(4)}\n")
        os.replace(new, path)
    return path.read_text().strip()


def _start(folder: Path, options: dict[str, Any], series: str, *, mode: Any) -> "wandb.Run":
    settings = wandb.Settings(
        init_timeout=options["timeout"], login_timeout=options["timeout"], console="off", silent=True,
        disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True, x_save_requirements=False,
    )  # fmt: skip
    return wandb.init(
        id=series, mode=mode, dir=folder, resume="allow" if mode == "online" else None, settings=settings,
        config=yaml.safe_load((folder / "config.yaml").read_text()),
        **{key: options[key] for key in ("project", "entity", "name")},
    )  # fmt: skip


class WandbSink:
    def __init__(self, run: "wandb.Run", folder: Path, *, offline: bool) -> None:
        self.run, self.folder, self.offline = run, folder, offline

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if step >= self.run.starting_step:  # the server has those before, and takes no step back
            self.run.log(numbers, step=step)

    def caught_up(self) -> None:
        """Offline this life's folder has the whole series: those of lives before would be sent beside it."""
        if self.offline:
            mine = Path(self.run.dir).resolve().parent
            for other in (self.folder / "wandb").glob(f"offline-run-*-{self.run.id}"):
                if other.resolve() != mine:
                    shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        self.run.finish()
        wandb.teardown(0)
