"""The state of a run on one rank, and one training step. Read ``Trainer.step`` first."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain import __version__, checkpoint, comm, origin, where
from moetrain import config as configs
from moetrain import norms as norms_of
from moetrain.bad_steps import Judge, Verdict
from moetrain.data.skipping import Skipping
from moetrain.evaluate import Rows, Score, evaluate, summed_loss
from moetrain.job import Config, Data, batch_at, check, check_here, checkpoints
from moetrain.logical import Logical
from moetrain.mesh import Mesh
from moetrain.model.init import initialize
from moetrain.model.transformer import Stage
from moetrain.moe.types import Carry
from moetrain.optim import Optimizer, clip_scale, norm_and_sum
from moetrain.parallel import parallelize, state
from moetrain.parallel.context import Part
from moetrain.parallel.data import Units, reshard, set_last_micro_batch
from moetrain.parallel.pipeline import Forward
from moetrain.resume import Start, check_same_data
from moetrain.world import World, allow_fixed_order, fixed_order

_IN_FLIGHT = 4
"""Micro-batches a pipeline rank, of a validation."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device; nobody waits for it until it is logged."""

    loss: Tensor  #      () this rank's share of the step's loss: its token sum over the global count
    norm: Tensor  #      () global gradient norm before clipping
    load_LE: Tensor  #   (MoE layers of the model, E) int64 global assignments; zeros where a layer has fewer experts
    dropped: Tensor  #   () int64 assignments dropped on this rank
    balance_J: Tensor  # (J,) this rank's unscaled balance losses, summed over layers
    verdict: Verdict | None = None  # whether it was a bad step; None: nobody judges
    norms: Tensor | None = None  # (2,) this rank's part of what ``norms.py`` says; None: nobody asked


@dataclass
class Seen:
    """What a step shows to somebody who compares two runs; filled by ``Trainer.step``."""

    ids: list[dict[int, Tensor]] = field(default_factory=list)  #     a micro-batch: layer -> (B, S, K) expert ids
    scores: list[dict[int, Tensor]] = field(default_factory=list)  #  a micro-batch: layer -> (B, S, E) of all experts
    margins: list[dict[int, Tensor]] = field(default_factory=list)  # a micro-batch: layer -> (B, S, E) of the choices
    positions_S: Tensor | None = None  # the positions that S counts on this rank; those past seq_len are padding
    grads: dict[str, Tensor] = field(default_factory=dict)  # name -> local gradient, reduced, before clipping


class CorruptionError(RuntimeError):
    """A rank computes or keeps something else than what it is told to."""


class Trainer:
    """The state of a run on one rank. Nothing about a batch lives on it."""

    def __init__(self, cfg: Config, world: World, data: Data, *, like: Mesh | None = None) -> None:
        """``like``: a mesh of the same ranks, whose groups are used again."""
        self.cfg, self.world, self.data = cfg, world, data
        if cfg.train.deterministic:
            allow_fixed_order(world.device)
        layout = check(cfg, world=world.size)
        check_here(cfg)
        self.mesh = Mesh.build(
            layout, rank=world.rank, world=world.size, device=world.device, timeout=world.limit, like=like
        )  # fmt: skip
        self.part = Part.of(cfg.train.seq_len, self.mesh)
        self.dtype = cfg.train.dtype.torch
        parallel = parallelize(
            cfg.model, self.mesh, sharding=cfg.sharding, context_cfg=cfg.context, stages=cfg.pipeline,
            recompute_cfg=cfg.recompute, dtype=self.dtype, compiled=cfg.train.compile,
        )  # fmt: skip
        self.model, self.plan = parallel.model, parallel.plan
        self.pipeline, self.mover = parallel.pipeline, parallel.mover
        initialize(state.parameters(self.model, self.plan), cfg.model, seed=cfg.seed)
        self.optimizer = Optimizer(
            cfg.optim, {n: state.local(p) for n, p in self.model.named_parameters()}, describe=self.describe,
            group=self.mesh.group("fsdp", "replicate", "shard", "tp"),
        )  # fmt: skip
        self.all_ranks = self.mesh.group("moe", "pp", "edp", "ep", "etp")
        self.steps = self.consumed = 0  # steps done, samples seen
        self.skipped: list[list[int]] = []  # sample ids [first, last + 1) that the run goes on without
        self.samples = Skipping(data.loader, self.skipped)
        self.judge = Judge(cfg.bad_steps, world.device) if cfg.bad_steps.skip else None
        self.changes: list[dict[str, Any]] = []  # of the config, since the run began
        self.life: checkpoint.Life | None = None  # the right to save where others may want to

    def step(
        self, *, seen: Seen | None = None, watch: bool = False, replay: bool = False, norms: bool = False
    ) -> StepResult:
        """One optimizer step. Losses are token sums divided once, here, by global counts; nobody averages again.

        ``watch``: the MoE layers note what router health is made of (``telemetry/health.py``), until the next step.
        ``replay``: forward and backward run twice; raises ``CorruptionError`` where the bits differ. ``norms``: the
        result has its part of them.
        """
        if self.mover:
            self.mover.begin_step(self.steps, self.optimizer)
        run = partial(self.gradients, seen=seen, watch=watch)
        if replay:
            loss, found = origin.twice(self, run)
            if found:
                raise CorruptionError(
                    f"step {self.steps + 1}, run twice, has not the same bits: first in {'; '.join(found)}: a fault of "
                    f"that machine's memory or processor"
                )
        else:
            loss = run()
        result = self._update(loss, seen, norms=norms)
        self.consumed += batch_at(self.cfg.train, self.consumed)
        self.steps += 1
        return result

    def gradients(self, *, seen: Seen | None = None, watch: bool = False) -> Tensor:
        """The forwards and backwards of a step: this rank's share of its loss, gradients accumulated."""
        t, dp = self.cfg.train, self.mesh.layout.dp
        batch = batch_at(t, self.consumed)
        share = batch // dp
        targets = max(1, self.samples.num_targets(self.consumed, batch))  # none: the balance losses still count
        micro_batches = share // t.micro_batch
        for layer in self.model.moe_layers():
            layer.begin_step(micro_batches, watch=watch, pairs=watch and self.cfg.health.pairs)
        if seen is not None:
            seen.ids, seen.scores, seen.margins = ([{} for _ in range(micro_batches)] for _ in range(3))
            seen.positions_S = self.part.position_S

        def forward(m: int, stage: Stage | None, x: Tensor | None, carry: Carry) -> Tensor | tuple[Tensor, Carry]:
            return self.forward(
                m, self.first_sample(m), targets=targets, routed_tokens=float(batch * t.seq_len), seen=seen,
                stage=stage, x=x, carry=carry,
            )  # fmt: skip

        loss = self._pipelined(micro_batches, forward) if self.pipeline else self._accumulated(micro_batches, forward)
        if self.mover:
            self.mover.finish()
        # tp ranks all know the loss of the same targets: one of them has it in its share
        return loss * (self.mesh.index("dense", "tp") == 0)

    def first_sample(self, micro_batch: int) -> int:
        """Of one of this rank's in the next step."""
        share = batch_at(self.cfg.train, self.consumed) // self.mesh.layout.dp
        return self.consumed + self.mesh.index("dense", "dp") * share + micro_batch * self.cfg.train.micro_batch

    def _accumulated(self, micro_batches: int, forward: Forward) -> Tensor:
        """The sum of the micro-batches' losses, one after the other; gradients accumulated."""
        total = torch.zeros((), device=self.world.device, dtype=torch.promote_types(self.dtype, torch.float32))
        for m in range(micro_batches):
            set_last_micro_batch(self.model, m == micro_batches - 1, sharding=self.cfg.sharding)
            if self.mover:
                self.mover.begin_micro_batch(m == micro_batches - 1)
            loss = forward(m, None, None, {})
            assert isinstance(loss, Tensor)
            where.at("backward")
            with self._fixed_order():
                loss.backward()
            total += loss.detach()
        return total

    def _pipelined(self, micro_batches: int, forward: Forward) -> Tensor:
        """The same in the order of a schedule; zero on ranks without the last stage."""
        assert self.pipeline is not None
        units = Units(self.model, sharding=self.cfg.sharding)
        parts = [units, *([self.mover] if self.mover else [])]

        def reshard(stage: Stage) -> None:
            for part in parts:
                part.reshard(stage)

        def reduce(stage: Stage, last: bool) -> None:
            for part in parts:
                part.reduce(stage, last)

        total = self.pipeline.step(
            micro_batches, forward, shape=self._shape, reshard=reshard, reduce=reduce,
            around_backward=self._fixed_order,
        )  # fmt: skip
        units.finish()
        return total

    def _fixed_order(self) -> AbstractContextManager[None]:
        return fixed_order(self.world.device, on=self.cfg.train.deterministic)

    @property
    def _shape(self) -> tuple[int, int]:
        """(B, S) of what a layer passes to the next."""
        return self.cfg.train.micro_batch, len(self.part.position_S)

    def forward(
        self, m: int, first: int, *, targets: int, routed_tokens: float, seen: Seen | None = None,
        stage: Stage | None = None, x: Tensor | None = None, carry: Carry | None = None,
    ) -> Tensor | tuple[Tensor, Carry]:  # fmt: skip
        """Micro-batch m, the samples from ``first`` on: its token sum over ``targets``, or what a ``stage`` passes."""
        where.at("forward", micro_batch=m)
        found = summed_loss(
            self.model, self.samples.batch(first, self.cfg.train.micro_batch), self.part, stage=stage, x=x,
            carry=carry, step=self.steps, micro_batch=m, routed_tokens=routed_tokens, seed=self.cfg.seed,
            ids=None if seen is None else seen.ids[m], scores=None if seen is None else seen.scores[m],
            margins=None if seen is None else seen.margins[m],
        )  # fmt: skip
        return found / targets if isinstance(found, Tensor) else found

    def _update(self, loss: Tensor, seen: Seen | None, *, norms: bool = False) -> StepResult:
        where.at("update")
        grads = state.grads(self.model)
        state.sum_copies_(grads, self.plan)
        if seen is not None:
            seen.grads = {n: g.clone() for n, g in grads.items()}
        optim = self.cfg.optim
        counted = [g for n, g in grads.items() if self.plan[n].counted and not optim.frozen(n)]
        norm, total = norm_and_sum(counted, loss, group=self.all_ranks)
        part = norms_of.part(self.model, self.plan, grads, optim=optim) if norms else None
        verdict = self.judge(total, norm) if self.judge else None
        skip = verdict.bad if verdict else None
        lr = optim.lr_at(self.steps, steps=self.cfg.train.steps)
        self.optimizer.step(grads, lr=lr, scale=clip_scale(norm, clip=optim.clip), skip=skip)
        self.model.zero_grad()
        layers, moe, every = self.model.moe_layers(), self.cfg.model.moe, self.cfg.model.moe_layers
        most = max((x.num_choices for x in self.cfg.model.moe_configs), default=0)
        load_LE = torch.zeros(len(every), most, dtype=torch.int64, device=loss.device)
        loads = {layer: load_LE[every.index(layer.layer), : layer.cfg.num_choices] for layer in layers}
        for layer, load_E in loads.items():
            load_E.copy_(layer.load_ME.sum(0))
        comm.all_reduce_(load_LE, group=self.all_ranks)
        for layer, load_E in loads.items():
            layer.end_step(load_E, step=self.steps, skip=skip)
        if self.mover:
            self.mover.end_step(load_LE, self.steps)
        dropped = sum((x.dropped_ME.sum() for x in layers), torch.zeros_like(load_LE.sum()))
        balance_J = sum((x.losses_MJ.sum(0) for x in layers), loss.new_zeros(len(moe.terms) if every else 0))
        return StepResult(loss, norm, load_LE, dropped, balance_J, verdict, part)

    def check_copies(self) -> None:
        """Collective; raises ``CorruptionError`` where ranks that hold the same tensor do not."""
        if found := origin.copies(self):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise CorruptionError(f"after step {self.steps} copies differ: {'; '.join(found[:3])}{more}")

    def validate(self) -> dict[str, Score]:
        scores = {
            name: evaluate(
                held_out, self.mesh, self._held_out_losses, micro_batch=self.cfg.train.micro_batch,
                together=_IN_FLIGHT * self.mesh.layout.pp if self.pipeline else 1,
            )
            for name, held_out in self.data.validation.items()
        }  # fmt: skip
        reshard(self.model)
        if self.mover:
            self.mover.free()
        return scores

    def _held_out_losses(self, rows: list[Rows]) -> Tensor:
        def forward(m: int, stage: Stage | None, x: Tensor | None, carry: Carry) -> Tensor | tuple[Tensor, Carry]:
            batch, counted = rows[m]
            return summed_loss(
                self.model, batch, self.part, rows=counted, stage=stage, x=x, carry=carry, step=self.steps,
                micro_batch=0, routed_tokens=1.0, training=False,
            )  # fmt: skip

        if self.pipeline:
            return self.pipeline.forwards(len(rows), forward, shape=self._shape)
        losses = [forward(m, None, None, {}) for m in range(len(rows))]
        return torch.stack([x for x in losses if isinstance(x, Tensor)]).sum()

    def tensors(self) -> dict[str, Logical]:
        """Everything a checkpoint holds: this rank's boxes of parameters, buffers and optimizer state."""
        parameters = state.parameters(self.model, self.plan)
        found = {f"model.{n}": x for n, x in (parameters | state.buffers(self.model)).items()}
        for kind, storage in self.optimizer.state().items():
            found |= {f"optim.{kind}.{n}": self.describe(n, x) for n, x in storage.items()}
        return found

    def describe(self, name: str, box: Tensor) -> Logical:
        """Where ``box`` lies, which is storage like that of parameter ``name``."""
        return state.describe(self.model, self.plan, name, box)

    def state(self) -> tuple[dict[str, Logical], dict[str, Any]]:
        """What a checkpoint holds, and what it says."""
        meta = {
            "step": self.steps, "consumed": self.consumed, "data": self.data.loader.fingerprint,
            "updates": self.optimizer.updates, "skipped": [*self.skipped], "changes": self.changes,
            "judge": self.judge.state() if self.judge else {},
            "life": self.life and self.life.number, "ranks": self.world.size, "layout": str(self.mesh.layout),
            "moetrain": __version__, "torch": torch.__version__, "config": configs.dump(self.cfg),
        }  # fmt: skip
        tensors = self.tensors()
        if self.mover:
            tensors |= self.mover.tensors()
            meta["placement"] = self.mover.measured()
        return tensors, meta

    def save(self) -> Path:
        """At once, collective; a run's own saves are those of ``saving.py``."""
        tensors, meta = self.state()
        folder = checkpoint.step_folder(checkpoints(self.cfg), self.steps)
        checkpoint.save(folder, tensors, meta, group=self.world.host_group, life=self.life)
        return folder

    def _placement(self, folder: Path) -> dict[str, Logical]:
        """What placements are decided from, as far as the checkpoint has it; else loads are seen from now on."""
        if self.mover is None:
            return {}
        saved = checkpoint.read_index(folder)
        return {n: x for n, x in self.mover.tensors().items() if saved.get(n) == (x.shape, x.dtype)}

    def load(self, start: Start) -> checkpoint.Report:
        """Begin from a checkpoint, collective. Raises ``UserError`` where it is not this model's, ``DamagedError``."""
        tensors = self.tensors() | self._placement(start.folder)
        if start.weights_only:
            tensors = {n: x for n, x in tensors.items() if n.startswith("model.")}
        if "optim" in start.reset:
            tensors = {n: x for n, x in tensors.items() if not n.startswith("optim.")}
        allowed = self.cfg.run.allow_missing
        report = checkpoint.load(start.folder, tensors, group=self.world.host_group, allow_missing=allowed)
        meta = report.meta
        check_same_data(meta, self.data, start)
        if start.weights_only:
            return report
        self.steps = meta["step"]
        self.consumed = 0 if "data" in start.reset else meta["consumed"]
        self.skipped[:] = [] if "data" in start.reset else meta.get("skipped", [])
        self.changes = list(start.changes)
        self.optimizer.set_steps(0 if "optim" in start.reset else meta.get("updates", self.steps))
        if self.judge:
            self.judge.restore(meta.get("judge", {}))
        if self.mover:
            self.mover.restore(self.steps, self.optimizer, measured=meta.get("placement"))
        return report
