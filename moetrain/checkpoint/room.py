"""Whether there is room for what is to be saved, by what the file system says that this user may still write.

That is statvfs: the disk itself, quotas of projects and folders (XFS, ext4), those that an NFS server counts. Quotas of
users and groups it often leaves out (Lustre, GPFS): there a save that is too large fails as it is written, is removed,
and the run goes on from the one before.
"""

import errno
import os
import shutil
from math import prod
from pathlib import Path

import torch

from moetrain.checkpoint.folders import marked
from moetrain.config import UserError

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def size(shapes: Shapes) -> int:
    """Bytes of a checkpoint's tensors: all of it but some kilobytes."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in shapes.values())


def free(folder: Path) -> int | None:
    """Bytes; None where the file system does not say."""
    try:
        found = shutil.disk_usage(folder)
    except OSError:
        return None
    return found.free if found.total else None


def check(root: Path, shapes: Shapes, *, keep: int, saves: int) -> None:
    """Before the first step, which ``saves`` checkpoints are to follow: raises ``UserError`` where those that will lie
    there together do not fit. The others are what ``keep_every`` keeps, and, with ``keep`` = 0, all but the first."""
    there = len(marked(root))
    more = max(1, min(there + saves, keep + 1) - there) if saves else 0
    room, each = free(root), size(shapes)
    if room is not None and room < more * each:
        beside = f" beside {'that' if there == 1 else f'the {there}'} which {'is' if there == 1 else 'are'} there"
        raise UserError(
            f"No space left in {root}: {words(room)} are free, {words(more * each)} are needed for {more} "
            f"checkpoint{'s' if more > 1 else ''} of {words(each)}{beside if there else ''} (checkpoint.keep={keep}, "
            f"and one is written before the oldest goes): make room, lower checkpoint.keep, or set run.dir to a larger "
            f"disk"
        )


def short(root: Path, shapes: Shapes) -> OSError | None:
    """Before a save: what writing it would end with, where it has not the room."""
    room, each = free(root), size(shapes)
    if room is None or room >= each:
        return None
    return OSError(
        errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {words(room)} are free in {root}, {words(each)} are needed"
    )


def words(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
