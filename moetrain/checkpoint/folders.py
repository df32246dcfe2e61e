"""Checkpoint folders under a root: names, the commit, which one is the newest, and which ones may go.

``step-00000123.tmp-<id>`` is being written and is never reused; ``step-00000123`` is a checkpoint if and only if its
file ``COMMITTED`` holds the sha256 of its ``index.json``. Names and times decide nothing.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moetrain.config import UserError

INDEX = "index.json"
MARKER = "COMMITTED"
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}\.tmp-[0-9a-z]+")
_log = logging.getLogger(__name__)


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:08d}"


def latest(root: Path) -> Path | None:
    """The committed checkpoint of the highest step under ``root``, or ``None``."""
    return next(_committed(root), None)


def prune(root: Path, *, keep: int) -> None:
    """Removes all but the newest ``keep`` committed checkpoints, and what killed saves left behind.

    To be called by one process, while no save into ``root`` is under way. What is committed is uncommitted first, so
    that a kill half-way leaves nothing that looks whole. A checkpoint whose index no longer matches its marker is left
    for a person to look at.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint is kept")
    committed = list(_committed(root))
    for folder in committed[keep:]:
        (folder / MARKER).unlink()
        sync_folder(folder)
        _remove(folder)
    for path in list(root.iterdir()) if root.is_dir() else []:
        cut_short = _step(path) is not None and not os.path.lexists(path / MARKER)
        # Without a checkpoint to fall back on, a folder that lacks only its marker may be worth a person's look.
        superseded = cut_short and bool(committed) and _step(path) <= _step(committed[0])  # pyright: ignore
        if _LEFTOVER.fullmatch(path.name) or superseded:
            _remove(path)


def is_committed(folder: Path) -> bool:
    """Whether the marker is there and matches the index."""
    try:
        return _marker(folder) == hashlib.sha256(_read(folder / INDEX)).hexdigest()
    except OSError:
        return False


def committed_index(folder: Path) -> bytes:
    """The bytes of ``index.json``; raises ``UserError`` if ``folder`` is not a committed checkpoint."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint {folder}{_instead(folder)}")
    try:
        marker = _marker(folder)
    except OSError as error:
        raise UserError(
            f"{folder} is not a committed checkpoint (a save that was cut short?){_instead(folder)}"
        ) from error
    try:
        data = _read(folder / INDEX)
    except OSError as error:
        raise damaged(folder, f"{INDEX} cannot be read ({error.strerror})") from error
    if marker != hashlib.sha256(data).hexdigest():
        raise damaged(folder, f"{INDEX} is not the one that was committed")
    return data


def damaged(folder: Path, what: str) -> UserError:
    """The error for a committed checkpoint that is no longer what was written; names an older one to use."""
    return UserError(f"{folder} is damaged: {what}{_instead(folder)}")


def new_leftover(folder: Path) -> Path:
    """Creates the folder in which ``folder`` is prepared."""
    path = _aside(folder)
    path.mkdir(parents=True)
    return path


def refuse_committed(folder: Path) -> None:
    """Raises ``UserError`` if ``folder`` is a committed checkpoint: those are never written over."""
    if is_committed(folder):
        raise UserError(f"{folder} is already a committed checkpoint: remove it or save into another folder")


def publish(prepared: Path, folder: Path, *, index: bytes) -> None:
    """Commits ``prepared``, whose data files are on disk, as ``folder``."""
    write_synced(prepared / INDEX, index)
    sync_folder(prepared)
    refuse_committed(folder)
    stale = _aside(folder) if os.path.lexists(folder) else None
    if stale is not None:  # killed between the rename and the marker
        os.rename(folder, stale)
    os.rename(prepared, folder)
    sync_folder(folder.parent)
    write_synced(folder / f"{MARKER}.tmp", hashlib.sha256(index).hexdigest().encode() + b"\n")
    os.rename(folder / f"{MARKER}.tmp", folder / MARKER)
    sync_folder(folder)
    if stale is not None:
        _remove(stale)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in ``path`` are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(path: Path) -> int | None:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match and path.name == step_folder(path.parent, int(match[1])).name else None


def _committed(root: Path, *, below: int | None = None) -> Iterator[Path]:
    """Committed checkpoints under ``root``, newest first, checked only as far as the caller looks."""
    found = [(step, path) for path in (root.iterdir() if root.is_dir() else ()) if (step := _step(path)) is not None]
    for step, path in sorted(found, reverse=True):
        if below is not None and step >= below:
            continue
        if is_committed(path):
            yield path
        elif os.path.lexists(path / MARKER):
            _log.warning("%s is passed over: its %s does not match its %s", path, INDEX, MARKER)


def _instead(folder: Path) -> str:
    step = _step(folder)
    older = next(_committed(folder.parent, below=step), None) if step is not None else latest(folder.parent)
    return f": use {older}" if older else f"; there is no older checkpoint in {folder.parent}"


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")


def _marker(folder: Path) -> str:
    return _read(folder / MARKER)[:65].decode("ascii", "replace").strip()


def _read(path: Path) -> bytes:
    if not path.is_file():  # a pipe or a device would never end
        raise FileNotFoundError(2, "no such file", str(path))
    return path.read_bytes()


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
