"""Ranks from what launchers put in the environment, and how ranks find rank 0."""

import os
from datetime import timedelta
from threading import Thread

import pytest

from moetrain import launchers
from moetrain.config import UserError
from moetrain.launchers import RankInfo, rank_info, tasks_per_node

SRUN = {  # as Slurm 22.05 sets them in a step of two nodes
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS": "4",
}  # fmt: skip


def test_nobody_has_started_it() -> None:
    assert rank_info({}) == RankInfo(0, 1, 0, 1, by="")
    assert rank_info({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).by == "", "a batch script"
    assert rank_info(SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).by == "", "srun --pty bash"


def test_torchrun_goes_before_the_job_it_is_in() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert rank_info(SRUN | torchrun) == RankInfo(3, 8, 1, 2, by="torchrun")
    assert rank_info({"RANK": "1", "WORLD_SIZE": "2"}) == RankInfo(1, 2, 1, 2, by="torchrun")


def test_srun() -> None:
    assert rank_info(SRUN) == RankInfo(2, 4, 0, 2, by="srun")
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NUM_TASKS": "11"}
    last = {"SLURM_PROCID": "10", "SLURM_NODEID": "2", "SLURM_LOCALID": "2", "SLURM_GPUS_PER_TASK": "1"}
    assert rank_info(SRUN | uneven | last) == RankInfo(10, 11, 2, 3, by="srun", own_gpu=True)
    assert tasks_per_node("4(x2),3,1(x3)") == [4, 4, 3, 1, 1, 1]
    assert rank_info(SRUN | {"SLURM_PROCID": "1"}).rank == 2, "dealt in turns: the ranks of a node stay together"


@pytest.fixture
def step(monkeypatch, tmp_path):
    """This process as a task of srun, without torchrun's words."""
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "SLURM", "MASTER", "RANK"))]:
        monkeypatch.delenv(name)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return tmp_path


def meet(rank: int, folder, seconds: float):
    return launchers.meet(RankInfo(rank, 2, rank, 2, by="srun"), timedelta(seconds=seconds), folder=folder)


def test_ranks_meet_where_rank_0_says(step) -> None:
    found = []
    waiting = Thread(target=lambda: found.append(meet(1, step, 20)))
    waiting.start()
    own = meet(0, step, 20)
    waiting.join(timeout=30)
    own.set("word", "here")
    assert found[0].get("word") == b"here"


def test_a_rank_0_that_is_not_there_any_more_is_not_waited_for_for_ever(step) -> None:
    gone = meet(0, step, 5)
    del gone
    with pytest.raises(
        RuntimeError, match=r"rank 1 of 2 found no rank 0 in 3 s: posted in .*7-0-0: \w+ \d+ .*is there"
    ):
        meet(1, step, 3)
    with pytest.raises(RuntimeError, match=r"posted in .*: nothing; is rank 0 running"):
        meet(1, step / "elsewhere", 1)


def test_another_life_of_the_job_posts_elsewhere(step, monkeypatch) -> None:
    first = meet(0, step, 5)
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    with pytest.raises(RuntimeError, match="7-0-1: nothing"):
        meet(1, step, 1)
    second = meet(0, step, 5)
    assert len(list((step / "meet").iterdir())) == 1
    second.set("word", "second")
    assert meet(1, step, 5).get("word") == b"second"
    first.set("word", "first")


def test_the_others_do_not_wait_for_a_rank_0_that_refuses(step) -> None:
    launchers.call_off(step)
    with pytest.raises(UserError, match="rank 0 has found something to mend"):
        meet(1, step, 60)
