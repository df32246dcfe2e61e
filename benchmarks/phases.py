"""Where the time of our training step goes: device seconds by phase, beside what flops and bytes of each allow.

The profiler names every kernel with the operator that launched it. Forward operators are told apart by ranges that are
put around modules and functions here; a backward operator belongs where the forward operator of its sequence number
did. What neither knows (the sum of losses, the copies of batches, embeddings, norms) is "other".
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ceilings
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.model.attention import Attention
from moetrain.model.transformer import Head
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoE
from moetrain.train import Trainer

PHASES = ("attention", "router", "dispatch", "experts", "combine", "loss", "optimizer", "other")
MARK = "phase: "


@contextmanager
def marked(trainer: Trainer) -> Iterator[None]:
    """Ranges around the phases of a trainer's forward and update."""

    def around(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with record_function(MARK + phase):
                return call(*args, **kwargs)

        return inside

    dispatcher = type(trainer.cfg.model.moe.dispatcher)
    with ExitStack() as stack:
        for owner, name, phase in (
            (Attention, "forward", "attention"), (MoE, "_route", "router"), (Experts, "forward", "experts"),
            (Head, "forward", "loss"), (dispatcher, "dispatch", "dispatch"), (dispatcher, "combine", "combine"),
            (Trainer, "_update", "optimizer"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, around(phase, getattr(owner, name))))
        for gate in {type(layer.gate) for layer in trainer.model.moe_layers()}:
            assert issubclass(gate, nn.Module)
            stack.enter_context(mock.patch.object(gate, "forward", around("router", gate.forward)))
        yield


def seconds(trainer: Trainer, *, steps: int) -> dict[str, float]:
    """Phase -> device seconds a step; on a CPU, the operators' own time."""
    cuda = trainer.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with marked(trainer):
        trainer.step()
        with profile(activities=activities) as found:
            for _ in range(steps):
                trainer.step()
            if cuda:
                torch.cuda.synchronize()
    events = [e for e in found.events() or [] if e.device_type == torch.autograd.DeviceType.CPU]
    of: dict[int, str] = {}  # sequence number of a forward operator -> its phase
    for event in events:
        if event.scope != 1 and event.sequence_nr >= 0 and (phase := _range(event)):
            of[event.sequence_nr] = phase
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        own = sum(k.duration for k in event.kernels) if cuda else event.self_cpu_time_total
        if own:
            spent[_range(event) or _of_backward(event, of) or "other"] += own / 1e6 / steps
    return {phase: spent[phase] for phase in PHASES}


def _range(event: Any) -> str | None:
    """The innermost range that an operator lies in."""
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        event = event.cpu_parent
    return None


def _of_backward(event: Any, of: dict[int, str]) -> str | None:
    """The phase of the forward operator whose gradient an operator computes."""
    while event is not None:
        if event.scope == 1 and event.sequence_nr in of:
            return of[event.sequence_nr]
        event = event.cpu_parent
    return None


@dataclass(frozen=True)
class Work:
    """What a step of a phase cannot do without."""

    flops: float
    num_bytes: float


def work(trainer: Trainer, *, micro_batch: int) -> dict[str, Work]:
    """Phase -> flops and bytes of a step, forward and backward: each tensor that a phase is given or gives is read or
    written once, in bf16, its weights once a micro-batch (their gradients are float32); activations of its inside are
    those that a backward needs. Norms, embeddings and residual sums are no phase's.
    """
    m, t = trainer.cfg.model, trainer.cfg.train
    T, L, D, moe = t.batch * t.seq_len, m.num_layers, m.dim, m.moe
    K, F, E, V = moe.router.top_k, moe.hidden, moe.num_experts, m.vocab_size
    q, kv, runs = m.num_heads * m.width_of_heads, m.num_kv_heads * m.width_of_heads, t.batch // micro_batch

    def phase(flops: float, rows: float, weights: float) -> Work:
        """Of numbers in and out a token and layer in one pass; backward reads them, and writes their gradients."""
        return Work(3 * flops * L, L * (2 * rows * T * 3 + weights * runs * (2 + 2 + 8)))

    parameters = sum(p.numel() for p in trainer.model.parameters())
    head = Work(6.0 * T * D * V, 2 * T * (3 * D + 3 * V) + D * V * runs * (2 + 2 + 8))
    return {
        "attention": phase(2 * T * D * (2 * q + 2 * kv) + 2 * T * t.seq_len * q, 2 * D + 2 * q + 2 * kv,
                           D * (2 * q + 2 * kv)),
        "router": phase(2 * T * D * E, D + 4 * E, D * E),
        "dispatch": Work(0, L * 2 * T * 8 * K * 6),  # ids, order and its inverse, counts: the rows move with experts
        "experts": phase(6 * T * K * D * F, 2 * D + 2 * K * F, 3 * D * F * E),
        "combine": Work(0, 0),  # one rank: the sum over a token's rows is the experts' own
        "loss": head,
        "optimizer": Work(0, parameters * 4 * (1 + 7)),  # the norm reads gradients; AdamW reads four, writes three
    }  # fmt: skip


def table(found: dict[str, float], works: dict[str, Work], tops: ceilings.Ceilings) -> dict[str, str]:
    """Phase -> words: time, share, rate, and the roofline's share of it."""
    total, said = sum(found.values()) or 1.0, {}
    for phase, time in found.items():
        words = [f"{time * 1e3:.4g} ms, {time / total:.0%}"]
        if (need := works.get(phase)) and time and (need.flops or need.num_bytes):
            floor = tops.floor(flops=need.flops, num_bytes=need.num_bytes)
            rate = f"{need.flops / time / 1e12:.4g} TFLOP/s, " if need.flops else ""
            words.append(f"{rate}{need.num_bytes / time / 1e12:.3g} TB/s, {floor / time:.0%} of the roofline")
        said[phase] = "; ".join(words)
    return said
