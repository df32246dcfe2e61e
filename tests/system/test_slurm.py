"""On a real Slurm: jobs that end, whose nodes crash, that run out of time, are preempted and cancelled; a sweep."""

import sys
from pathlib import Path

import pytest
from drawn import ALL
from slurm_cluster import Cluster, missing
from test_train_command import COMMAND, final_state, losses, train, words

from moetrain.checkpoint import last_word

if why := missing():
    pytest.skip(why, allow_module_level=True)
ROOT = Path(__file__).parents[2]
MOETRAIN = [sys.executable, "-m", "moetrain"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4) as started:
        yield started


@pytest.fixture(scope="module")
def straight(small_corpus, tmp_path_factory) -> Path:
    """The unbroken run of four ranks, without Slurm."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = train(*job(small_corpus, folder), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def job(corpus: Path, folder: Path, *more: str) -> list[str]:
    """Two nodes of two ranks."""
    return words(corpus, folder, "layout.dp=4", "layout.ep=4", *more)


def launch(cluster: Cluster, argv: list[str], *settings: str, **more: str) -> str:
    """The job's number; ``more``: of the environment."""
    said = cluster.run(*MOETRAIN, "launch", "cluster=slurm_cpu", "cluster.cpus_per_rank=2", *settings, *argv, **more)
    return said.rpartition("squeue -j ")[2].partition(";")[0]


def steps(folder: Path) -> int:
    return len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0


def log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "launch").glob("slurm-*.out")))


def same_run(folder: Path, straight: Path) -> None:
    assert losses(folder) == losses(straight)
    a, b = final_state(folder), final_state(straight)
    assert a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []


def test_a_job_of_two_nodes(cluster, small_corpus, tmp_path, straight) -> None:
    folder = tmp_path / "run"
    secret = "0123456789abcdef0123456789abcdef01234567"
    number = launch(cluster, job(small_corpus, folder), WANDB_API_KEY=secret)
    found = cluster.over(number, seconds=300)
    assert (found["JobState"], found["NumNodes"]) == ("COMPLETED", "2"), log(folder)
    same_run(folder, straight)
    kept = {path.name: path.read_text() for path in (folder / "launch").iterdir()}
    assert {"config.yaml", "pretrain.sbatch", "git.txt", "git.diff", "command.txt"} < kept.keys()
    assert {f"node-{name}.log" for name in cluster.hosts(found["NodeList"])} < kept.keys()
    assert "WANDB_API_KEY=" in kept["environment.txt"]
    assert [name for name, text in kept.items() if secret in text] == []
    assert "complete" in cluster.run(*MOETRAIN, "status", str(folder))


def test_a_node_crashes_and_the_run_goes_on_elsewhere(cluster, small_corpus, tmp_path, straight) -> None:
    folder = tmp_path / "run"
    number = launch(cluster, job(small_corpus, folder))
    cluster.wait(lambda: steps(folder) >= 4, 200, "four steps")
    nodes = cluster.hosts(cluster.job(number)["NodeList"])
    cluster.kill_node(nodes[1])
    found = cluster.over(number, seconds=400)
    assert found["JobState"] == "COMPLETED", log(folder)
    assert int(found["Restarts"]) == 1
    assert nodes[1] not in cluster.hosts(found["NodeList"])
    same_run(folder, straight)
    cluster.start_node(nodes[1])
    cluster.wait(lambda: cluster.states().count("idle") == 4, 60, "the node to come back")


def test_lives_end_in_time_and_by_preemption(cluster, small_corpus, tmp_path, straight) -> None:
    """One life asked to leave by its batch file, one ended by a job that goes first, one to the end."""
    folder = tmp_path / "run"
    number = launch(cluster, job(small_corpus, folder), "cluster.time=10")
    cluster.wait(lambda: steps(folder) >= 4, 200, "four steps")
    cluster.run("scancel", "--batch", "--signal=USR1", number)  # as Slurm does --signal=B:USR1@... before the limit
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", 60, "a requeue")
    assert "the time limit is near" in log(folder)
    before = steps(folder)
    cluster.wait(lambda: steps(folder) >= before + 3, 200, "steps of the second life")
    first = ["sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5"]
    urgent = cluster.run(*first)
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "2", 120, "a preemption")
    cluster.over(urgent, seconds=120)
    found = cluster.over(number, seconds=400)
    assert found["JobState"] == "COMPLETED", log(folder)
    same_run(folder, straight)
    said = (folder / "logs" / "rank-0.log").read_text()
    assert said.count("ERROR asked to stop by the file stop in its folder: saved at step") == 1
    assert said.count("ERROR asked to stop by a signal: saved at step") == 1


@pytest.mark.skipif(not ALL, reason="lives of two minutes: MOETRAIN_TESTS=all")
def test_the_real_limit(cluster, small_corpus, tmp_path) -> None:
    folder = tmp_path / "run"
    argv = job(small_corpus, folder, "train.steps=100000")
    number = launch(cluster, argv, "cluster.time=2", "cluster.leave=1", "cluster.requeues=1")
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", 200, "a requeue")
    found = cluster.over(number, seconds=400)
    assert found["ExitCode"] == "4:0"
    assert [step for step, _ in losses(folder)] == list(range(1, steps(folder) + 1))


def test_scancel_leaves_no_process_and_a_run_has_one_job(cluster, small_corpus, tmp_path) -> None:
    folder = tmp_path / "run"
    argv = job(small_corpus, folder, "train.steps=100000")
    number = launch(cluster, argv)
    cluster.wait(lambda: steps(folder) >= 2, 200, "two steps")
    again = cluster.run(*MOETRAIN, "launch", "cluster=slurm_cpu", *argv, check=False)
    assert f"job {number} of {folder} is RUNNING: scancel {number} first" in again
    script = folder / "launch" / "pretrain.sbatch"
    second = cluster.run("sbatch", "--parsable", str(script), "--config", str(folder / "launch/config.yaml"))
    assert cluster.over(second, seconds=60)["ExitCode"] == "2:0"
    assert f"error: job {number} is training {folder}" in log(folder)
    assert cluster.queue(number) == "RUNNING", "which is as it was"
    cluster.run("scancel", number)
    assert cluster.over(number, seconds=60)["JobState"] == "CANCELLED"
    cluster.wait(lambda: cluster.processes() == [], 15, f"no process: {cluster.processes()}")
    assert last_word(folder / "checkpoints").startswith("life 1 ended: asked to stop by a signal: saved")


def test_srun_alone_is_enough(cluster, small_corpus, tmp_path, straight) -> None:
    argv = job(small_corpus, tmp_path / "run", "train.exit_after=3")
    cluster.run("srun", "-N2", "--ntasks-per-node=2", *COMMAND, *argv, timeout=200)
    assert losses(tmp_path / "run") == losses(straight)[:3]
    wrong = cluster.run("srun", "-N1", "--ntasks-per-node=3", *COMMAND, *argv, check=False, timeout=200)
    assert "does not equal the 3 ranks there are: start 4 ranks" in wrong
    assert "Traceback" not in wrong
    words = ["srun", "-N2", "-n4", "--distribution=cyclic", *COMMAND, *argv, f"run.name={tmp_path.name}"]
    cluster.run(*words, timeout=200)
    assert losses(tmp_path / tmp_path.name) == losses(straight)[:3]


def test_a_node_that_is_not_well_is_left_out(cluster, small_corpus, tmp_path) -> None:
    """A Python that does not start on one node."""
    folder, python = tmp_path / "run", tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n1 ] && [ "$3" = doctor ] && exit 1\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    argv = job(small_corpus, folder, "train.exit_after=2")
    launch(cluster, argv, f"cluster.python={python}")
    cluster.wait(lambda: "job " in log(folder) and "goes on without it" in log(folder), 120, "the check")
    assert "node n1 is not well" in log(folder)
    number = log(folder).partition(" goes on without it")[0].rpartition("job ")[2]
    found = cluster.over(number, seconds=200)
    assert (found["JobState"], found["ExcNodeList"]) == ("COMPLETED", "n1"), log(folder)


def test_what_slurm_refuses_is_one_line(cluster, small_corpus, tmp_path) -> None:
    for setting, said in {
        "cluster.partition=gpuu": "invalid partition specified: gpuu (cluster.partition=gpuu; there are: main, urgent)",
        "cluster.constraint=h100": "Invalid feature specification",
        "cluster.memory=900G": "Memory specification can not be satisfied; sinfo",
        "cluster.nodes=5": "does not equal the 10 ranks there are",
        "cluster.ranks_per_node=400": "is 4 ranks, not a multiple of cluster.ranks_per_node=400",
        "layout.dp=16": "could never start the job (PartitionConfig), which is cancelled; sinfo -o",
    }.items():
        argv = job(small_corpus, tmp_path / "run", "train.batch=64", setting)
        told = cluster.run(*MOETRAIN, "launch", "cluster=slurm_cpu", *argv, check=False)
        assert said in told, told
        assert told.startswith("error: "), told
        assert len(told.splitlines()) == 1, told
    assert cluster.queue() == ""
    assert not (tmp_path / "run").exists(), "nothing is left of them"


def test_a_sweep_by_submitit_is_an_array_of_jobs(cluster, small_corpus, tmp_path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason='needs moetrain\'s extra "sweep"')
    sweep = tmp_path / "sweep"
    argv = words(small_corpus, sweep, "layout.ep=1", "train.steps=4", "checkpoint.every=0")
    argv += ["router=topk,sinkhorn", "balance=[switch],[expert_bias]"]
    launcher = ["cpus_per_task=1", "mem_gb=1", "timeout_min=10", "partition=main", f"submitit_folder={tmp_path}/jobs"]
    done = cluster.run(
        "sbatch", "--parsable", "-o", str(tmp_path / "sweep.out"), str(ROOT / "slurm" / "sweep.sbatch"), *argv,
        *(f"hydra.launcher.{word}" for word in launcher), PYTHON=sys.executable, PYTHONPATH=str(ROOT),
    )  # fmt: skip
    found = cluster.over(done, seconds=400)
    assert found["JobState"] == "COMPLETED", (tmp_path / "sweep.out").read_text()
    said = (tmp_path / "sweep.out").read_text()
    assert "4 points: 4 done" in said, said
    report = cluster.run(*MOETRAIN, "report", str(sweep), timeout=120)
    assert "sinkhorn" in report + (sweep / "report" / "table.md").read_text()
