"""A Slurm job of a run: ``slurm/pretrain.sbatch`` with a cluster's settings in its head."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import moetrain
from moetrain.cluster.config import Container, SlurmConfig
from moetrain.config import UserError, nearest

_SAME = "# ---- from here on the same for everybody ----\n"
_NEVER = "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints"
"""Reasons for which a job waits that no other job's end changes."""
_MANY = (
    "; sinfo -o '%P %D %c %m %l %G' lists the nodes that there are: lower cluster.nodes, .ranks_per_node, "
    ".cpus_per_rank, .memory, .gpus or .time, or shorten .exclude"
)


@dataclass(frozen=True)
class Job:
    """A run folder, and where its ranks sit."""

    name: str
    folder: Path
    nodes: int
    cluster: SlurmConfig

    @property
    def ranks(self) -> int:
        return self.nodes * self.cluster.ranks_per_node

    @property
    def options(self) -> list[str]:
        """Of sbatch."""
        c, logs, kind = self.cluster, self.folder.absolute() / "launch", self.cluster.gpus.partition(":")[2]
        found = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": c.ranks_per_node,
            "gpus-per-node": f"{kind}{':' * bool(kind)}{c.ranks_per_node}" if c.gpus else "",
            "cpus-per-task": c.cpus_per_rank or "",
            "mem": c.memory,
            "time": c.time,
            "signal": f"B:USR1@{60 * c.leave}",
            "output": logs / "slurm-%j.out",
            "partition": c.partition, "account": c.account, "qos": c.qos, "constraint": c.constraint,
            "exclude": c.exclude, "reservation": c.reservation,
        }  # fmt: skip
        return [*(f"--{k}={v}" for k, v in found.items() if v != ""), "--requeue", "--open-mode=append", *c.options]

    def script(self) -> str:
        """The batch file. Its arguments are the words of ``moetrain train``."""
        c = self.cluster
        container = c.container is not Container.none
        python = c.python or ("python3" if container else sys.executable)
        mounts = [str(self.folder.parent.absolute()), *c.mounts]
        srun, wrap = [], []
        if c.container is Container.pyxis:
            both = ",".join(m if ":" in m else f"{m}:{m}" for m in mounts)
            srun = [f"--container-image={c.image}", f"--container-mounts={both}"]
        elif c.container is Container.apptainer:
            wrap = ["apptainer", "exec", *["--nv"] * bool(c.gpus), *(f"--bind={m}" for m in mounts), c.image]
        names = {name: c.interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if c.interface}
        head = [
            "#!/usr/bin/env bash",
            f"# Run {self.folder}, written by moetrain {moetrain.__version__}: see slurm/pretrain.sbatch.",
            *(f"#SBATCH {option}" for option in self.options),
            *c.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in names.items()),
            f"PYTHON={shlex.quote(python)}",
            f"RUN={shlex.quote(str(self.folder.absolute()))}",
            f"RESTARTS={c.restarts}",
            f"REQUEUES={c.requeues}",
            f"CHECK={int(c.check_nodes)}",
            f"SRUN=({shlex.join(srun)})",
            f"WRAP=({shlex.join(wrap)})",
        ]
        return "\n".join(head) + "\n" + _SAME + _template().partition(_SAME)[2]


def _template() -> str:
    """slurm/: beside the package in a checkout, inside it where installed from a wheel."""
    package = Path(moetrain.__file__).parent
    for place in (package.parent / "slurm", package / "slurm"):
        if (path := place / "pretrain.sbatch").is_file():
            return path.read_text()
    raise UserError(f"slurm/pretrain.sbatch is neither beside nor inside {package}: install moetrain again")


def submit(script: Path, words: list[str]) -> str:
    """The job's id. Raises ``UserError`` with what sbatch says."""
    found = _run("sbatch", "--parsable", str(script), *words)
    if found.returncode:
        said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in found.stderr.strip().splitlines()]
        raise UserError(f"sbatch refuses the job: {said[0]}{_hint(said[0], script)}" if said else "sbatch fails")
    job = found.stdout.strip().partition(";")[0]
    if (why := _squeue(job, "%r")) in _NEVER:
        _run("scancel", job)
        raise UserError(f"Slurm could never start the job ({why}), which is cancelled{_MANY}")
    return job


def _hint(why: str, script: Path) -> str:
    if "artition" in why:
        known = sorted({line.rstrip("*") for line in _run("sinfo", "-h", "-o", "%P").stdout.split()})
        wanted = (re.search(r"--partition=(\S+)", script.read_text()) or [""] * 2)[1]
        return f"{nearest(wanted, known)} (cluster.partition={wanted}; there are: {', '.join(known)})"
    return (
        _MANY if any(word in why for word in ("ode count", "configuration", "CPU count", "emory", "resource")) else ""
    )


def state(job: str) -> str:
    """What squeue says of a job: PENDING, RUNNING, ...; nothing where it is over, or Slurm does not answer."""
    return _squeue(job, "%T")


def _squeue(job: str, what: str) -> str:
    found = _run("squeue", "-h", "-j", job, "-o", what)
    return found.stdout.strip() if found.returncode == 0 else ""


def last_job(folder: Path) -> str:
    """The id of the newest job of a run, which launch or the job itself has left; nothing where there was none."""
    try:
        return (folder / "launch" / "job").read_text().strip()
    except OSError:
        return ""


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is not on this machine: submit where Slurm is, or look with --dry-run")
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
