"""Which life of a run may write under a root of checkpoints: the newest one, and no other.

    life-00000007/                     of the life that writes; what it prepares and what it removes lies in here
    life-00000007/step-00000123.<id>   renamed to step-00000123, complete with its marker: that is the commit

A new life first renames the folders of those before it. From then on no rename of theirs has a source or a target left,
so a writer that was cut off, stopped or taken for dead can neither commit nor remove, however late it comes back: there
is no moment between a check and an act. What it still writes lies where nobody looks, and is removed by the next life.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint.folders import (
    INDEX,
    MARKER,
    committed,
    is_committed,
    latest,
    remove,
    step_of,
    sync_folder,
    write_synced,
)
from moetrain.config import UserError

_END = "ended"
_LIFE = re.compile(r"life-(\d{8,})")
_LEFT = re.compile(r"(life-\d{8,}\.over|step-\d{8,}\.tmp)-[0-9a-z]+")


class SupersededError(UserError):
    """Another life of the run writes now; this one has to end."""


@dataclass(frozen=True)
class Life:
    """The right to write under ``root``, for as long as ``folder`` is there."""

    root: Path
    number: int

    @property
    def folder(self) -> Path:
        return self.root / f"life-{self.number:08d}"

    @property
    def lasts(self) -> bool:
        return self.folder.is_dir()

    def rename(self, source: Path, target: Path) -> None:
        """One of them lies in ``folder``. Raises ``SupersededError`` where that is another life's turn by now."""
        try:
            os.rename(source, target)
        except FileNotFoundError as error:
            raise self.superseded() if not self.lasts else error from error

    def prepare(self, folder: Path) -> Path:
        """A new folder in which ``folder`` is prepared."""
        path = self.folder / f"{folder.name}.{secrets.token_hex(6)}"
        try:
            path.mkdir()
        except FileNotFoundError as error:
            raise self.superseded() from error
        return path

    def remove(self, path: Path) -> None:
        """All of ``path``, which is out of sight at once."""
        gone = self.folder / f"{path.name}.{secrets.token_hex(6)}"
        self.rename(path, gone)
        remove(gone)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Leaves how this ends, in a line, for ``last_word``: what is killed in it leaves nothing."""
        word = "it was done"
        try:
            yield
        except BaseException as error:
            word = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise
        finally:
            with suppress(OSError):  # it is over already, or the disk is gone
                (self.folder / _END).write_text(word + "\n")

    def superseded(self) -> SupersededError:
        newest = max(_numbers(self.root), default=0)
        return SupersededError(
            f"life {self.number} of the run was taken over by life {newest}, which goes on from what was committed "
            f"until then: this one ends, nothing of it is saved any more"
        )


def ending(root: Path) -> tuple[int, Path]:
    """The number of the newest life under ``root``, 0: none, and the file in which it says how it ended."""
    number = max(_numbers(root), default=0) if root.is_dir() else 0
    return number, Life(root, number).folder / _END


def last_word(root: Path) -> str:
    """How the newest life under ``root`` ended, in words; none where there was none."""
    number, end = ending(root)
    if not number:
        return ""
    try:
        return f"life {number} ended: {end.read_text().strip()}"
    except OSError:
        return f"life {number} said nothing of its end: killed, hung, cut off or still there; it can save no more"


def take_over(root: Path) -> Life:
    """Begin a life of the run, and end every other one's right to write. By one process of a life, before it looks for
    a checkpoint: what the one before commits until then counts."""
    root.mkdir(parents=True, exist_ok=True)
    number = max(_numbers(root), default=0)
    while True:
        life = Life(root, number := number + 1)
        try:
            life.folder.mkdir()
            break
        except FileExistsError:
            continue
    sync_folder(root)
    for other in _numbers(root):
        if other > number:
            raise life.superseded()
        if other < number:
            before = Life(root, other).folder
            try:
                os.rename(before, before.with_name(f"{before.name}.over-{secrets.token_hex(6)}"))
            except FileNotFoundError:
                continue  # by yet another one
    sync_folder(root)
    _sweep(root)
    return life


def prepare(folder: Path, life: Life | None) -> Path:
    """A new folder in which ``folder`` is prepared; beside it where nobody else can be writing (``life`` None)."""
    if life is not None:
        return life.prepare(folder)
    path = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")
    path.mkdir(parents=True)
    return path


def publish(prepared: Path, folder: Path, *, index: bytes, life: Life | None) -> None:
    """Commits ``prepared``, whose data files are on disk, as ``folder``: one rename."""
    write_synced(prepared / INDEX, index)
    write_synced(prepared / MARKER, hashlib.sha256(index).hexdigest().encode() + b"\n")
    sync_folder(prepared)
    refuse_committed(folder)
    rename = os.rename if life is None else life.rename
    if os.path.lexists(folder):  # killed between a rename and a marker, by a moetrain of format 1
        stale = prepared.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")
        rename(folder, stale)
        remove(stale)
    rename(prepared, folder)
    sync_folder(folder.parent)


def refuse_committed(folder: Path) -> None:
    """Raises ``UserError`` if ``folder`` is a committed checkpoint: those are never written over."""
    if is_committed(folder):
        raise UserError(f"{folder} is already a committed checkpoint: remove it or save into another folder")


def prune(root: Path, *, keep: int, keep_every: int = 0, life: Life | None = None) -> None:
    """Removes all committed checkpoints but the newest ``keep`` and those of every ``keep_every``-th step (0: none).

    By one process. A checkpoint whose index does not match its marker is left for a person to look at.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint is kept")
    out: Callable[[Path], None] = _remove_at_once if life is None else life.remove
    for folder in list(committed(root))[keep:]:
        if not (keep_every and (step_of(folder) or 0) % keep_every == 0):
            out(folder)


def set_aside(folder: Path, *, life: Life) -> Path:
    """Out of the way of what the run saves from now on, for a person to look at; returns where it lies then."""
    path = folder.with_name(f"{folder.name}.aside-{secrets.token_hex(6)}")
    between = life.folder / path.name
    life.rename(folder, between)
    life.rename(between, path)
    sync_folder(folder.parent)
    return path


def _remove_at_once(folder: Path) -> None:
    gone = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")
    os.rename(folder, gone)
    remove(gone)


def _numbers(root: Path) -> list[int]:
    return [int(match[1]) for path in root.iterdir() if (match := _LIFE.fullmatch(path.name))]


def _sweep(root: Path) -> None:
    """What killed saves and lives that are over left behind."""
    newest = latest(root)
    for path in list(root.iterdir()):
        step = step_of(path)
        cut_short = step is not None and not os.path.lexists(path / MARKER)  # by a moetrain of format 1
        # Without a checkpoint to fall back on, a folder that lacks only its marker may be worth a person's look.
        if _LEFT.fullmatch(path.name) or (cut_short and newest is not None and step <= step_of(newest)):  # pyright: ignore
            remove(path)
