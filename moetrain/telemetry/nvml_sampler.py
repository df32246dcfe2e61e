"""A thread that reads the counters of this rank's GPU; at a logging step, what they were since the last one.

No collective of its own: the joules travel in the all-reduce that a logging step has anyway. Without a GPU: nothing.
"""

import logging
import time
from statistics import fmean
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor

from moetrain.telemetry.nvml import AbsentError, Card, card_of, reasons
from moetrain.world import World

_MEANS = (
    "utilization", "memory_busy", "watts", "sm_mhz", "memory_mhz", "pcie_sent", "pcie_received", "nvlink_sent",
    "nvlink_received",
)  # fmt: skip
_MOST = ("memory_used", "watts", "celsius")
_COUNTERS = ("nvlink_sent", "nvlink_received")
"""Bytes so far, of which a rate is made."""


class NvmlSampler:
    def __init__(self, world: World, *, every: float, log: logging.Logger) -> None:
        """``every``: seconds between looks; 0: none."""
        self.world, self.every = world, every
        self.on = every > 0 and world.device.type == "cuda"  # the same on every rank
        self._card: Card | None = None
        self._closed, self._lock = Event(), Lock()
        self._samples: list[dict[str, float | None]] = []  # since the last logging step
        self._last: tuple[float, dict[str, float | None]] | None = None  # sample and its time
        self._watts = 0.0  # of late, by the counter of energy
        self._told: float | None = None  # J on the counter that have been told
        self._of_all = (0.0, 0)
        if not self.on:
            return
        try:
            self._card = card_of(world.device)
        except AbsentError as why:
            log.info(f"no counters of this rank's GPU: {why}")
            return
        Thread(target=self._run, name="nvml", daemon=True).start()

    def _run(self) -> None:
        while not self._closed.is_set():
            self.look()
            self._closed.wait(self.every)

    def look(self) -> None:
        """One sample of the card."""
        assert self._card is not None
        found, now = self._card.sample(), time.monotonic()
        with self._lock:
            since, before = self._last or (now, found)
            self._last = now, found
            joules, was = found["joules"], before["joules"]
            if joules is not None:
                self._told = joules if self._told is None else self._told
                spent = 0.0 if was is None else joules - was
                self._watts = spent / (now - since) if spent > 0 else found["watts"] or 0.0
            self._samples.append(found | {name: _rate(before[name], found[name], now - since) for name in _COUNTERS})

    def part(self, like: Tensor) -> Tensor:
        """(2,) whose sum over ranks is for ``read``: joules since the last time, ranks that know theirs."""
        if not self.on:
            return like.new_zeros(0)
        joules = self._joules()
        known = torch.full((1,), float(joules is not None), dtype=like.dtype, device=like.device)  # no copy, no sync
        return torch.cat([torch.full_like(known, (joules or 0.0) / self._sharing()), known])

    def _joules(self) -> float | None:
        """Since the last time: from the last sample on at the power of late, made good by the samples that come."""
        with self._lock:
            told = self._told
            if self._last is None or told is None or (joules := self._last[1]["joules"]) is None:
                return None
            self._told = max(told, joules + self._watts * (time.monotonic() - self._last[0]))
            return self._told - told

    def _sharing(self) -> int:
        """How many of this node's ranks use this rank's GPU, of which each tells its part."""
        gpus, w = torch.cuda.device_count(), self.world
        return sum(r % gpus == w.local_rank % gpus for r in range(w.local_size)) if gpus else 1

    def read(self, of_all: list[float]) -> None:
        if of_all:
            self._of_all = of_all[0], round(of_all[1])

    def record(self, *, tokens: int) -> dict[str, Any]:
        """For metrics.jsonl: ``gpu``, of this rank's, where it was looked at since; ``energy`` of all ranks."""
        (joules, known), ranks = self._of_all, self.world.size
        found: dict[str, Any] = {}
        with self._lock:
            samples, self._samples = self._samples, []
        if samples:
            found["gpu"] = summary(samples)
        if known:
            joules *= ranks / known
            found["energy"] = {"joules": joules, "joules_per_token": joules / tokens, "ranks": known}
            if known < ranks:
                found["energy"]["estimated"] = True
        return found

    def close(self) -> None:
        self._closed.set()


def _rate(before: float | None, now: float | None, seconds: float) -> float | None:
    if before is None or now is None or seconds <= 0 or now < before:
        return None
    return (now - before) / seconds


def summary(samples: list[dict[str, float | None]]) -> dict[str, Any]:
    """Means and maxima of what was counted, and of each reason for lower clocks the share of samples that had it."""
    columns = {name: [x for s in samples if (x := s[name]) is not None] for name in samples[0]}
    found: dict[str, Any] = {"samples": len(samples)}
    found |= {name: round(fmean(columns[name]), 4) for name in _MEANS if columns[name]}
    found |= {f"{name}_most": max(columns[name]) for name in _MOST if columns[name]}
    if bits := columns["throttle"]:
        every = [reasons(int(x)) for x in bits]
        whys = sorted({why for some in every for why in some})
        found["throttled"] = {why: sum(why in some for some in every) / len(every) for why in whys}
    return found
