"""Saves that die: at every file operation in turn, and by SIGKILL at random. What is committed is always whole."""

import os
import random
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moetrain import checkpoint
from moetrain.checkpoint import Chunk, Logical
from moetrain.checkpoint.folders import is_committed

NAMES = [f"layers.{i}.weight" for i in range(6)]
TOUCHES_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def state(step, rank=0, world=1):
    """Each rank holds its rows of every tensor; every element is the step."""
    rows = 512 // world
    tensors = {name: torch.full((rows, 16), float(step)) for name in NAMES}
    return {n: Logical((512, 16), torch.float32, (Chunk((rank * rows, 0), t),)) for n, t in tensors.items()}


def consistent(folder):
    """The step of a checkpoint, after checking that every element in it is of that step."""
    tensors = state(-1)
    step = checkpoint.load(folder, tensors, group=None).meta["step"]
    assert folder == checkpoint.step_folder(folder.parent, step)
    for name, logical in tensors.items():
        assert (logical.chunks[0].tensor == step).all(), name
    return step


def forked(work, *args):
    """``work`` in a process of its own; returns its id. Exit code 0 if it returns."""
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(root, operation):
    """Takes over, saves step 2 and prunes, but dies before the given operation on the disk, counted from zero."""
    left = [operation]

    def watch(event, args):
        # Removing a tree names what is in it relative to an open folder.
        if event in TOUCHES_DISK and (str(root) in str(args[0]) or not str(args[0]).startswith("/")):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1

    sys.addaudithook(watch)
    save_two(root)


def save_two(root):
    life = checkpoint.take_over(root)
    if checkpoint.latest(root) != checkpoint.step_folder(root, 2):
        checkpoint.save(checkpoint.step_folder(root, 2), state(2), {"step": 2}, group=None, life=life)
    checkpoint.prune(root, keep=1, life=life)
    return life


@pytest.mark.parametrize("stale", [False, True])
def test_killed_at_every_operation(tmp_path, stale):
    seen = []
    for operation in range(200):
        root = tmp_path / str(operation)
        checkpoint.save(checkpoint.step_folder(root, 1), state(1), {"step": 1}, group=None)
        if stale:  # the same step, once before killed between its rename and its marker, as format 1 had it
            checkpoint.save(checkpoint.step_folder(root, 2), state(7), {"step": 7}, group=None)
            (root / "step-00000002" / "COMMITTED").unlink()
        code = exit_code(forked(die_at, root, operation))
        seen.append(consistent(checkpoint.latest(root)))
        for folder in root.glob("step-*"):  # what is half removed must not look whole either
            if is_committed(folder):
                consistent(folder)
        life = save_two(root)  # the run resumes, and gets there
        assert {p.name for p in root.iterdir()} == {"step-00000002", life.folder.name}
        assert not list(life.folder.iterdir())
        assert consistent(checkpoint.latest(root)) == 2
        if code == 0:
            break
        assert code == 9
    assert seen == sorted(seen)
    assert seen.count(1) > 5
    assert seen.count(2) > 5, "kills during the pruning"


def save_forever(root):
    life = checkpoint.take_over(root)
    newest = checkpoint.latest(root)
    step = consistent(newest) if newest else 0
    while True:
        step += 1
        checkpoint.save(checkpoint.step_folder(root, step), state(step), {"step": step}, group=None, life=life)
        checkpoint.prune(root, keep=2, life=life)


def test_sigkill_at_random_moments(tmp_path):
    draw = random.Random(1)
    reached = [0]
    for _ in range(12):
        pid = forked(save_forever, tmp_path)
        time.sleep(draw.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        newest = checkpoint.latest(tmp_path)
        reached.append(consistent(newest) if newest else 0)
    assert reached == sorted(reached)
    assert reached[-1] > 3


def save_forever_on(rank, world, store, root):
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=dist.FileStore(str(store), world), timeout=timedelta(seconds=20)
    )
    life = checkpoint.take_over(root) if rank == 0 else None
    dist.barrier()
    newest = checkpoint.latest(root)
    step = consistent(newest) if newest else 0
    dist.barrier()
    while True:
        step += 1
        folder = checkpoint.step_folder(root, step)
        checkpoint.save(folder, state(step, rank, world), {"step": step}, group=dist.group.WORLD, life=life)
        if rank == 0:
            checkpoint.prune(root, keep=2, life=life)


@pytest.mark.parametrize("victim", [0, 1])
def test_sigkill_of_one_of_two_ranks(tmp_path, victim):
    draw = random.Random(victim)
    root = tmp_path / "root"
    reached = [0]
    for life in range(3):
        pids = [forked(save_forever_on, rank, 2, tmp_path / f"store{life}", root) for rank in range(2)]
        time.sleep(draw.uniform(0.2, 0.4))
        os.kill(pids[victim], signal.SIGKILL)
        time.sleep(0.05)  # the survivor sees its peer go and cleans up, or does not get to it
        os.kill(pids[1 - victim], signal.SIGKILL)
        assert [exit_code(pid) for pid in pids][victim] == -signal.SIGKILL
        newest = checkpoint.latest(root)
        reached.append(consistent(newest) if newest else 0)
    assert reached == sorted(reached)
    assert reached[-1] > 0
