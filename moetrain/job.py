"""The root of the config, and what is checked before any rank starts: a job that cannot run says so in one line."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from moetrain import compiling
from moetrain import parallel as parallelism
from moetrain.bad_steps import BadStepsConfig
from moetrain.config import UserError, config
from moetrain.data.corpus import Corpus
from moetrain.data.loader import DataConfig, Loader, Samples, Validation, open_corpora
from moetrain.kernels import float8
from moetrain.layouts import Layout
from moetrain.logical import DTypeName
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.optim import OptimConfig
from moetrain.parallel.context import ContextConfig
from moetrain.parallel.data import ShardingConfig
from moetrain.parallel.pipeline import check_enough
from moetrain.parallel.recompute import RecomputeConfig
from moetrain.parallel.schedules import PipelineConfig
from moetrain.telemetry.health import HealthConfig
from moetrain.telemetry.sinks import LoggingConfig
from moetrain.telemetry.trace import TraceConfig
from moetrain.world import Communication, Device, pick_device


class DType(DTypeName):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


@config
class RunConfig:
    """A run is the folder ``dir/name``: config.yaml, metrics.jsonl, logs/, checkpoints/, summary.json.

    ``resume``: ``auto`` continues from the newest whole checkpoint of the folder, or starts; ``never`` only starts; a
    path continues from that checkpoint of the folder. ``fork`` and ``warm_start`` start from another run's checkpoint,
    RUN or RUN@STEP, RUN a folder or a name under ``dir``: with all of its state, or with its weights alone. A run that
    has a checkpoint of its own goes on from that: the same command starts and continues.
    """

    name: str = "default"
    dir: str = "runs"
    resume: str = "auto"
    fork: str | None = None
    warm_start: str | None = None
    restarts: int = 0  # times that ranks which failed on this machine are started again
    time_limit: float | None = None  # minutes of this process, in time before which it saves and leaves
    allow: list[str] = field(default_factory=list)  # keys of the config that may differ from what was trained so far
    allow_missing: list[str] = field(default_factory=list)  # tensors that the checkpoint need not have
    reset: list[str] = field(default_factory=list)  # of optim, data: begin anew, once where it is added to the config
    cache: str | None = None  # what libraries compile; None = cache/ in the run's folder

    def __post_init__(self) -> None:
        if not self.name.strip("./") or ".." in Path(self.name).parts:
            raise UserError(f"run.name={self.name!r} cannot name a folder: use letters, digits and dashes")
        if self.restarts < 0:
            raise UserError(f"run.restarts={self.restarts}: cannot be negative, 0 starts the ranks once")
        if self.fork and self.warm_start:
            raise UserError(
                f"run.fork={self.fork} and run.warm_start={self.warm_start}: a run starts from one of them, set the "
                f"other to null"
            )
        if wrong := [name for name in self.reset if name not in ("optim", "data")]:
            raise UserError(f"run.reset={self.reset}: {wrong[0]!r} is not one of optim, data")

    @property
    def folder(self) -> Path:
        return Path(self.dir).expanduser() / self.name

    @property
    def caches(self) -> Path:
        return Path(self.cache).expanduser() if self.cache else self.folder / "cache"


@config
class RampConfig:
    """Batch-size ramp-up: from ``start`` samples a step to ``train.batch`` in even stages over ``samples`` samples."""

    start: int = 0  # 0 = no ramp
    increment: int = 0
    samples: int = 0


@config
class TrainConfig:
    steps: int = 1000
    batch: int = 32  # samples of a step, over all ranks
    micro_batch: int = 4  # consecutive samples of one forward: part of the run, not of the layout
    seq_len: int = 256
    dtype: DType = DType.float32  # what the model computes in; what weights are kept in: optim.weight_dtype
    ramp: RampConfig = field(default_factory=RampConfig)
    validate_every: int = 0  # steps; 0 = at the end only
    validate_samples: int | None = None  # of each held-out set; None = all
    bigram: bool = False  # at the end, an interpolated bigram model of the same training tokens beside ours
    exit_after: int | None = None  # save and leave after this many steps of this life, schedules unchanged
    compile: bool = False  # the dense parts and what is between an expert's matmuls, by torch.compile
    deterministic: bool = True  # on a GPU too, a step replayed is the same bits: attention's backward without atomics
    device: Device = Device.auto
    communication: Communication = Communication.auto
    timeout: float = 600.0  # seconds at one place that are a hang: who is where is said, and the ranks end
    threads: int | None = None  # per rank; None = cores / ranks of this node
    gc_every: int = 1000  # steps between collections of Python's garbage, the same on all ranks; 0 = when Python likes
    allocator: str | None = "expandable_segments:True"  # PYTORCH_ALLOC_CONF, unless it is set; None = torch's own

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "seq_len"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"train.{name}={value}: has to be at least 1")
        if self.gc_every < 0:
            raise UserError(f"train.gc_every={self.gc_every}: steps cannot be negative, 0 leaves it to Python")


@config
class CheckpointConfig:
    every: int = 100  # steps; 0 = at the end only
    keep: int = 2  # newest committed ones kept; 0 = all
    asynchronous: bool = True  # training goes on from a copy on, while that is written
    keep_every: int = 0  # steps whose checkpoints are kept besides; 0 = none


@config
class IntegrityConfig:
    """Silent corruption, found by computing or keeping the same thing twice."""

    replay_every: int = 0  # steps whose forward and backward are run twice and compared bit for bit; 0 = none
    hash_every: int = 0  # steps after which what several ranks hold alike is compared; 0 = none


@config
class Config:
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: Layout = field(default_factory=Layout)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    integrity: IntegrityConfig = field(default_factory=IntegrityConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)


def batch_at(cfg: TrainConfig, consumed: int) -> int:
    """Samples of the step that begins after ``consumed`` samples."""
    ramp = cfg.ramp
    if ramp.start == 0 or consumed >= ramp.samples:
        return cfg.batch
    stages = -(-(cfg.batch - ramp.start) // ramp.increment)
    return min(cfg.batch, ramp.start + consumed * stages // ramp.samples * ramp.increment)


def check(cfg: Config, *, world: int) -> Layout:
    """Everything that can be said from the numbers alone; returns the solved layout, raises ``UserError``."""
    layout = cfg.layout.solve(world, parallelism.shape(cfg.model, cfg.context))
    parallelism.check(
        layout, cfg.model, context=cfg.context, stages=cfg.pipeline, sharding=cfg.sharding,
        dtype=cfg.train.dtype.torch,
    )  # fmt: skip
    parallelism.recompute.check(cfg.recompute, cfg.model)
    if cfg.train.compile:
        parallelism.compile.check(layout, cfg.pipeline)
    cfg.optim.check_weights(cfg.train.dtype.torch)
    cfg.trace.check(world)
    t, ramp = cfg.train, cfg.train.ramp
    for moe in cfg.model.moe_configs:
        moe.check()
        float8.check(moe.fp8_tile, hidden=moe.hidden, etp=layout.etp)
        moe.rounding.check(moe.router, num_experts=moe.num_experts, tokens=t.seq_len, sequences=t.micro_batch)
    step = layout.dp * t.micro_batch
    sizes = {"train.batch": t.batch}
    if ramp.start:
        if not 0 < ramp.start <= t.batch or ramp.increment < 1 or ramp.samples < 1:
            raise UserError(
                f"train.ramp start={ramp.start} increment={ramp.increment} samples={ramp.samples}: start has to be in "
                f"1..train.batch={t.batch}, increment and samples at least 1"
            )
        sizes |= {"train.ramp.start": ramp.start, "train.ramp.increment": ramp.increment}
    for name, size in sizes.items():
        if size % step:
            raise UserError(
                f"{name}={size} is not a multiple of dp * train.micro_batch = {layout.dp} * {t.micro_batch} = {step}: "
                f"use {' or '.join(str(n) for n in (size // step * step, size // step * step + step) if n)}"
            )
    for size in range(sizes["train.ramp.start"], t.batch, ramp.increment) if ramp.start else ():
        check_enough(layout, cfg.pipeline, micro_batches=size // step)
    check_enough(layout, cfg.pipeline, micro_batches=t.batch // step)
    if cfg.optim.freeze:
        with torch.device("meta"):
            cfg.optim.check_freeze(name for name, _ in Transformer(cfg.model).named_parameters())
    if cfg.optim.warmup > t.steps:
        raise UserError(f"optim.warmup={cfg.optim.warmup} is longer than train.steps={t.steps}: lower it")
    return layout


def check_here(cfg: Config) -> None:
    """What only the machine that runs it can say; raises ``UserError``."""
    if cfg.train.compile:
        compiling.check(pick_device(cfg.train.device))


@dataclass(frozen=True)
class Data:
    """The opened corpora, the order of training samples, the held-out sets."""

    corpora: dict[str, Corpus]
    loader: Samples
    validation: dict[str, Validation]


def open_data(cfg: Config, *, log) -> Data:
    """Open (and, for the default corpus, build) the data; raises ``UserError`` for every way it can be wrong."""
    corpora = open_corpora(cfg.data, log=log)
    for name, corpus in corpora.items():
        if corpus.vocab_size > cfg.model.vocab_size:
            raise UserError(
                f"corpus {name} has {corpus.vocab_size} token ids, model.vocab_size={cfg.model.vocab_size} is smaller: "
                f"set model.vocab_size={corpus.vocab_size}"
            )
    t = cfg.train
    loader = Loader(cfg.data, seq_len=t.seq_len, seed=cfg.seed, corpora=corpora)
    held_out = {
        name: Validation(
            corpus,
            name=name,
            seq_len=t.seq_len,
            max_samples=t.validate_samples,
            mask_documents=cfg.data.mask_documents,
            ignore_tokens=tuple(cfg.data.ignore_tokens),
        )
        for name, corpus in corpora.items()
    }
    return Data(corpora, loader, held_out)


def checkpoints(cfg: Config) -> Path:
    return cfg.run.folder / "checkpoints"
