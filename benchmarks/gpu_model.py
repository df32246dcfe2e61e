"""Whole training steps of OLMoE-1B-7B (6.9B parameters, 1.3B active) on one GPU: tokens/s, MFU, peak memory.

    python benchmarks/gpu_model.py cuda "NVIDIA H200" [--small]

``Trainer.step`` as ``moetrain train`` runs it: batch, forward, loss, backward, global norm, clip, fused AdamW;
computing in bf16, while weights, gradients and optimizer state are float32 (16 bytes a parameter). 8 x 4,096 tokens a
step. The tokens are random ids, and the router is freshly initialized and trains: the load is what it is, its max
violation is given. Where 16 layers do not fit, fewer are taken, and the result says how many. MFU counts no
recomputation; its peak is the vendor's dense figure (``moetrain/telemetry/hardware.py``). CUDA events, median of 10
steps after 3.
"""

import gc
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from gpu_results import MICRO_BATCHES, failed, measured, model_cell, not_measured, record
from gpu_timing import Timer

from moetrain.cli.compose import compose
from moetrain.config import replace
from moetrain.data.corpus import Corpus
from moetrain.data.loader import Loader
from moetrain.job import Config, Data
from moetrain.model.flops import flops_per_token, size
from moetrain.telemetry.hardware import peak_flops
from moetrain.train import Trainer
from moetrain.world import Communication, Device, join

STEPS, WARMUP, BATCH, SEQ_LEN = 10, 3, 8, 4096
LAYERS = (16, 14, 12, 10, 8, 6, 4)
SMALL = [
    "model.dim=64", "model.vocab_size=512", "model.num_heads=4", "model.num_kv_heads=4", "model.moe.num_experts=8",
    "model.moe.hidden=32", "model.moe.router.top_k=2", "train.seq_len=32",
    "train.batch=4",
]  # fmt: skip


def configured(device: str, folder: Path, *, layers: int, small: bool) -> Config:
    words = [
        "model=olmoe_1b_7b", f"model.num_layers={layers}", f"train.batch={BATCH}", "train.micro_batch=1",
        f"train.seq_len={SEQ_LEN}", "train.dtype=bfloat16", f"train.device={device}", "train.steps=1000",
        f"run.dir={folder}",
    ]  # fmt: skip
    return compose(words + (SMALL if small else []))


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


def measure(trainer: Trainer, *, micro_batch: int, deterministic: bool, steps: int, warmup: int) -> dict:
    cfg, device = trainer.cfg, trainer.world.device
    trainer.cfg = cfg = replace(cfg, train=replace(cfg.train, micro_batch=micro_batch, deterministic=deterministic))
    timer, times = Timer(device), []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = None
    for i in range(warmup + steps):
        start = timer.mark()
        result = trainer.step()
        end = timer.mark()
        if i >= warmup:
            times.append(timer.seconds(start, end))
    assert result is not None
    assert result.loss.isfinite().item(), f"the loss is {result.loss.item()}"
    seconds = statistics.median(times)
    rate = cfg.train.batch * cfg.train.seq_len / seconds
    flops = flops_per_token(cfg.model, seq_len=cfg.train.seq_len)
    peak = peak_flops(device, torch.bfloat16)
    load_LE = result.load_LE.view(-1, cfg.model.moe.num_choices).double()
    counts = size(cfg.model)
    memory = {}
    if device.type == "cuda":
        memory = {"peak_memory": f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"}
    return measured(
        rate, "tokens/s",
        **({"MFU": f"{rate * flops / peak:.1%} of {peak / 1e12:.4g} TFLOP/s"} if peak else {}),
        **memory,
        step=f"{seconds * 1e3:.4g} ms ({min(times) * 1e3:.4g} to {max(times) * 1e3:.4g})",
        batch=f"{cfg.train.batch} x {cfg.train.seq_len} tokens",
        layers=f"{cfg.model.num_layers} of {LAYERS[0]}",
        parameters=f"{counts.total / 1e9:.3g}B, {counts.active / 1e9:.3g}B active",
        flops_a_token=f"{flops / 1e9:.4g} GFLOP",
        max_violation=f"{(load_LE.amax(1) / load_LE.mean(1) - 1).max().item():.2f}",
    )  # fmt: skip


def try_layers(layers: int, device: torch.device, name: str, *, small: bool) -> bool:
    """Whether the model fitted and trained with micro-batches of one sample; then the other cells too."""
    steps, warmup = (1, 0) if small else (STEPS, WARMUP)
    with tempfile.TemporaryDirectory() as folder:
        cfg = configured(device.type, Path(folder), layers=layers, small=small)
        world = join(device=Device(device.type), communication=Communication.auto, timeout=60.0, threads=1)
        try:
            trainer = Trainer(cfg, world, random_data(cfg))
            cell = measure(trainer, micro_batch=1, deterministic=True, steps=steps, warmup=warmup)
        except torch.OutOfMemoryError as error:
            print(f"{layers} layers do not fit: {str(error).splitlines()[0]}", flush=True)
            return False
        save(name, model_cell(1), cell)
        others = [(1, False), *((m, True) for m in MICRO_BATCHES[1:])]
        full = None
        for micro_batch, deterministic in others:
            key = model_cell(micro_batch, deterministic=deterministic)
            if full is not None and micro_batch >= full:
                save(name, key, not_measured(f"{layers} layers with micro-batches of {full} do not fit already"))
                continue
            try:
                trainer.model.zero_grad()
                save(
                    name,
                    key,
                    measure(trainer, micro_batch=micro_batch, deterministic=deterministic, steps=steps, warmup=warmup),
                )
            except torch.OutOfMemoryError as error:
                full = micro_batch
                save(name, key, not_measured(f"{layers} layers: {str(error).splitlines()[0]}"))
    return True


def save(name: str, key: str, cell: dict) -> None:
    print(key, cell, flush=True)
    record(name, {key: cell})


def main(device: torch.device, name: str, *, small: bool) -> int:
    for layers in (1,) if small else LAYERS:
        if try_layers(layers, device, name, small=small):
            return 0
        gc.collect()
        torch.cuda.empty_cache()
    record(name, {model_cell(1): failed(f"not even {LAYERS[-1]} layers fit")})
    return 1


if __name__ == "__main__":
    sys.exit(main(torch.device(sys.argv[1]), sys.argv[2], small="--small" in sys.argv))
