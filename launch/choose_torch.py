"""Which torch to install, or that the one already here is used: the choice, its reason, and what it downloads.

Read by install.py. Runs on a bare Python 3.8; asks the user's own package indexes through pip, and imports torch in a
process of its own only.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYPROJECT = os.path.join(ROOT, "pyproject.toml")
CONSTRAINTS = os.path.join(ROOT, "constraints", "ci.txt")
CPU_HINT = "for the CPU build (about 190 MB) see pytorch.org/get-started and pass its index with PIP_ARGS='...'"

PROBE = """
import json, torch
print(json.dumps([str(torch.__version__), torch.version.cuda, torch.__file__]))
"""


class Stop(Exception):
    """What the user has to change, in one line."""


class Torch(NamedTuple):
    """A torch that an interpreter can import: its version, the CUDA it was built for (or None), its __init__.py."""

    version: str
    cuda: str | None
    file: str

    def __str__(self) -> str:
        return f"{self.version} " + (f"with CUDA {self.cuda}" if self.cuda else "without CUDA")


class Choice(NamedTuple):
    """Where torch comes from: the system's, or the requirement that pip is given; and the lines that say so."""

    system: bool
    requirement: str
    lines: list[str]


# ---- what is here ----------------------------------------------------------------------------------------------------


def torch_range() -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the first unsupported (major, minor) of torch, read from pyproject.toml."""
    with open(PYPROJECT, encoding="utf-8") as file:
        match = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', file.read())
    assert match, "pyproject.toml states torch's range as torch>=A.B,<C.D"
    a, b, c, d = map(int, match.groups())
    return (a, b), (c, d)


def range_text() -> str:
    (a, b), (c, d) = torch_range()
    return f"{a}.{b} to {c}.{d - 1}"


def in_range(version: str) -> bool:
    """Compares (major, minor) only: NVIDIA's 2.12.0a0+... is a 2.12 to us, though a pre-release of it to pip."""
    low, high = torch_range()
    match = re.match(r"(\d+)\.(\d+)", version)
    return bool(match) and low <= (int(match.group(1)), int(match.group(2))) < high


def importable_torch(python: str) -> Torch | None:
    """The torch that `python` imports from an empty folder; None if it has none, or one that fails to import."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [python, "-c", PROBE], cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
            )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return Torch(*json.loads(lines[-1])) if done.returncode == 0 and lines else None


def has_nvidia_gpu() -> bool:
    return bool(shutil.which("nvidia-smi") or glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/nvidiactl"))


def pip_arguments() -> list[str]:
    return shlex.split(os.environ.get("PIP_ARGS", ""))


def pip_environment(*, isolated: bool, say=print) -> dict[str, str]:
    """The user's environment, minus constraints that pin another torch (NVIDIA's containers) if we install our own."""
    env = {k: v for k, v in os.environ.items() if k not in ("PIP_ARGS", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")}
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    for name in env.get("PIP_CONSTRAINT", "").split() if isolated else ():
        with contextlib.suppress(OSError), open(name, encoding="utf-8") as file:
            if re.search(r"(?im)^torch\s*([=@<>!~]|$)", file.read()):
                say(f"torch: PIP_CONSTRAINT ({name}) pins the system's torch and is ignored in this environment")
                del env["PIP_CONSTRAINT"]
                break
    return env


def listed_builds(python: str) -> list[str] | None:
    """The torch versions that the user's own indexes offer to `python`, oldest first; None if pip cannot say.

    Asking for a version that cannot exist makes pip answer with all that do, and download nothing.
    """
    command = [python, "-m", "pip", "install", "--dry-run", "--no-deps", "--retries", "1", *pip_arguments()]
    env = {**pip_environment(isolated=True, say=lambda line: None), "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    try:
        done = subprocess.run(
            [*command, "torch==0+none"], env=env, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\(from versions: ([^)]*)\)", done.stderr + done.stdout)
    return None if match is None else [v for v in match.group(1).split(", ") if v != "none"]


# ---- the choice ------------------------------------------------------------------------------------------------------


def pinned_torch() -> str:
    """The torch version that CI ran, or '' if the constraints name none."""
    try:
        with open(CONSTRAINTS, encoding="utf-8") as file:
            match = re.search(r"(?m)^torch==([\d.]+)", file.read())
    except OSError:
        return ""
    return match.group(1) if match else ""


def use_system(option: str, system: Torch | None) -> tuple[bool, list[str]]:
    """Whether the system's torch is the one to use, and why not if there is one that is not.

    Raises Stop if it was asked for (option == "system") and does not fit.
    """
    fits = system is not None and in_range(system.version)
    if option == "system" and not fits:
        found = f"this Python's torch is {system}" if system else "this Python cannot import torch"
        raise Stop(
            f"TORCH=system, but {found} ({sys.executable}); moetrain needs torch {range_text()}. "
            "Install one there, name another interpreter with PYTHON=..., or leave TORCH=system out."
        )
    if option == "system" or (option == "auto" and fits and system is not None and system.cuda):
        return True, []
    if system is None or option != "auto":
        return False, []
    if fits:
        return False, [
            f"torch: the system's {system.version} has no CUDA, so it is not used (TORCH=system would use it)"
        ]
    return False, [f"torch: the system's {system.version} is outside {range_text()}, so it is not used"]


def choose_build(option: str, gpu: bool, listed: list[str] | None, platform: str = sys.platform) -> tuple[str, str]:
    """What pip is asked for in an isolated environment, and the line that says it: CI's version if it is listed, else
    the newest stable one; its CPU build where there is no GPU (the registry's default brings gigabytes of CUDA)."""
    low, high = torch_range()
    plain = f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    if listed is None:
        return plain, f"torch: {plain[5:]} will be installed (the indexes could not be listed, so the size is unknown)"
    fitting = [v for v in listed if in_range(v) and re.fullmatch(r"[\d.]+(\+\w+)?", v)]
    if not fitting:
        raise Stop(
            f"no torch {range_text()} for Python {sys.version_info[0]}.{sys.version_info[1]} in the configured package "
            "indexes: use Python 3.11 or 3.12 (PYTHON=python3.12), check the network, or pass an index in PIP_ARGS."
        )
    pinned = pinned_torch()

    def best(builds: list[str]) -> str:
        return max(builds, key=lambda v: (v.split("+")[0] == pinned, [int(n) for n in v.split("+")[0].split(".")], v))

    cpu = [v for v in fitting if v.endswith("+cpu")]
    others = [v for v in fitting if re.search(r"\+cu\d+$|^[^+]+$", v)] or [v for v in fitting if v not in cpu]
    reason = f"TORCH={option}" if option in ("cpu", "cuda") else f"{'an' if gpu else 'no'} NVIDIA GPU found"
    if platform != "linux":
        version = best(others or cpu)
        return f"torch=={version}", f"torch: {version} will be installed (about 100 MB)"
    if option != "cpu" and (gpu or option == "cuda"):
        if not others:
            version = best(cpu)
            return f"torch=={version}", (
                f"torch: {version} will be installed ({reason}, but the configured indexes hold CPU builds only: "
                "training will NOT use the GPU; pass an index that has CUDA builds in PIP_ARGS)"
            )
        version = best(others)
        exclude = f",!={version}+cpu" if f"{version}+cpu" in cpu else ""
        return f"torch=={version}{exclude}", (
            f"torch: {version} will be installed ({reason}; about 3 GB with the CUDA libraries)"
        )
    if cpu:
        version = best(cpu)
        return f"torch=={version}", f"torch: {version} will be installed ({reason}; about 190 MB)"
    version = best(others)
    return f"torch=={version}", (
        f"torch: {version} will be installed ({reason}, but the configured indexes hold no CPU build: about 3 GB, "
        f"most of it CUDA libraries that stay unused; {CPU_HINT})"
    )
