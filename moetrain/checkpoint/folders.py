"""Checkpoint folders under a root: names, and which ones count. Who writes them is in ``life.py``.

``step-00000123`` is a checkpoint if and only if its file ``COMMITTED`` holds the sha256 of its ``index.json``. Names
and times decide nothing.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from moetrain.config import UserError

INDEX = "index.json"
MARKER = "COMMITTED"
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:08d}"


def latest(root: Path) -> Path | None:
    """The committed checkpoint of the highest step under ``root``, or ``None``."""
    return next(committed(root), None)


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


class DamagedError(UserError):
    """A committed checkpoint is no longer what was written."""


def damaged(folder: Path, what: str) -> DamagedError:
    """Says what is, and names an older checkpoint to use."""
    return DamagedError(f"{folder} is damaged: {what}{_instead(folder)}")


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


def step_of(path: Path) -> int | None:
    """Of a checkpoint's folder by its name; None for any other."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match and path.name == step_folder(path.parent, int(match[1])).name else None


def marked(root: Path) -> list[Path]:
    """Whatever was committed once under ``root``, newest first: damaged or not."""
    found = [(step, path) for path in (root.iterdir() if root.is_dir() else ()) if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True) if os.path.lexists(path / MARKER)]


def committed(root: Path, *, below: int | None = None) -> Iterator[Path]:
    """Committed checkpoints under ``root``, newest first, checked only as far as the caller looks."""
    for path in marked(root):
        if below is not None and (step_of(path) or 0) >= below:
            continue
        if is_committed(path):
            yield path
        else:
            _log.warning("%s is passed over: its %s does not match its %s", path, INDEX, MARKER)


def _instead(folder: Path) -> str:
    step = step_of(folder)
    older = next(committed(folder.parent, below=step), None) if step is not None else latest(folder.parent)
    return f": use {older}" if older else f"; there is no older checkpoint in {folder.parent}"


def _marker(folder: Path) -> str:
    return _read(folder / MARKER)[:65].decode("ascii", "replace").strip()


def _read(path: Path) -> bytes:
    if not path.is_file():  # a pipe or a device would never end
        raise FileNotFoundError(2, "no such file", str(path))
    return path.read_bytes()


def remove(path: Path) -> None:
    """A file, or a folder with all in it as far as that goes."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
