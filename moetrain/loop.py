"""Steps and what is told about them: numbers, health, alerts, validation, saves, the summary."""

import json
import logging
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from moetrain import comm, where
from moetrain.evaluate import Score, bigram_score
from moetrain.model.flops import flops_per_token
from moetrain.recovery import Recovery
from moetrain.saving import Saver
from moetrain.steady import Garbage
from moetrain.telemetry.alerts import Action, Alerts
from moetrain.telemetry.follow import Follower, close
from moetrain.telemetry.hardware import peak_flops
from moetrain.telemetry.health import Health, Reading
from moetrain.telemetry.line import StepLine
from moetrain.telemetry.load_picture import draw, heat_map
from moetrain.telemetry.load_trace import LoadTrace
from moetrain.telemetry.nvml_sampler import NvmlSampler
from moetrain.telemetry.sinks import Bar, Series, followers
from moetrain.telemetry.skew import Skew
from moetrain.telemetry.trace import Trace
from moetrain.train import StepResult, Trainer


class Loop:
    """Steps and what is told about them. Looks at the device every ``logging.every`` steps, not between."""

    def __init__(self, trainer: Trainer, saver: Saver, log: logging.Logger) -> None:
        cfg = trainer.cfg
        self.trainer, self.saver, self.cfg, self.log = trainer, saver, cfg, log
        self.main = trainer.world.main
        shown = self.main and cfg.logging.progress
        self.bar = Bar(total=cfg.train.steps, done=trainer.steps, shown=shown)
        self.pending: list[tuple[dict[str, Any], StepResult]] = []
        self.flops = flops_per_token(cfg.model, seq_len=cfg.train.seq_len)
        self.peak = peak_flops(trainer.world.device, trainer.dtype)
        self.terms = list(trainer.cfg.model.moe.terms) if trainer.cfg.model.moe_layers else []
        self.moe_layers = dict(zip(cfg.model.moe_layers, cfg.model.moe_configs, strict=True))
        self.metrics: Series | None = None
        self.followers: list[Follower] = []
        self.line = StepLine(total=cfg.train.steps)
        self.trace: LoadTrace | None = None
        self._open()
        healthy = bool(self.moe_layers) and cfg.health.enabled
        self.health = Health(cfg.health, layers=self.moe_layers, mesh=trainer.mesh) if healthy else None
        self.alerts = Alerts(cfg.health.alerts)
        self.recovery, self.skew = Recovery(trainer, log), Skew(trainer.world, warn=cfg.logging.straggler)
        self.garbage = Garbage(cfg.train.gc_every)
        self.profile = Trace(
            cfg.trace, cfg.run.folder, rank=trainer.world.rank, at=trainer.steps, device=trainer.world.device, log=log
        )
        self.nvml = NvmlSampler(trainer.world, every=cfg.logging.nvml_every, log=log)
        self.stopped_by: str | None = None  # the alert that ends the run
        self.asked: str | None = None  # by whom, to end it
        self.last: StepResult | None = None
        self.since, self.tokens = time.perf_counter(), 0
        self.began = trainer.steps

    def _open(self) -> None:
        """The files of numbers, as far as the trainer's step."""
        cfg, at = self.cfg, self.trainer.steps
        self._close()
        if self.main:
            self.metrics = Series(cfg.run.folder / "metrics.jsonl", resume_at=at)
            self.followers = followers(cfg.logging, cfg.run.folder, name=cfg.run.name, log=self.log)
        if self.main and cfg.logging.load_trace and self.moe_layers:
            tokens = cfg.train.batch * cfg.train.seq_len
            self.trace = LoadTrace(cfg.run.folder, self.moe_layers, tokens=tokens, resume_at=at)

    def step(self) -> None:
        trainer, checks = self.trainer, self.cfg.integrity
        lr = self.cfg.optim.lr_at(trainer.steps, steps=self.cfg.train.steps)
        before, step = trainer.consumed, trainer.steps + 1
        logged = due(step, self.cfg.logging.every) or step in (1, self.cfg.train.steps)
        where.at("forward", step=step)
        since = time.perf_counter()
        with self.profile.step(step):
            result = trainer.step(
                watch=logged and self.health is not None, replay=due(step, checks.replay_every),
                norms=logged and self.cfg.logging.norms,
            )  # fmt: skip
        self.garbage.after(step)
        if step == self.began + 1:
            result.loss.item()  # the host waits, this once
            self.log.info(
                f"step {step} took {time.perf_counter() - since:.2f} s: a life's first also compiles and sets up"
            )
        if due(step, checks.hash_every):
            trainer.check_copies()
        self.saver.poll(self.log)
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
        if self.recovery.after(step - 1, before, result):
            self.flush()
            self.saver.finish(self.log)
            self.recovery.go_back()
            self._open()

    def flush(self, health: Health | None = None) -> None:
        """Bring the pending steps' numbers to the host, check them, write them; the ``health`` of the last, if watched.

        One all-reduce of all that ranks know parts of, then one copy to the host.
        """
        if not self.pending:
            return
        seconds = time.perf_counter() - self.since
        summed, norms, bad, more, reading = self._fetch([result for _, result in self.pending], health, seconds)
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
        if more:
            records[-1] |= {"param_norm": math.sqrt(more[0]), "zero_grads": int(more[1])}
        if reading:
            records[-1]["health"] = reading.record()
        if mover := self.trainer.mover:
            records[-1]["planning_ms"] = round(1e3 * mover.planning_seconds, 3)
            if (done := mover.calibrations).syncs:
                ms = round(1e3 * done.seconds, 3)
                records[-1]["calibration"] = {"host_syncs": done.syncs, "ms": ms, "accepted": done.accepted}
                mover.calibrations = type(done)()
        last = records[-1]
        words = self.line.words(records, reading)
        self._check_finite(records, bad, reading)
        for record, skipped in zip(records, bad, strict=True):
            if skipped:  # what is not finite is no JSON
                odd = [k for k, x in record.items() if isinstance(x, float) and not math.isfinite(x)]
                record.update({"skipped": True}, **dict.fromkeys(odd))
        if slow := self.skew.record:
            last["slowest"] = slow
        last |= self.nvml.record(tokens=self.tokens)
        if self.metrics:
            self.metrics.write(records)
        if self.trace:
            self.trace.write([r["step"] for r in records], [result.load_LE for _, result in self.pending])
        self.log.info(f"step {last['step']}/{self.cfg.train.steps}: {words}")
        self.bar.update(last["step"], words)
        if reading:
            self._alert(last["step"], reading)
        if said := self.skew.news():
            self.log.warning(f"step {last['step']}: {said}")
        self.last = self.pending[-1][1]
        self.pending, self.tokens, self.since = [], 0, time.perf_counter()

    def _fetch(
        self, results: list[StepResult], health: Health | None, seconds: float
    ) -> tuple[list[list[float]], list[float], list[bool], list[float], Reading | None]:
        """Each step's (loss, dropped, balance losses) summed over ranks, norm, and whether it was a bad one; the last
        step's sums for ``logging.norms`` and health; to ``skew``, of all that took so many seconds, what ranks waited
        for each other."""
        columns = [torch.stack([r.loss.double() for r in results])[:, None]]
        columns += [torch.stack([r.dropped.double() for r in results])[:, None]]
        columns += [torch.stack([r.balance_J.double() for r in results])]
        summed = torch.cat(columns, dim=1)
        parts = [summed.flatten(), self.skew.part(seconds, steps=len(results), like=summed), self.nvml.part(summed)]
        parts += [summed.new_zeros(0) if (more := results[-1].norms) is None else more]
        parts += [health.part(self.trainer.model.moe_layers()) if health else summed.new_zeros(0)]
        flat = comm.all_reduce_(torch.cat(parts), group=self.trainer.all_ranks)
        of_all, skew, energy, more, of_health = flat.split([len(part) for part in parts])
        bad = [r.verdict.bad.double() if r.verdict else torch.zeros_like(r.norm, dtype=torch.double) for r in results]
        told = [of_all, skew, energy, torch.stack([r.norm.double() for r in results]), torch.stack(bad), more]
        if health:
            told.append(health.brief(of_health, results[-1].load_LE).flatten())
        numbers = iter(torch.cat(told).tolist())
        rows, own, joules, norms, skipped, sums, rest = (
            [next(numbers) for _ in range(len(x))] for x in [*told, *[[]] * (not health)]
        )
        self.skew.read(own)
        self.nvml.read(joules)
        tokens = self.pending[-1][0]["tokens"]
        found = health.read(_rows(rest, health.columns), tokens=tokens) if health else None
        return _rows(rows, summed.shape[1]), norms, [x > 0 for x in skipped], sums, found

    def _check_finite(self, records: list[dict[str, Any]], bad: list[bool], reading: Reading | None) -> None:
        """The first step with a loss or norm that is not finite ends the run, unless it was skipped; so do such logits
        in the last one."""
        logits, last = reading.not_finite if reading else None, records[-1]
        for record, skipped in zip(records, bad, strict=True):
            finite = skipped or (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]))
            if finite and not (logits and record is last and not skipped):
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
        where.at("validating")
        scores = self.trainer.validate()
        for name, score in scores.items():
            self.log.info(f"step {self.trainer.steps}: held out {name}: {score} ({score.tokens:,} tokens)")
            if self.metrics:
                words = {"nats_per_token": score.nats_per_token, "bits_per_byte": score.bits_per_byte}
                self.metrics.write([{"step": self.trainer.steps, "validation": name} | words])
        self.since = time.perf_counter()
        return scores

    def save(self, *, must: bool) -> None:
        """Where it ``must`` be there, nothing goes on before it is."""
        self.flush()
        where.at("saving")
        self.saver.save(*self.trainer.state(), log=self.log)
        if must or not self.cfg.checkpoint.asynchronous:
            self.saver.finish(self.log, must=must)
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
        self.profile.close()
        self.garbage.close()
        self.nvml.close()
        self._close(failing=sys.exc_info()[0] is not None)

    def _close(self, *, failing: bool = False) -> None:
        for series in (self.metrics, self.trace):
            if series:
                series.close()
        self.metrics = self.trace = None
        close(self.followers, patient=not failing)
        self.followers = []

    def _by_layer(self, x_LE: Tensor) -> list[tuple[int, list]]:
        """Of each MoE layer its number and the numbers of its experts, on the host."""
        rows = zip(self.moe_layers.items(), x_LE.tolist(), strict=True)
        return [(layer, row[: moe.num_choices]) for (layer, moe), row in rows]

    def _summary(self, scores: dict[str, Score], loads: list[tuple[int, list[int]]]) -> list[str]:
        records = [json.loads(line) for line in (self.cfg.run.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [r for r in records if "loss" in r and not r.get("skipped")]
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


def _rows(numbers: list[float], width: int) -> list[list[float]]:
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
