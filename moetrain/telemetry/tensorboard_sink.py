"""TensorBoard's event files, in a process of their own (``follow.py``), by tensorboardX: TensorBoard itself, which
shows them, need not be where they are written."""

from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


def open_sink(folder: Path, options: dict[str, Any]) -> "TensorBoardSink":
    place = folder / "tensorboard"
    for old in place.glob("events.out.tfevents.*"):
        old.unlink()
    # purged from step 0 on: a TensorBoard that looks on forgets what it has read from the old files
    return TensorBoardSink(SummaryWriter(str(place), purge_step=0, flush_secs=10))


class TensorBoardSink:
    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, x in numbers.items():
            self.writer.add_scalar(name, x, step)

    def caught_up(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
