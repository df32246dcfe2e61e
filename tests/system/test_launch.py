"""``moetrain launch`` without a cluster: what every preset would submit, and what is refused before anything is."""

import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.cli.main import main

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/cluster").glob("slurm_*.yaml"))
WORDS = ["train.batch=256", "layout.ep=2"]


def dry(capsys, *argv: str) -> tuple[str, str]:
    """(what it will take, the batch file)."""
    assert main(["launch", *WORDS, *argv, "--dry-run"]) == 0, capsys.readouterr().err
    summary, _, script = capsys.readouterr().out.partition("#!/usr/bin/env bash\n")
    return summary, "#!/usr/bin/env bash\n" + script


def clean(script: str, folder: Path) -> None:
    path = folder / "pretrain.sbatch"
    path.write_text(script)
    shellcheck = str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_writes_nothing(capsys, tmp_path, monkeypatch, preset, container) -> None:
    monkeypatch.chdir(tmp_path)
    image = [] if container == "none" else [f"cluster.container={container}", "cluster.image=moetrain.sif"]
    more = ["cluster.partition=gpu", "cluster.account=mine", "cluster.qos=high", "cluster.constraint=ib&nvme"]
    more += ["cluster.exclude=n[3-4]", "cluster.interface=ib0", "cluster.setup=['module load cuda']"]
    summary, script = dry(capsys, f"cluster={preset}", "cluster.nodes=2", "cluster.price=2.5", *image, *more)
    assert list(tmp_path.iterdir()) == []
    for option in ("--nodes=2", "--partition=gpu", "--account=mine", "--qos=high", "--constraint=ib&nvme"):
        assert f"#SBATCH {option}\n" in script
    for line in ("#SBATCH --exclude=n[3-4]", "export GLOO_SOCKET_IFNAME=ib0", "module load cuda", "#SBATCH --requeue"):
        assert f"{line}\n" in script
    assert ("apptainer exec" in script) == (container == "apptainer")
    assert ("--container-image=moetrain.sif" in script) == (container == "pyxis")
    assert "hours" in summary
    assert "at cluster.price=2.5" in summary
    clean(script, tmp_path)


def test_hours_and_what_they_cost(capsys) -> None:
    summary, script = dry(capsys, "cluster=slurm_h100", "cluster.nodes=4", "cluster.time=90", "cluster.price=2")
    assert "4 node(s) of 8 ranks, layout pp=1 dp=32" in summary
    assert "a life of 90 minutes: 48.0 GPU-hours, 96.00 at cluster.price=2" in summary
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --signal=B:USR1@600\n" in script
    assert "#SBATCH --gpus-per-node=h100:8\n" in dry(capsys, "cluster=slurm_h100", "cluster.gpus=gpu:h100")[1]


def test_nodes_are_as_many_as_the_layout_fills(capsys) -> None:
    assert "3 node(s) of 8 ranks" in dry(capsys, "layout.dp=24", "train.batch=96")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    {
        "cluster=slurm_h10": "cluster=slurm_h10: no such cluster; did you mean 'slurm_h100'?",
        "cluster.nodse=2": "nodse",
        "cluster.time=5 cluster.leave=5": "cluster.leave=5 minutes before the end of cluster.time=5: has to be above 0",
        "cluster.container=pyxis": "a container needs an image",
        "cluster.partition='a b'": "one word without quotes",
        "cluster.price=-1": "cannot be negative",
        "layout.dp=3": "is 3 ranks, not a multiple of cluster.ranks_per_node=8",
        "optim.lrr=1": "unknown key 'optim.lrr'",
        "--dry": "unknown option --dry",
        "cluster": "is not key=value",
    }.items(),
    ids=lambda value: value if "=" in value or "--" in value else "",
)
def test_what_is_wrong_is_one_line(capsys, tmp_path, monkeypatch, words, said) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *words.split(" ", 1 if "'" not in words else 0), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1, error
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_it_says_so(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/usr/nowhere")
    assert main(["launch", "cluster=slurm_cpu", *WORDS, f"run.dir={tmp_path}"]) == 2
    assert "sbatch is not on this machine: submit where Slurm is, or look with --dry-run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_of_ones_own(capsys, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("ranks_per_node: 3\ngpus: ''\npartition: long\n")
    summary, script = dry(capsys, f"cluster={tmp_path}/mine.yaml", "layout.ep=1", "train.batch=12")
    assert f"cluster {tmp_path}/mine.yaml: 1 node(s) of 3 ranks" in summary
    assert "#SBATCH --partition=long\n" in script
    assert "gpus-per-node" not in script
