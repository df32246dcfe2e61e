"""What a job asks a cluster for."""

from dataclasses import field
from enum import Enum

from moetrain.config import UserError, config


class Container(Enum):
    none = "none"
    pyxis = "pyxis"  # srun --container-image, of NVIDIA's enroot
    apptainer = "apptainer"


@config
class SlurmConfig:
    """Keys of ``cluster.``; an empty text or 0 leaves it to Slurm, or to what is said beside it."""

    nodes: int = 0  # 0 = as many as the layout's ranks fill
    ranks_per_node: int = 8
    gpus: str = "gpu"  # what Slurm calls a GPU (gpu, gpu:h100): one for each rank; "" = CPUs only
    cpus_per_rank: int = 0
    memory: str = ""  # of a node: 500G; 0 = all of it
    time: int = 240  # minutes of a life
    leave: int = 5  # minutes before the end of a life at which the ranks are asked to save and leave
    restarts: int = 3  # times that ranks which failed are started again in a life
    requeues: int = 100  # lives after the first, of a run that was asked to leave
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""
    options: list[str] = field(default_factory=list)  # further ones of sbatch, as on its command line
    setup: list[str] = field(default_factory=list)  # lines of shell before anything else: module load cuda
    python: str = ""  # on the nodes; "" = this one, in a container python3
    interface: str = ""  # of the network, for NCCL and gloo
    check_nodes: bool = True  # moetrain doctor --quick on every node first; a bad one is left out
    container: Container = Container.none
    image: str = ""
    mounts: list[str] = field(default_factory=list)  # FROM or FROM:TO, besides the run's folder
    price: float = 0.0  # of a GPU (without GPUs, of a rank) for an hour, in a currency of yours

    def __post_init__(self) -> None:
        for name, least in {"nodes": 0, "ranks_per_node": 1, "cpus_per_rank": 0, "restarts": 0, "requeues": 0}.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"cluster.{name}={value}: has to be at least {least}")
        if not 0 < self.leave < self.time:
            raise UserError(
                f"cluster.leave={self.leave} minutes before the end of cluster.time={self.time}: has to be above 0 and "
                f"below it, lower cluster.leave or raise cluster.time"
            )
        if self.price < 0:
            raise UserError(f"cluster.price={self.price}: cannot be negative")
        if (self.container is Container.none) != (not self.image):
            raise UserError(
                f"cluster.container={self.container.value} and cluster.image={self.image!r}: a container needs an "
                f"image, and an image a container (pyxis, apptainer)"
            )
        for name in ("partition", "account", "qos", "constraint", "exclude", "reservation", "memory", "gpus"):
            if any(c.isspace() or c in "'\"\\`$" for c in getattr(self, name)):
                raise UserError(f"cluster.{name}={getattr(self, name)!r}: one word without quotes, as sbatch takes it")
