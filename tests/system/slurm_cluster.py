"""A real Slurm on this machine: a controller and several nodes, each a daemon of its own, all in one folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo"
_CONF = """\
ClusterName=moetrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=6
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=15
KillWait=5
MinJobAge=3600
JobRequeue=1
RebootProgram=/bin/true
SchedulerParameters=bf_interval=5,sched_min_interval=100000,batch_sched_delay=0,requeue_delay=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; nothing where it can."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"Slurm is not here ({', '.join(absent)}): apt-get install slurm-wlm" if absent else ""


class Cluster:
    """Started by ``with``; every process of it is ended with it."""

    def __init__(self, folder: Path, *, nodes: int, cpus: int = 4) -> None:
        self.folder, self.names = folder, [f"n{i + 1}" for i in range(nodes)]
        ports = _free_ports(nodes + 1)
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 "
            f"State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (folder / "state").mkdir(parents=True)
        self.conf = folder / "slurm.conf"
        self.conf.write_text(_CONF.format(host=host, port=ports[0], user=user, folder=folder, nodes="\n".join(lines)))
        (folder / "cgroup.conf").write_text("ConstrainCores=no\nConstrainRAMSpace=no\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(self.conf)}

    def __enter__(self) -> "Cluster":
        try:
            self.run("slurmctld", "-f", str(self.conf))
            for name in self.names:
                self.start_node(name)
            self.wait(lambda: self.states().count("idle") == len(self.names), 30, "nodes that are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=" + self.env.get("USER", "root"), check=False)
            self.wait(lambda: not self.queue(), 15, "jobs that end")
        for name in ("slurmctld", *self.names):
            self._end(self._pid(name), signal.SIGTERM)
        for name in self.names:
            self.kill_node(name)

    def start_node(self, name: str) -> None:
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        self.run("slurmd", "-f", str(self.conf), "-N", name)

    def kill_node(self, name: str) -> None:
        """As a crash: its daemon, its steps and all of their processes at once."""
        self._end(self._pid(name), signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            if self._of(process, name):
                self._end(int(process.name), signal.SIGKILL)

    def _of(self, process: Path, name: str) -> bool:
        with contextlib.suppress(OSError):
            environ = (process / "environ").read_bytes().split(b"\0")
            if f"SLURMD_NODENAME={name}".encode() in environ and f"SLURM_CONF={self.conf}".encode() in environ:
                return True
            if (process / "comm").read_text().strip() == "slurmstepd":
                files = [os.readlink(path) for path in (process / "fd").iterdir()]
                return any(f.startswith((f"{self.folder}/spool.{name}", f"{self.folder}/{name}.log")) for f in files)
        return False

    def processes(self) -> list[str]:
        """Command lines of what jobs of this cluster run."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (process / "environ").read_bytes()
                if b"SLURM_JOB_ID=" in environ and f"SLURM_CONF={self.conf}\0".encode() in environ:
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [line for line in found if line.strip()]

    def run(self, *words: str, check: bool = True, timeout: float = 60, **more: str) -> str:
        """What a command says, on the cluster."""
        done = subprocess.run(
            words, env=self.env | more, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip() if check else done.stdout + done.stderr

    def states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()

    def queue(self, job: str = "") -> str:
        """States of the jobs that are not over."""
        return self.run("squeue", "-h", *(["-j", job] if job else []), "-o", "%T", check=False).strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def hosts(self, nodes: str) -> list[str]:
        """n[1-2] is n1, n2."""
        return self.run("scontrol", "show", "hostnames", nodes).split()

    def over(self, number: str, *, seconds: float) -> dict[str, str]:
        """A job that has ended for good."""
        self.wait(lambda: self.queue(number) == "", seconds, f"job {number} to end")
        return self.job(number)

    @staticmethod
    def wait(what, seconds: float, words: str) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"waited {seconds} s for {words}"
            time.sleep(0.2)

    def _pid(self, name: str) -> int:
        try:
            return int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return 0

    @staticmethod
    def _end(pid: int, number: signal.Signals) -> None:
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            until = time.monotonic() + 10
            while time.monotonic() < until and number is not signal.SIGKILL:
                os.kill(pid, 0)
                time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
