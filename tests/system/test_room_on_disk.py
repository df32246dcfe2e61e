"""Room on the disk for checkpoints: before the first step, before each save; on a small disk where one can be made."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_train_command import train, words

from moetrain.checkpoint import room
from moetrain.config import UserError

Usage = namedtuple("Usage", "total used free")
SHAPES: room.Shapes = {"a": ((10, 100), torch.float32), "b": ((5,), torch.bfloat16), "c": ((), torch.int64)}
EACH = 4018


def disk(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 10**9) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total, 0, free))


def test_the_size_of_a_checkpoint() -> None:
    assert room.size(SHAPES) == EACH


@pytest.mark.parametrize(
    ("there", "keep", "saves", "needed"),
    [
        (0, 2, 10, 3), (0, 2, 1, 1), (1, 2, 10, 2), (3, 2, 10, 1), (9, 2, 10, 1), (0, 0, 10, 1), (2, 2, 0, 0),
        (2, 2, 1, 1),
    ],
)  # fmt: skip
def test_what_is_needed_before_the_first_step(monkeypatch, tmp_path, there, keep, saves, needed) -> None:
    for step in range(there):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "COMMITTED").touch()
    disk(monkeypatch, needed * EACH)
    room.check(tmp_path, SHAPES, keep=keep, saves=saves)
    if needed:
        disk(monkeypatch, needed * EACH - 1)
        with pytest.raises(UserError, match=r"No space left in .* are free, .* are needed .*checkpoint.keep.*run.dir"):
            room.check(tmp_path, SHAPES, keep=keep, saves=saves)


def test_a_file_system_that_does_not_say_is_not_asked(monkeypatch, tmp_path) -> None:
    disk(monkeypatch, 0, total=0)
    room.check(tmp_path, SHAPES, keep=2, saves=9)
    assert room.short(tmp_path, SHAPES) is None
    monkeypatch.undo()
    assert room.free(tmp_path / "none") is None
    assert (room.free(tmp_path) or 0) > 0


def test_words() -> None:
    assert [room.words(x) for x in (7, 1500, 2.5e9, 3e15)] == ["7 bytes", "1.5 kB", "2.5 GB", "3000.0 TB"]


@pytest.fixture
def small_disk(tmp_path):
    """Makes one of so many kB."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("a small disk is a tmpfs, which root alone can mount")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_disk_that_is_too_small_is_refused(small_disk, small_corpus) -> None:
    """The model of words() has some 1.1 MB of state, of which keep=3 lets four lie there."""
    folder = small_disk(3000) / "run"
    done = train(*words(small_corpus, folder, "layout.ep=1", "train.steps=6"), timeout=400)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: No space left in {folder}/checkpoints: ")
    assert "for 4 checkpoints of " in line
    assert not list(folder.glob("checkpoints/step-*"))
    done = train(*words(small_corpus, folder, "layout.ep=1", "train.steps=6", "checkpoint.keep=1"), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_save_without_room_is_not_begun_and_the_run_goes_on(small_disk, small_corpus) -> None:
    """Two ranks, something else fills the disk after the first save, and makes room again before the last one."""
    disk = small_disk(20000)
    folder = disk / "run"
    argv = words(small_corpus, folder, "checkpoint.every=2", "checkpoint.keep=1", "train.steps=4")
    done = train(*argv, "train.exit_after=2", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    more = ["train.steps=8", "run.allow=[train.steps]"]

    script = f"""
import shutil, sys
from collections import namedtuple
from pathlib import Path
from moetrain import loop
step = loop.Loop.step
def step_(self):
    step(self)
    ballast = Path({str(disk)!r}) / "ballast"
    if self.main and self.trainer.steps == 3:
        ballast.write_bytes(bytes(shutil.disk_usage(ballast.parent).free - 400_000))
    if self.main and self.trainer.steps == 7:
        ballast.unlink()
loop.Loop.step = step_
from moetrain.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--log-dir={disk.parent / 'logs'}", str(disk.parent / "filling.py"), "train", *argv, *more,
    ]  # fmt: skip
    (disk.parent / "filling.py").write_text(script)
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (folder / "logs" / "rank-0.log").read_text()
    for step in (4, 6):
        assert (
            f"step-{step:08d} is not saved, and the run goes on: OSError: [Errno 28] No space left on device: " in said
        )
    assert "is not saved" in (folder / "logs" / "rank-1.log").read_text(), "every rank says it"
    assert "step-00000008 in " in said
    assert [p.name for p in (folder / "checkpoints").glob("step-*")] == ["step-00000008"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
