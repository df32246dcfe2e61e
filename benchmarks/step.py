"""Whole training steps of OLMoE-1B-7B (6.9B parameters, 1.3B active) beside other libraries' on one GPU, in one run.

    python benchmarks/step.py cuda "NVIDIA H200" [--small]

Ours is ``Trainer.step`` as ``moetrain train`` runs it: batch, forward, loss, backward, global norm, clip, fused AdamW;
computing in bf16, while weights, gradients and optimizer state are float32 (16 bytes a parameter). 8 x 4,096 tokens a
step: random ids, a fresh router. Peers (``peers/olmoe_*.py``) take the same batches with the same state of AdamW; of
their implementations, attentions, compiled or not, and micro-batches, each is searched in turn for the fastest; ours
for the fastest micro-batch, for the order of sums not being fixed, as nobody else fixes it, and with ``train.compile``.
Ours has its balance losses on top. Nobody recomputes. That it is the same model is shown on a small one first: losses
from the same weights.

Where 16 layers do not fit, fewer are taken, for all that are compared, and the result says how many. The models do not
fit beside each other, so that ours is measured before and after a peer; a ratio has a 95% interval over steps. MFU
counts no recomputation; its peak is the vendor's dense figure (``moetrain/telemetry/hardware.py``). CUDA events, median
of 10 steps after 2. The first step, in which kernels are compiled and tuned, is given by itself.
"""

import importlib
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceilings
import phases
import torch
from gpu_results import (
    FASTEST,
    MICRO_BATCHES,
    PEERS_OF_STEP,
    PHASES,
    failed,
    measured,
    model_cell,
    not_measured,
    planned,
    record,
    step_cell,
    versions_here,
)
from gpu_timing import Clock, free, limited, one_line
from intervals import ratio, shown
from peers.steps import WEIGHTS, MasterAdamW, Stepper
from step_place import BATCH, WARMUP, Place, Speed, configured, random_data
from torch import Tensor

from moetrain.config import replace
from moetrain.job import Config
from moetrain.model.flops import flops_per_token, size
from moetrain.parallel import compile
from moetrain.telemetry.hardware import peak_flops
from moetrain.train import Trainer
from moetrain.world import Communication, Device, join

LAYERS = (16, 14, 12, 10, 8, 6, 4)


def put(trainer: Trainer, *, micro_batch: int, deterministic: bool, compiled: bool) -> None:
    t = replace(trainer.cfg.train, micro_batch=micro_batch, deterministic=deterministic, compile=compiled)
    trainer.cfg = replace(trainer.cfg, train=t)
    compile.place(trainer.model, on=compiled)


def cell_of(trainer: Trainer, result: Any, times: list[float], peak_gib: float, first: float, device: Any) -> dict:
    """Of one setting of ours."""
    cfg, seconds = trainer.cfg, statistics.median(times)
    rate = cfg.train.batch * cfg.train.seq_len / seconds
    flops, peak = flops_per_token(cfg.model, seq_len=cfg.train.seq_len), peak_flops(device, torch.bfloat16)
    load_LE = result.load_LE.view(-1, cfg.model.moe.num_choices).double()
    counts = size(cfg.model)
    return measured(
        rate, "tokens/s",
        **({"MFU": f"{rate * flops / peak:.1%} of {peak / 1e12:.4g} TFLOP/s"} if peak else {}),
        **({"peak_memory": f"{peak_gib:.1f} GiB"} if peak_gib else {}),
        step=f"{seconds * 1e3:.4g} ms ({min(times) * 1e3:.4g} to {max(times) * 1e3:.4g})",
        first_step=f"{first:.3g} s",
        batch=f"{cfg.train.batch} x {cfg.train.seq_len} tokens",
        layers=f"{cfg.model.num_layers} of {LAYERS[0]}",
        parameters=f"{counts.total / 1e9:.3g}B, {counts.active / 1e9:.3g}B active",
        flops_a_token=f"{flops / 1e9:.4g} GFLOP",
        max_violation=f"{(load_LE.amax(1) / load_LE.mean(1) - 1).max().item():.2f}",
    ) | {"data": {"seconds": times, "versions": versions_here()}}  # fmt: skip


def ours(place: Place, layers: int, *, keep: bool) -> Speed:
    """Our fastest setting at so many layers; ``keep``: each setting's cell is written, and the phases.

    Raises what torch raises where micro-batches of one do not fit.
    """
    trainer = place.trainer(layers)
    best: Speed | None = None
    tried: list[dict[str, Any]] = []
    full: int | None = None
    cells: dict[str, dict] = {}
    start = place.timer.mark()
    trainer.step()
    first = place.timer.seconds(start, place.timer.mark())

    def attempt(micro_batch: int, *, deterministic: bool, compiled: bool = False) -> None:
        nonlocal best, full
        key = model_cell(micro_batch, deterministic=deterministic) + ", compiled" * compiled
        why = f"{layers} layers with micro-batches of {full} do not fit already" if full else ""
        if full is None or micro_batch < full:
            try:
                trainer.model.zero_grad()
                free()
                put(trainer, micro_batch=micro_batch, deterministic=deterministic, compiled=compiled)
                results: list[Any] = []
                times, peak = place.times(lambda: results.append(trainer.step()), steps=place.steps, warmup=1)
                assert results[-1].loss.isfinite().item(), f"the loss is {results[-1].loss.item()}"
            except torch.OutOfMemoryError:
                if micro_batch == 1 and deterministic:
                    raise
                why = f"{layers} layers: out of memory"
                full = full if compiled else micro_batch
            except Exception as error:
                if not compiled:
                    raise
                why = one_line(error)
            else:
                words = (
                    f"micro-batch {micro_batch}{'' if deterministic else ', order not fixed'}{', compiled' * compiled}"
                )
                tried.append({"setting": words, "seconds": times})
                cells[key] = cell_of(trainer, results[-1], times, peak, first, place.device)
                if best is None or statistics.median(times) < best.seconds:
                    best = Speed(trainer.cfg, words, times, peak, first, tried)
                    cells[FASTEST] = cells[key] | {"details": {"setting": words, **cells[key]["details"]}}
                return
        tried.append({"setting": key, "why": why})
        cells[key] = not_measured(why)

    for micro_batch in MICRO_BATCHES:
        attempt(micro_batch, deterministic=True)
    assert best is not None
    for micro_batch in sorted({1, best.cfg.train.micro_batch}):
        attempt(micro_batch, deterministic=False)
    assert best is not None
    fast = best.cfg.train
    attempt(fast.micro_batch, deterministic=fast.deterministic, compiled=True)
    if keep:
        for key in cells:
            if key in planned():
                save(place, key, cells[key])
        by_phase(place, trainer, best)
    return best


def again(place: Place, layers: int, speed: Speed) -> list[float]:
    """Ours after a peer: whether the machine is as it was."""
    trainer = place.trainer(layers)
    t = speed.cfg.train
    put(trainer, micro_batch=t.micro_batch, deterministic=t.deterministic, compiled=t.compile)
    return place.times(trainer.step, steps=place.steps, warmup=WARMUP)[0]


def by_phase(place: Place, trainer: Trainer, best: Speed) -> None:
    t = best.cfg.train
    try:
        put(trainer, micro_batch=t.micro_batch, deterministic=t.deterministic, compiled=t.compile)
        found = phases.seconds(trainer, steps=1 if place.small else 2)
        works = phases.work(trainer, micro_batch=t.micro_batch)
        words = phases.table(found, works, place.tops)
        busy = sum(found.values())
        cell = measured(
            busy * 1e3, "ms of kernels a step", setting=best.setting, step=f"{best.seconds * 1e3:.4g} ms unprofiled",
            ceilings=str(place.tops), **words,
        ) | {"data": {"seconds": found}}  # fmt: skip
    except Exception as error:
        cell = failed(one_line(error))
    save(place, PHASES, cell)


def same_model(place: Place, peer: type[Stepper], *, own: tuple[str, ...]) -> float:
    """How far apart two losses are at most, of ours and theirs from the same small float32 weights, two steps long."""
    more = ("train.dtype=float32", "balance=[]", "optim.warmup=0", "optim.weight_decay=0", *own)
    cfg = configured(place.device.type, place.folder, layers=2, small=True, more=more)
    data = random_data(cfg)
    trainer, theirs = Trainer(cfg, place.world, data), peer(cfg, place.device, weights=WEIGHTS[0])
    theirs.model.float()
    V = cfg.model.vocab_size
    theirs.load({n: p.detach()[:V] if p.shape[0] >= V else p.detach() for n, p in trainer.model.named_parameters()})
    o = cfg.optim
    theirs.optimizer = MasterAdamW(
        [{"params": list(theirs.model.parameters())}], lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=0.0
    )
    apart = [abs(trainer.step().loss.item() - theirs.step(data, i * BATCH).item()) for i in range(2)]
    if max(apart) > 1e-2:
        raise ValueError(f"not the same model: losses differ by {apart}")
    return max(apart)


def search(place: Place, cfg: Config, peer: type[Stepper], weights: str, tried: list[dict[str, Any]]) -> Speed | None:
    """One axis after the other, the best option kept; then the micro-batch. None: nothing ran."""
    data, at = random_data(cfg), {name: options[0] for name, options in peer.axes.items()}
    stepper = peer(cfg, place.device, weights=weights)
    best, first, count = float("inf"), 0.0, 0
    firsts: dict[Any, float] = {}

    def run() -> Tensor:
        nonlocal count
        count += 1
        return stepper.step(data, count * BATCH)

    def attempt(setting: dict[str, Any], option: Any, change: Callable[[], None]) -> float:
        said = {"weights": weights, **setting}
        limit = min(90.0, place.clock.left() - 45)
        if limit < 5:
            tried.append(said | {"why": "no time was left to try"})
            return float("inf")
        try:
            with limited(limit):
                stepper.optimizer.zero_grad()
                free()
                change()
                once = place.times(run, steps=1, warmup=0)[0][0]
                slow = once > 4 * best and setting["compiled"] == "no"  # a first step of what is compiled says nothing
                found = once if slow else place.times(run, steps=2, warmup=0)[0][-1]
            firsts[option] = once
            tried.append(said | {"seconds": found, "first": once})
        except Exception as error:
            found = float("inf")
            tried.append(said | {"why": one_line(error)})
        print(" ", tried[-1], flush=True)
        return found

    axes: dict[str, tuple[Any, ...]] = {**peer.axes, "micro_batch": MICRO_BATCHES}
    at["micro_batch"] = 1  # pyright: ignore[reportArgumentType]
    for axis, options in axes.items():

        def change(option: Any, axis: str = axis) -> None:
            if axis == "micro_batch":
                stepper.micro_batch = option
            else:
                stepper.set(axis, option)

        speeds: dict[Any, float] = {}
        for option in options[:2] if place.small else options:
            known = axis != next(iter(axes)) and option == options[0]  # what the axes before have settled on
            speeds[option] = best if known else attempt(at | {axis: option}, option, lambda o=option: change(o))
        chosen = min(speeds, key=lambda option: speeds[option])
        if speeds[chosen] == float("inf"):
            return None
        best, at[axis], first = speeds[chosen], chosen, firsts.get(chosen, first)
        firsts.clear()
        change(chosen)
    stepper.optimizer.zero_grad()
    free()
    times, peak = place.times(run, steps=place.steps, warmup=1)
    setting = ", ".join(f"{axis} {option}" for axis, option in at.items())
    return Speed(cfg, f"{weights}, {setting}", times, peak, first, tried)


def theirs(place: Place, layers: int, peer: type[Stepper]) -> tuple[Speed | None, list[dict[str, Any]]]:
    """The faster of computing with bf16 weights and under autocast."""
    cfg = configured(place.device.type, place.folder, layers=layers, small=place.small)
    found, tried = [], []
    for weights in WEIGHTS:
        try:
            if (speed := search(place, cfg, peer, weights, tried)) is not None:
                found.append(speed)
        except Exception as error:
            tried.append({"weights": weights, "why": one_line(error)})
            print(" ", tried[-1], flush=True)
        free()
    return min(found, key=lambda speed: speed.seconds, default=None), tried


def beside(place: Place, name: str, fits: int, mine: dict[int, Speed]) -> dict:
    """The cell of a peer: at as many layers as both fit with."""
    try:
        peer = importlib.import_module(f"peers.olmoe_{name}").STEPPER
    except Exception as error:
        return not_measured(f"not compared: {one_line(error)}")
    peer_of_check = type("Checked", (peer,), {"fused_qkv": False})
    apart = same_model(place, peer_of_check, own=("model.qk_norm=head",) if name == "torchtitan" else ())
    free()
    tried: list[dict[str, Any]] = []
    for layers in [n for n in LAYERS if n <= fits] or [fits]:
        print(f"{name} with {layers} layers", flush=True)
        speed, more = theirs(place, layers, peer)
        tried += [{"layers": layers} | one for one in more]
        if speed is None and not any("memory" in one.get("why", "") for one in more):
            break
        if speed is None:
            continue
        if layers not in mine:
            mine[layers] = ours(place, layers, keep=False)
            free()
        own = mine[layers]
        later = again(place, layers, own) if place.clock.left() > 40 else []
        free()
        both = own.times + later
        n = min(len(both), len(speed.times) * 2)
        found = ratio(both[:n], (speed.times * 2)[:n])
        drift = f"{statistics.median(later) / own.seconds:.3f} of before" if later else "not measured again"
        return measured(
            found[0], "times as fast", interval=shown(found), ours=own.said(place.device),
            theirs=speed.said(place.device),
            layers=f"{layers} of {LAYERS[0]}", state="float32 weights and moments in AdamW, both",
            same_model=f"losses of a small one {apart:.1e} apart", ours_afterwards=drift,
        ) | {"data": {"ours": own.times, "ours_afterwards": later, "theirs": speed.times, "tried": tried,
                      "ours_tried": own.tried, "versions": versions_here()}}  # fmt: skip
    whys = "; ".join(f"{one['why']}" for one in tried if "why" in one)
    return not_measured(f"not compared: {whys}"[:400]) | {"data": {"tried": tried}}


def save(place: Place, key: str, cell: dict) -> None:
    print(key, {k: v for k, v in cell.items() if k != "data"}, flush=True)
    record(place.name, {key: cell})


def main(device: torch.device, name: str, *, small: bool) -> int:
    warnings.simplefilter("ignore")  # of other libraries, once a call
    tops = ceilings.measure(device, small=small)
    world = join(
        device=Device(device.type), communication=Communication.auto, timeout=60.0, threads=1 if small else None
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Place(device, name, small, Path(folder), world, Clock(), tops)
        mine, fits = {}, 0
        for layers in (1,) if small else LAYERS:
            try:
                mine[layers] = ours(place, layers, keep=True)
                fits = layers
                break
            except torch.OutOfMemoryError:
                print(f"{layers} layers do not fit", flush=True)
            finally:
                free()
        if not fits:
            record(name, {model_cell(1): failed(f"not even {LAYERS[-1]} layers fit")})
            return 1
        bad, whole = 0, place.clock
        for i, peer in enumerate(PEERS_OF_STEP):
            place.clock = whole.part(len(PEERS_OF_STEP) - i)
            try:
                cell = beside(place, peer, fits, mine)
            except Exception as error:
                bad, cell = 1, failed(one_line(error))
            save(place, step_cell(peer), cell)
            free()
    return bad


if __name__ == "__main__":
    sys.exit(main(torch.device(sys.argv[1]), sys.argv[2], small="--small" in sys.argv))
