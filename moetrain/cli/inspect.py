"""``moetrain inspect CKPT``: what a checkpoint holds, where it came from, whether it is whole."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from moetrain import checkpoint
from moetrain.checkpoint.index import Entry, Index
from moetrain.checkpoint.types import DTYPE_NAMES
from moetrain.config import UserError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="moetrain inspect", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, or a run's folder: its newest one")
    parser.add_argument("--no-check", action="store_true", help="list only, without reading every byte")
    parser.add_argument("--boxes", action="store_true", help="where each box of a tensor lies, with its checksum")
    args = parser.parse_args(argv)
    folder = _folder(args.path)
    index = checkpoint.read(folder)
    print("\n".join([*head(folder, index), "", *tensors(index, boxes=args.boxes)]))
    if not args.no_check:
        checkpoint.check_files(folder)
        print(
            f"\nwhole: {sum(file.length for file in index.files):,} bytes in {len(index.files)} files, all as written"
        )
    return 0


def _folder(path: Path) -> Path:
    for root in (path / "checkpoints", path):
        if checkpoint.step_of(root) is None and (newest := next(iter(checkpoint.marked(root)), None)) is not None:
            return newest
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: give a checkpoint or the folder of a run")
    return path


def head(folder: Path, index: Index) -> list[str]:
    """Where it came from, in lines."""
    meta = index.meta
    lines = [str(folder)]
    for key, words in {
        "step": "step", "consumed": "samples seen", "layout": "layout it was saved under", "ranks": "ranks",
        "life": "life of the run", "data": "fingerprint of the data", "moetrain": "moetrain", "torch": "torch",
    }.items():  # fmt: skip
        if meta.get(key) is not None:
            lines.append(f"  {words}: {meta[key]}")
    for change in meta.get("changes", []):
        lines.append(f"  changed at step {change['step']}: {change['key']}: {change['old']} -> {change['new']}")
    return lines


def tensors(index: Index, *, boxes: bool) -> Iterator[str]:
    """A line for each, and its boxes'."""
    width = max(map(len, index.tensors), default=0)
    for name, entry in sorted(index.tensors.items()):
        yield f"{name:{width}}  {DTYPE_NAMES[entry.dtype]:8} {_shape(entry):24} {len(entry.boxes)} boxes"
        for box in entry.boxes if boxes else ():
            where = ", ".join(f"{start}:{start + size}" for start, size in zip(*box.box, strict=True))
            file = index.files[box.file].name
            yield f"  [{where}]  {file} at byte {box.start}, {box.length:,} bytes, crc32 {box.crc32:08x}"
    numbers = sum(math.prod(e.shape) for n, e in index.tensors.items() if n.startswith("model."))
    yield f"{len(index.tensors)} tensors; {numbers:,} numbers in the model"


def _shape(entry: Entry) -> str:
    return "x".join(map(str, entry.shape)) or "scalar"
