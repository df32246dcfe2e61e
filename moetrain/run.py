"""A whole life of a run on one rank: start or resume, train, log, validate, save, sum up."""

import json
import logging
import math
import sys
import time
import traceback
from typing import Any

import torch
from torch import Tensor

from moetrain import __version__, comm, kernels
from moetrain import config as configs
from moetrain.begin import begin
from moetrain.config import UserError
from moetrain.evaluate import Score, bigram_score
from moetrain.job import Config, open_data
from moetrain.model.flops import flops_per_token, size
from moetrain.model.transformer import ModelConfig
from moetrain.telemetry.alerts import Action, Alerts
from moetrain.telemetry.hardware import peak_flops
from moetrain.telemetry.health import Health, Reading
from moetrain.telemetry.load_picture import draw, heat_map
from moetrain.telemetry.load_trace import LoadTrace
from moetrain.telemetry.sinks import Bar, Series, close_log, open_log
from moetrain.train import StepResult, Trainer
from moetrain.world import World


class FailedError(RuntimeError):
    """A rank failed; its log file has the traceback."""


class StoppedError(Exception):
    """An alert ended the run, which has saved a checkpoint and can be continued."""


def run(cfg: Config, world: World) -> None:
    """Collective: every rank calls it.

    Raises ``UserError`` for what the user can mend, ``StoppedError`` where an alert ends the run, else ``FailedError``.
    """
    folder = cfg.run.folder
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        configs.write(cfg, folder / "config.yaml")
    comm.barrier(world.host_group)
    log = open_log(folder, rank=world.rank, quiet=not world.main)
    try:
        _run(cfg, world, log)
    except (UserError, StoppedError) as e:
        _to_file(log, str(e))
        raise
    except Exception as e:
        _to_file(log, traceback.format_exc())
        path = folder / "logs" / f"rank-{world.rank}.log"
        raise FailedError(
            f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]} (traceback in {path})"
        ) from e
    finally:
        close_log(log)


def _to_file(log: logging.Logger, text: str) -> None:
    """To the rank's log file only: the console gets one line from whoever started the rank."""
    log.handlers[0].handle(log.makeRecord("moetrain", logging.ERROR, "", 0, text, (), None))


def _run(cfg: Config, world: World, log: logging.Logger) -> None:
    data = open_data(cfg, log=log.info if world.main else lambda line: None)
    trainer = Trainer(cfg, world, data)
    for line in describe(trainer):
        log.info(line)
    begin(trainer, log)
    last = cfg.train.steps
    if cfg.train.exit_after is not None:
        last = min(last, trainer.steps + cfg.train.exit_after)
    loop = _Loop(trainer, log)
    try:
        while trainer.steps < last and loop.stopped_by is None:
            loop.step()
            if _due(trainer.steps, cfg.train.validate_every) and trainer.steps < cfg.train.steps:
                loop.validate()
            if _due(trainer.steps, cfg.checkpoint.every) or trainer.steps == last or loop.stopped_by:
                loop.save()
        loop.draw()
        if trainer.steps >= cfg.train.steps:
            loop.finish()
        elif loop.stopped_by:
            raise StoppedError(f"stopped and saved at step {trainer.steps}: {loop.stopped_by}")
        else:
            log.info(
                f"left at step {trainer.steps} of {cfg.train.steps} (train.exit_after); the same command continues"
            )
    finally:
        loop.close()


class _Loop:
    """Steps and what is told about them. Looks at the device every ``logging.every`` steps, not between."""

    def __init__(self, trainer: Trainer, log: logging.Logger) -> None:
        cfg = trainer.cfg
        self.trainer, self.cfg, self.log = trainer, cfg, log
        self.main = trainer.world.main
        self.metrics = Series(cfg.run.folder / "metrics.jsonl", resume_at=trainer.steps) if self.main else None
        shown = self.main and cfg.logging.progress
        self.bar = Bar(total=cfg.train.steps, done=trainer.steps, shown=shown)
        self.pending: list[tuple[dict[str, Any], StepResult]] = []
        self.flops = flops_per_token(cfg.model, seq_len=cfg.train.seq_len)
        self.peak = peak_flops(trainer.world.device, trainer.dtype)
        self.terms = list(trainer.cfg.model.moe.terms) if trainer.cfg.model.moe_layers else []
        self.moe_layers = dict(zip(cfg.model.moe_layers, cfg.model.moe_configs, strict=True))
        traced = self.main and cfg.logging.load_trace and bool(self.moe_layers)
        tokens = cfg.train.batch * cfg.train.seq_len
        self.trace = (
            LoadTrace(cfg.run.folder, self.moe_layers, tokens=tokens, resume_at=trainer.steps) if traced else None
        )
        healthy = bool(self.moe_layers) and cfg.health.enabled
        self.health = Health(cfg.health, layers=self.moe_layers, mesh=trainer.mesh) if healthy else None
        self.alerts = Alerts(cfg.health.alerts)
        self.stopped_by: str | None = None  # the alert that ends the run
        self.last: StepResult | None = None
        self.since, self.tokens = time.perf_counter(), 0

    def step(self) -> None:
        trainer = self.trainer
        lr = self.cfg.optim.lr_at(trainer.steps, steps=self.cfg.train.steps)
        before, step = trainer.consumed, trainer.steps + 1
        logged = _due(step, self.cfg.logging.every) or step in (1, self.cfg.train.steps)
        result = trainer.step(watch=logged and self.health is not None)
        if trainer.mover:
            while trainer.mover.news:
                self.log.info(trainer.mover.news.pop(0))
        if self.health:
            self.health.smooth(result.load_LE)
        tokens = (trainer.consumed - before) * self.cfg.train.seq_len
        self.tokens += tokens
        record = {"step": trainer.steps, "consumed": trainer.consumed, "tokens": tokens, "lr": lr}
        self.pending.append((record, result))
        if logged:
            self.flush(self.health)

    def flush(self, health: Health | None = None) -> None:
        """Bring the pending steps' numbers to the host, check them, write them; the ``health`` of the last, if watched.

        One all-reduce of all that ranks know parts of, then one copy to the host.
        """
        if not self.pending:
            return
        summed, norms, reading = self._fetch([result for _, result in self.pending], health)
        seconds = time.perf_counter() - self.since
        records = []
        for (record, _), (loss, dropped, *balance), norm in zip(self.pending, summed, norms, strict=True):
            layer_tokens = record["tokens"] * len(self.cfg.model.moe_layers)
            means = {f"balance/{term}": x / layer_tokens for term, x in zip(self.terms, balance, strict=True)}
            records.append(record | {"loss": loss, "grad_norm": norm} | means | {"dropped": int(dropped)})
        rate = self.tokens / seconds
        records[-1] |= {
            "tokens_per_second": rate,
            "tflops_per_rank": rate * self.flops / self.trainer.world.size / 1e12,
        }
        if self.peak:
            records[-1]["mfu"] = rate * self.flops / self.trainer.world.size / self.peak
        if reading:
            records[-1]["health"] = reading.record()
        if mover := self.trainer.mover:
            records[-1]["planning_ms"] = round(1e3 * mover.planning_seconds, 3)
            if (done := mover.calibrations).syncs:
                ms = round(1e3 * done.seconds, 3)
                records[-1]["calibration"] = {"host_syncs": done.syncs, "ms": ms, "accepted": done.accepted}
                mover.calibrations = type(done)()
        last = records[-1]
        self._check_finite(records, reading)
        if self.metrics:
            self.metrics.write(records)
        if self.trace:
            self.trace.write([r["step"] for r in records], [result.load_LE for _, result in self.pending])
        mfu = f", MFU {last['mfu']:.1%}" if "mfu" in last else ""
        words = f"loss {last['loss']:.4f}, {rate:,.0f} tokens/s{mfu}"
        self.log.info(
            f"step {last['step']}/{self.cfg.train.steps}: {words}, grad norm {norms[-1]:.3f}, lr {last['lr']:.2e}"
        )
        self.bar.update(last["step"], words)
        if reading:
            self._alert(last["step"], reading)
        self.last = self.pending[-1][1]
        self.pending, self.tokens, self.since = [], 0, time.perf_counter()

    def _fetch(
        self, results: list[StepResult], health: Health | None
    ) -> tuple[list[list[float]], list[float], Reading | None]:
        """Each step's (loss, dropped, balance losses) summed over ranks, the gradient norms, the last step's health."""
        columns = [torch.stack([r.loss.double() for r in results])[:, None]]
        columns += [torch.stack([r.dropped.double() for r in results])[:, None]]
        columns += [torch.stack([r.balance_J.double() for r in results])]
        summed = torch.cat(columns, dim=1)
        parts = [summed.flatten(), *([health.part(self.trainer.model.moe_layers())] if health else [])]
        flat = comm.all_reduce_(torch.cat(parts), group=self.trainer.all_ranks)
        told = [flat[: summed.numel()], torch.stack([r.norm.double() for r in results])]
        if health:
            told.append(health.brief(flat[summed.numel() :], results[-1].load_LE).flatten())
        numbers = torch.cat(told).tolist()
        n, width = summed.shape
        rows, rest = _rows(numbers[: n * width], width), numbers[n * width :]
        tokens = self.pending[-1][0]["tokens"]
        return rows, rest[:n], health.read(_rows(rest[n:], health.columns), tokens=tokens) if health else None

    def _check_finite(self, records: list[dict[str, Any]], reading: Reading | None) -> None:
        """The first step with a loss or norm that is not finite ends the run; so do such logits in the last one."""
        logits, last = reading.not_finite if reading else None, records[-1]
        for record in records:
            finite = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
            if finite and not (logits and record is last):
                continue
            later = f" in step {last['step']}" if record is not last else ""
            raise RuntimeError(
                f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}"
                f"{f', {logits}{later}' if logits else ''}: not finite; nothing was saved since the last checkpoint"
            )

    def _alert(self, step: int, reading: Reading) -> None:
        for fired in self.alerts.look(reading.layers):
            if fired.action is Action.stop and step < self.cfg.train.steps:
                self.stopped_by = self.stopped_by or fired.line
            else:
                self.log.warning(f"step {step}: warning: {fired.line}")

    def draw(self) -> None:
        """On a terminal, a picture of the load of late: layers x experts."""
        if self.main and self.health and self.last and self.cfg.logging.heat_map and sys.stdout.isatty():
            self.bar.close()
            print("\n".join(heat_map(self._by_layer(self.health.smooth_LE))), flush=True)

    def validate(self) -> dict[str, Score]:
        self.flush()
        scores = self.trainer.validate()
        for name, score in scores.items():
            self.log.info(f"step {self.trainer.steps}: held out {name}: {score} ({score.tokens:,} tokens)")
            if self.metrics:
                words = {"nats_per_token": score.nats_per_token, "bits_per_byte": score.bits_per_byte}
                self.metrics.write([{"step": self.trainer.steps, "validation": name} | words])
        self.since = time.perf_counter()
        return scores

    def save(self) -> None:
        self.flush()
        start = time.perf_counter()
        folder = self.trainer.save()
        self.log.info(f"saved {folder} in {time.perf_counter() - start:.2f} s")
        self.since = time.perf_counter()

    def finish(self) -> None:
        """The summary of a complete run; of one that was complete already, the summary it left."""
        self.bar.close()
        path = self.cfg.run.folder / "summary.txt"
        if self.last is None and path.exists():
            self.log.info(
                f"already complete at step {self.trainer.steps}: nothing to train; start anew with another run.name"
            )
            self.log.info(path.read_text().rstrip())
            return
        loads = self._by_layer(self.last.load_LE) if self.last else []
        scores = self.validate()
        if self.main:
            lines = self._summary(scores, loads)
            path.write_text("\n".join(lines) + "\n")
            for line in lines:
                self.log.info(line)

    def close(self) -> None:
        self.bar.close()
        for series in (self.metrics, self.trace):
            if series:
                series.close()

    def _by_layer(self, x_LE: Tensor) -> list[tuple[int, list]]:
        """Of each MoE layer its number and the numbers of its experts, on the host."""
        rows = zip(self.moe_layers.items(), x_LE.tolist(), strict=True)
        return [(layer, row[: moe.num_choices]) for (layer, moe), row in rows]

    def _summary(self, scores: dict[str, Score], loads: list[tuple[int, list[int]]]) -> list[str]:
        records = [json.loads(line) for line in (self.cfg.run.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [r for r in records if "loss" in r]
        rates = sorted(r["tokens_per_second"] for r in steps if "tokens_per_second" in r)
        lines = [
            "",
            f"run {self.cfg.run.folder}: {self.trainer.steps} steps, {sum(r['tokens'] for r in steps):,} tokens",
            f"  loss {steps[0]['loss']:.4f} at the start, {steps[-1]['loss']:.4f} at the end; "
            f"{rates[len(rates) // 2]:,.0f} tokens/s (median)",
        ]
        summary: dict[str, Any] = {"steps": self.trainer.steps, "loss": [r["loss"] for r in (steps[0], steps[-1])]}
        for name, score in scores.items():
            corpus, held_out = self.trainer.data.corpora[name], self.trainer.data.validation[name]
            lines.append(f"  held out {name} ({score.tokens:,} tokens, corpus {corpus.fingerprint[:16]}): {score}")
            summary[name] = vars(score) | {"corpus": corpus.fingerprint}
            if self.cfg.train.bigram:
                bigram = bigram_score(corpus, held_out)
                lines.append(f"  a bigram model of all {len(corpus.train):,} training tokens there: {bigram}")
                summary[name]["bigram"] = vars(bigram)
        if loads:
            lines += ["  load per expert, last step (half height = an even share):", *draw(loads)]
        lines.append(f"  checkpoints, metrics.jsonl, config.yaml and logs/ are in {self.cfg.run.folder}")
        (self.cfg.run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return lines


def _layers(cfg: ModelConfig) -> str:
    """The MoE layers in words: how many of which numbers."""
    moes = cfg.moe_configs
    if not moes:
        return "no MoE layer"
    experts, top_k = _span([moe.num_experts for moe in moes]), _span([moe.router.top_k for moe in moes])
    early, extra = cfg.moe.per_layer, cfg.moe.zero_computation
    more = f" ({extra} more, of zero computation)" if str(extra) else ""
    first = f" (before step {early.early_steps}: {early.early_top_k} in the first)" if early.early_steps else ""
    return f"{len(moes)} MoE layers of {experts} experts{more}, top-{top_k}{first}"


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _rows(numbers: list[float], width: int) -> list[list[float]]:
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def describe(trainer: Trainer) -> list[str]:
    """What is about to run, in a few lines."""
    cfg, world = trainer.cfg, trainer.world
    moe = cfg.model.moe
    _, why = kernels.choose(
        moe.kernel, dtype=trainer.dtype, dim=cfg.model.dim, hidden=-(-moe.hidden // trainer.mesh.layout.etp)
    )
    where = f"{world.size} rank(s) on {world.device.type}" + (f" over {world.backend}" if world.backend else "")
    lines = [
        f"moetrain {__version__}, torch {torch.__version__}, {where}, layout {trainer.mesh.layout}",
        f"{size(cfg.model)}; {_layers(cfg.model)}; kernel {why}",
    ]
    if trainer.pipeline:
        sizes = ", ".join(str(len(stage.layers)) for stage in trainer.pipeline.stages)
        lines.append(f"pipeline {cfg.pipeline.schedule}: {len(trainer.pipeline.stages)} stages of {sizes} layers")
    lines += [found.words for found in moe.depends_on_layout if cfg.model.moe_layers]
    for name, corpus in trainer.data.corpora.items():
        lines.append(
            f"corpus {name}: {len(corpus.train):,} training tokens, {len(corpus.valid):,} held out, "
            f"fingerprint {corpus.fingerprint[:16]}"
        )
    return lines
