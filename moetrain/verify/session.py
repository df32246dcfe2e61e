"""The order of a verification: the reference, the layout, the choices, once more with choices replayed, the numbers."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from moetrain.config import UserError, replace
from moetrain.job import Config, DType, check
from moetrain.layouts import Layout
from moetrain.parallel.recompute import RecomputeConfig
from moetrain.verify import choices, low
from moetrain.verify.compare import Report, compare
from moetrain.verify.outcome import Outcome
from moetrain.verify.ranks import Job, Ranks

ALONE = Layout(dp=1)
"""One rank: what every layout is compared with, where that rank can hold the model."""


@dataclass(frozen=True)
class Reference:
    """``folder``: its outcome; ``rounded``: that of the same ranks in bfloat16, on the same choices."""

    cfg: Config
    folder: Path
    choices: Path
    rounded: Path | None = None


@dataclass(frozen=True)
class Verdict:
    """``kind``: same, different, failed (an error, a hang, a lost rank) or gap (the model refuses the layout)."""

    layout: Layout
    kind: str
    report: Report | None = None
    error: str = ""


class FailedError(RuntimeError):
    """A reference could not be run: nothing can be compared with it."""


def prepared(cfg: Config) -> Config:
    """``cfg`` for the one step that is compared: at the full learning rate, one thread a rank."""
    return replace(cfg, optim=replace(cfg.optim, warmup=0), train=replace(cfg.train, threads=1))


def in_dtype(cfg: Config, dtype: DType) -> Config:
    """``cfg`` computed in ``dtype``, in which weights are kept then, if it is wider than what they are kept in."""
    kept = cfg.optim.weight_dtype
    if kept is not None and torch.promote_types(kept.torch, dtype.torch) != kept.torch:
        cfg = replace(cfg, optim=replace(cfg.optim, weight_dtype=None))
    return replace(cfg, train=replace(cfg.train, dtype=dtype))


def make_reference(cfg: Config, ranks: Ranks, folder: Path, *, layout: Layout = ALONE) -> Reference:
    """Run the reference of a case, which recomputes and compiles nothing; raises ``FailedError``, or ``UserError``
    where the model refuses its layout."""
    if cfg.model.moe_layers and cfg.model.moe.fp8_tile and cfg.train.dtype is DType.float32:
        raise UserError(
            f"model.moe.fp8_tile={cfg.model.moe.fp8_tile} with train.dtype=float32: a float32 that rounds to the next "
            f"float8 number differs by more than float32's tolerance; compare with --dtype float64 or bfloat16"
        )
    alone = layout.world == 1
    ranks.lead(lambda: _clear(folder))
    cfg = replace(prepared(cfg), layout=layout)
    check(cfg, world=layout.world)
    plain = replace(cfg, recompute=RecomputeConfig(), train=replace(cfg.train, compile=False))
    rounded = None
    if cfg.train.dtype is DType.bfloat16:
        exact = in_dtype(plain, DType.float64)
        _must(ranks.run(Job(exact, folder / "exact", alone)))
        path = ranks.lead(lambda: _keep(folder / "exact"))
        rounded = folder / "rounded"
        _must(ranks.run(Job(choices.replay(plain, path), rounded, alone)))
        return Reference(cfg, folder / "exact", path, rounded)
    _must(ranks.run(Job(plain, folder / "exact", alone)))
    return Reference(cfg, folder / "exact", ranks.lead(lambda: _keep(folder / "exact")))


def verify(layout: Layout, reference: Reference, ranks: Ranks, folder: Path, *, fault: str | None = None) -> Verdict:
    """Run the reference's config under ``layout`` on ``ranks`` and compare."""
    cfg = replace(reference.cfg, layout=layout)
    try:
        check(cfg, world=ranks.size)
        check_comparable(cfg, against=reference.cfg.layout)
    except UserError as e:
        return Verdict(layout, "gap", error=str(e))
    ranks.lead(lambda: _clear(folder))
    if reference.rounded is not None:
        rounded = reference.rounded
        if error := ranks.run(Job(choices.replay(cfg, reference.choices), folder, fault=fault)):
            return Verdict(layout, "failed", error=error)
        return _judged(layout, ranks.lead(lambda: low.compare(folder, rounded, reference.folder)))
    if error := ranks.run(Job(cfg, folder, fault=fault)):
        return Verdict(layout, "failed", error=error)
    free = ranks.lead(lambda: choices.compare(Outcome(folder), Outcome(reference.folder), replayed=False))
    replayed = free.near_ties > 0 and free.wrong is None
    if replayed:
        folder = folder / "replayed"
        if error := ranks.run(Job(choices.replay(cfg, reference.choices), folder, fault=fault)):
            return Verdict(layout, "failed", error=error)
    before = free if replayed else None
    return _judged(layout, ranks.lead(lambda: compare(folder, reference.folder, free=before)))


def check_comparable(cfg: Config, *, against: Layout) -> None:
    """Raise ``UserError`` where the config itself says that its layout is not the run of the other."""
    for found in cfg.model.moe.depends_on_layout if cfg.model.moe_layers else []:
        here, there = (" ".join(f"{axis}={getattr(n, axis)}" for axis in found.axes) for n in (cfg.layout, against))
        if here != there:
            raise UserError(
                f"{found.words}, and {here} is not the run of {there}: compare layouts of the same "
                f"{' and '.join(found.axes)}, or set {found.instead}"
            )


def _judged(layout: Layout, report: Report) -> Verdict:
    return Verdict(layout, "same" if report.same else "different", report)


def _clear(folder: Path) -> None:
    """What an earlier verification left there: committed outcomes are never written over."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _keep(folder: Path) -> Path:
    path = folder / "choices.safetensors"
    choices.keep(Outcome(folder), path)
    return path


def _must(error: str | None) -> None:
    if error is not None:
        raise FailedError(f"the reference could not be run: {error}")
