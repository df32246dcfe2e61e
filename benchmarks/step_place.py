"""What ``step.py`` measures on: our configuration and data, the device and its clock; a speed."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ceilings
import numpy as np
import torch
from gpu_timing import Clock, Timer

from moetrain.cli.compose import compose
from moetrain.data.corpus import Corpus
from moetrain.data.loader import Loader
from moetrain.job import Config, Data
from moetrain.model.flops import flops_per_token
from moetrain.telemetry.hardware import peak_flops
from moetrain.train import Trainer
from moetrain.world import World

STEPS, WARMUP, BATCH, SEQ_LEN = 10, 2, 8, 4096
SMALL = [
    "model.dim=64", "model.vocab_size=512", "model.num_heads=4", "model.num_kv_heads=4", "model.moe.num_experts=8",
    "model.moe.hidden=32", "model.moe.router.top_k=2", "train.seq_len=32",
]  # fmt: skip


def configured(device: str, folder: Path, *, layers: int, small: bool, more: tuple[str, ...] = ()) -> Config:
    words = [
        "model=olmoe_1b_7b", f"model.num_layers={layers}", f"train.batch={BATCH}", "train.micro_batch=1",
        f"train.seq_len={SEQ_LEN}", "train.dtype=bfloat16", f"train.device={device}", "train.steps=1000",
        f"run.dir={folder}",
    ]  # fmt: skip
    return compose([*words, *(SMALL if small else []), *more])


def random_data(cfg: Config) -> Data:
    """A corpus of random ids that never touches the disk: as many as a few hundred steps need."""
    vocab, t = cfg.model.vocab_size, cfg.train
    ids = np.random.default_rng(0).integers(0, vocab, size=256 * t.seq_len + 1).astype(np.uint16)
    corpus = Corpus(
        path=Path("random"), name="random", train=ids, valid=ids, vocab_size=vocab, eos=0, fingerprint="random",
        tokenizer_fingerprint="random", token_bytes=np.ones(vocab, np.int32), meta={},
    )  # fmt: skip
    corpora = dict.fromkeys(cfg.data.corpora, corpus)
    return Data(corpora, Loader(cfg.data, seq_len=t.seq_len, seed=cfg.seed, corpora=corpora), {})


@dataclass
class Place:
    """Where and how long is measured."""

    device: torch.device
    name: str
    small: bool
    folder: Path
    world: World
    clock: Clock
    tops: ceilings.Ceilings
    timer: Timer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = Timer(self.device)

    @property
    def steps(self) -> int:
        return 3 if self.small else STEPS

    def trainer(self, layers: int) -> Trainer:
        cfg = configured(self.device.type, self.folder, layers=layers, small=self.small)
        return Trainer(cfg, self.world, random_data(cfg))

    def times(self, step: Callable[[], Any], *, steps: int, warmup: int) -> tuple[list[float], float]:
        """Seconds of each step after the warm-up, and the peak of memory in GiB."""
        self.timer.begin_peak()
        found = []
        for i in range(warmup + steps):
            start = self.timer.mark()
            step()
            end = self.timer.mark()
            if i >= warmup:
                found.append(self.timer.seconds(start, end))
        return found, self.timer.peak() / 2**30


@dataclass
class Speed:
    """Somebody's best setting, measured."""

    cfg: Config
    setting: str
    times: list[float]
    peak_gib: float
    first: float  # seconds of the first step
    tried: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    def said(self, device: torch.device) -> str:
        rate = self.cfg.train.batch * self.cfg.train.seq_len / self.seconds
        peak = peak_flops(device, torch.bfloat16)
        mfu = (
            f", MFU {rate * flops_per_token(self.cfg.model, seq_len=self.cfg.train.seq_len) / peak:.1%}" if peak else ""
        )
        return f"{rate:,.0f} tokens/s{mfu}, {self.peak_gib:.1f} GiB, first step {self.first:.3g} s ({self.setting})"
