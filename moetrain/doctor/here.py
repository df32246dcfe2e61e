"""What one process can say by itself, in a few seconds: software, kernels, GPUs, limits, room. Touches no GPU's memory.

A container's health check runs beside training: nothing here makes a CUDA context.
"""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch.cuda import nccl

from moetrain import __version__, kernels
from moetrain.config import UserError
from moetrain.doctor.findings import Finding, Level, bad, ok, size, warning
from moetrain.job import Config, DType
from moetrain.kernels import Kernel
from moetrain.model import flops
from moetrain.telemetry import nvml
from moetrain.world import Device

_SHM = 1 << 30
_NOFILE = 4096


def look(cfg: Config) -> Iterator[Finding]:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch asks the driver, and makes no context
    yield software()
    yield from libraries()
    yield from backends(cfg)
    yield from gpus(cfg)
    yield from limits()
    yield room(cfg)


def versions() -> dict[str, str | None]:
    """Those that have to be the same on every rank, and the driver's."""
    of_nccl = torch.version.cuda and nccl.version()
    try:
        driver = nvml.driver()
    except nvml.AbsentError:
        driver = None
    return {
        "python": platform.python_version(), "moetrain": __version__, "torch": torch.__version__,
        "CUDA": torch.version.cuda, "NCCL": ".".join(map(str, of_nccl)) if isinstance(of_nccl, tuple) else None,
        "driver": driver,
    }  # fmt: skip


def software() -> Finding:
    found = versions()
    return ok("software", ", ".join(f"{name} {version or 'none'}" for name, version in found.items()), found)


def libraries() -> Iterator[Finding]:
    """moetrain's requirements, by what pip has noted: nothing is imported."""
    try:
        noted = importlib.metadata.requires("moetrain") or []
    except importlib.metadata.PackageNotFoundError:
        yield warning(
            "libraries", "moetrain is not installed (pip install -e .), so what it requires here is not known"
        )
        return
    wrong, there, absent, data = [], [], [], {}
    for requirement in map(Requirement, noted):
        extras = re.findall(r"extra == ['\"](\w+)['\"]", str(requirement.marker or ""))
        version = _version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        data[requirement.name] = {"version": version, "wanted": str(requirement.specifier), "extra": (*extras, None)[0]}
        if version is None:
            (absent if extras else wrong).append(f"{requirement.name} ({extras[0]})" if extras else requirement.name)
        elif not fits:
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
        elif extras and "dev" not in extras:
            there.append(f"{requirement.name} {version} ({extras[0]})")
    required = [name for name, it in data.items() if it["extra"] is None]
    if wrong:
        yield bad("libraries", f"missing, or of another version: {'; '.join(wrong)}", data)
    else:
        yield ok("libraries", f"all {len(required)} that are required, in the versions that are wanted", data)
    yield ok("optional", f"found {', '.join(there) or 'none'}; not found {', '.join(absent) or 'none'}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def backends(cfg: Config) -> Iterator[Finding]:
    """Of the experts' kernels, for each dtype: which one would run, and why not the others."""
    if not cfg.model.moe_layers:
        return
    moe = cfg.model.moe
    for name in (DType.bfloat16, DType.float32):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = {
            "device": device,
            "dtype": name.torch,
            "dim": cfg.model.dim,
            "hidden": -(-moe.hidden // cfg.layout.etp),
            "fp8_tile": moe.fp8_tile,
        }
        _, words = kernels.choose(Kernel.auto, **sizes)
        others: dict[str, str] = {}
        for kernel in Kernel:
            if kernel is not Kernel.auto and kernel.value != words.partition(":")[0]:
                try:
                    kernels.choose(kernel, **sizes)
                    others[kernel.value] = f"would, if asked for (model.moe.kernel={kernel.value})"
                except UserError as error:
                    others[kernel.value] = f"cannot: {error}"
        rest = "".join(f"; {kernel} {why}" for kernel, why in others.items())
        yield ok(f"kernel, {name.value}", words + rest, {"chosen": words, "others": others})


def gpus(cfg: Config) -> Iterator[Finding]:
    """What the driver says of each card, and whether torch sees them."""
    try:
        cards = list(nvml.cards())
    except nvml.AbsentError as why:
        seen = torch.cuda.device_count()
        words = f"torch sees {seen} GPU(s); no counters of them: {why}" if seen else f"none: {why}"
        yield (warning if seen else ok)("GPU", words)
    else:
        for i, card in enumerate(cards):
            yield bad(f"GPU {i}", str(card)) if isinstance(card, nvml.AbsentError) else gpu(i, card)
        if cards and not torch.cuda.device_count():
            why = f"a build for {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            also = "" if hidden is None else f", CUDA_VISIBLE_DEVICES={hidden!r}"
            yield warning("torch", f"sees none of the {len(cards)} GPUs: torch {torch.__version__} is {why}{also}")
    if cfg.train.device is Device.cuda and not torch.cuda.is_available():
        yield bad("train.device", "cuda, and torch sees no GPU here: install a CUDA build, or train.device=cpu")


def gpu(number: int, card: nvml.Card) -> Finding:
    """One card: where it is damaged or hot, that; else its numbers."""
    s = card.status()
    errors, heat, limit = s["ecc_errors"], s["celsius"], s["celsius_slowdown"]
    throttles = s["throttled_by"] or []
    wrong, doubtful = [], []
    if s["lost"]:
        wrong.append("the driver has lost it (fallen off the bus): restart the node")
    if errors["uncorrected"]:
        wrong.append(f"{errors['uncorrected']} uncorrected ECC errors since the driver was loaded: reset or replace it")
    if s["rows_failed"]:
        wrong.append("a bad row of its memory could not be remapped: replace it")
    if heat is not None and limit is not None and heat >= limit:
        wrong.append(f"at {heat} C, {limit} C is where it slows down")
    elif heat is not None and limit is not None and heat >= limit - 5:
        doubtful.append(f"at {heat} C, {limit - heat} below where it slows down")
    if hard := [why for why in throttles if why in nvml.HARDWARE]:
        wrong.append(f"slowed down by {', '.join(hard)}")
    if "heat" in throttles:
        doubtful.append("slowed down by heat")
    if s["rows_pending"]:
        doubtful.append("rows of its memory wait for a reset to be remapped")
    if s["nvlinks_up"] and s["nvlinks_down"]:
        doubtful.append(f"NVLink {', '.join(map(str, s['nvlinks_down']))} of {_links(s)} down")
    link = s["pcie_link"]
    if link["width"] is not None and link["width_most"] is not None and link["width"] < link["width_most"]:
        doubtful.append(f"PCIe x{link['width']} of x{link['width_most']}")
    level = Level.bad if wrong else Level.warning if doubtful else Level.ok
    return Finding(level, f"GPU {number}", "; ".join([f"{card.name}", *wrong, *doubtful, _numbers(s)]), s)


def _links(s: dict[str, Any]) -> int:
    return s["nvlinks_up"] + len(s["nvlinks_down"])


def _numbers(s: dict[str, Any]) -> str:
    """What is known, in the words of a line."""
    known = [
        (s["celsius"], lambda x: f"{x} C"),
        (s["sm_mhz"], lambda x: f"{x} of {s['sm_mhz_most'] or '?'} MHz"),
        (s["watts"], lambda x: f"{x:.0f} W"),
        (s["memory_used"], lambda x: f"{size(x)} of {size(s['memory_total'])} used"),
        (s["ecc"], lambda x: f"ECC {'on' if x else 'off'}, {s['ecc_errors']['corrected']} corrected"),
        (s["nvlinks_up"], lambda x: f"NVLink {x} of {_links(s)} up"),
        (s["throttled_by"], lambda x: f"clocks held by {', '.join(x)}" if x else "not throttled"),
    ]
    return ", ".join(words(x) for x, words in known if x is not None)


def limits() -> Iterator[Finding]:
    cuda = torch.cuda.device_count() > 0
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    few = 0 <= files < _NOFILE
    yield (warning if few else ok)(
        "open files", f"{_limit(files)}{f': at least {_NOFILE} for many ranks (ulimit -n)' if few else ''}", files
    )
    fabric = Path("/sys/class/infiniband")
    rdma = fabric.is_dir() and any(fabric.iterdir())
    short = rdma and locked != resource.RLIM_INFINITY
    more = ": InfiniBand needs it unlimited (ulimit -l)" if short else "" if rdma else " (no InfiniBand here)"
    yield (warning if short else ok)("locked memory", _limit(locked) + more, locked)
    shm = Path("/dev/shm")
    if shm.is_dir():
        total = shutil.disk_usage(shm).total
        small = cuda and total < _SHM
        words = f"{size(total)}{': NCCL needs more between the GPUs of a node (docker run --shm-size=16g)' * small}"
        yield (warning if small else ok)("/dev/shm", words, total)


def _limit(n: int) -> str:
    return "unlimited" if n == resource.RLIM_INFINITY else f"{n:,}"


def room(cfg: Config) -> Finding:
    """Of the folder that runs are written to, or where it is to be made."""
    place = Path(cfg.run.dir).expanduser().absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return bad("run.dir", f"{place} cannot be written: set run.dir to a folder that can")
    kept = cfg.optim.weight_dtype.torch if cfg.optim.weight_dtype else torch.float32
    each = kept.itemsize + 2 * cfg.optim.dtype_of_state(kept).itemsize  # Adam's averages
    free, wanted = shutil.disk_usage(there).free, each * flops.size(cfg.model).total
    words = f"{place}: {size(free)} free, a checkpoint takes some {size(wanted)}"
    return (ok if free > 2 * wanted else warning)("run.dir", words, {"free": free, "checkpoint": wanted})
