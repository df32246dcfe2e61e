"""The stages of ``benchmarks/gpu.sh`` that are no benchmark of their own: versions, tests, train; and the device."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from gpu_results import ROOT, TRAIN_CELLS, failed, measured, not_measured, record, test_cell

NEEDED = {
    "torch": "torch", "hydra": "hydra-core", "omegaconf": "omegaconf", "numpy": "numpy", "yaml": "pyyaml",
    "rich": "rich", "safetensors": "safetensors", "tokenizers": "tokenizers", "pytest": "pytest",
}  # fmt: skip


def device_name(device: str) -> str:
    """What the results are filed under; exits where a GPU is asked for and there is none."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; benchmarks/gpu.sh --device cpu --small tries the scripts without one")
    return torch.cuda.get_device_name(0)


def versions(device: str, name: str) -> None:
    found, missing = {"python": sys.version.split()[0]}, []
    for module, package in NEEDED.items():
        try:
            found[package] = getattr(importlib.import_module(module), "__version__", "there")
        except ImportError:
            missing.append(package)
    for key, version in found.items():
        print(f"{key:12} {version}")
    if missing:
        print(
            f"missing: {' '.join(missing)}\n"
            f"Where this machine has a network: pip install {' '.join(missing)}\n"
            f"Where it has none, on a machine that has one: pip download --only-binary=:all: -d wheels "
            f"--python-version {sys.version_info[0]}.{sys.version_info[1]} --platform manylinux2014_x86_64 "
            f"{' '.join(missing)}\n"
            f"then here: WHEELS=wheels benchmarks/gpu.sh"
        )
        record(name, {"versions": failed(f"missing: {', '.join(missing)}")})
        sys.exit(1)
    import torch

    found |= {"cuda": torch.version.cuda or "none"}
    if device != "cpu":
        capability = torch.cuda.get_device_capability(0)
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found |= {
            "gpus": torch.cuda.device_count(),
            "capability": "{}.{}".format(*capability),
            "memory_GiB": f"{memory:.0f}",
        }
        nccl = torch.cuda.nccl.version()
        found |= {"nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else nccl}
    record(name, {"versions": measured(f"torch {torch.__version__}", **found)})


def tests(device: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        env = os.environ | {"MOETRAIN_GPU_TESTS": "cpu" if device == "cpu" else "cuda"}
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rs", "--durations=8", f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for case in ET.parse(report).iter("testcase"):
            cell = test_cell(case.get("classname", "").rpartition(".")[2], case.get("name", "").partition("[")[0])
            outcome, why = "passed", ""
            for kind in ("failure", "error", "skipped"):
                if (child := case.find(kind)) is not None:
                    outcome = "skipped" if kind == "skipped" else "failed"
                    why = f"{case.get('name')}: {child.get('message') or child.text or ''}"
            found[cell].append((outcome, why))
    cells = {}
    for cell, outcomes in found.items():
        whys = {kind: [why for outcome, why in outcomes if outcome == kind] for kind in ("passed", "skipped", "failed")}
        passed, total = len(whys["passed"]), len(outcomes)
        skipped = {"skipped": f"{len(whys['skipped'])}: {whys['skipped'][0]}"} if whys["skipped"] else {}
        if whys["failed"]:
            cells[cell] = failed(f"{len(whys['failed'])} of {total}: {whys['failed'][0][:600]}")
        elif passed == 0:
            cells[cell] = not_measured(f"skipped: {whys['skipped'][0]}")
        else:
            cells[cell] = measured(f"{passed} of {total} passed", **skipped)
    record(name, cells)
    sys.exit(code)


def train(device: str, name: str, *, small: bool) -> None:
    bad = 0
    for cell, layout in zip(
        TRAIN_CELLS, ({"layout.dp": 1, "layout.ep": 1}, {"layout.dp": 2, "layout.ep": 2}), strict=True
    ):
        with tempfile.TemporaryDirectory() as runs:
            words = [f"{k}={v}" for k, v in layout.items()]
            if small:
                words += ["train.steps=4", "optim.warmup=1", "train.validate_samples=8", "train.bigram=false"]
            if device == "cpu":
                words += ["train.device=cpu"]
            run = [f"run.dir={runs}", "run.name=quickstart", "logging.progress=false"]
            command = [sys.executable, "-m", "moetrain", "train", "experiment=quickstart", *words, *run]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            seconds = time.perf_counter() - start
            print(done.stdout, flush=True)
            if done.returncode:
                bad = 1
                record(name, {cell: failed(" / ".join(done.stdout.strip().splitlines()[-4:]))})
                continue
            folder = Path(runs) / "quickstart"
            summary = json.loads((folder / "summary.json").read_text())
            steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            rates = sorted(r["tokens_per_second"] for r in steps if "tokens_per_second" in r)
            held_out = {k: f"{v['bits_per_byte']:.4f} bits/byte" for k, v in summary.items() if isinstance(v, dict)}
            first, last = summary["loss"]
            details = {
                "steps": summary["steps"],
                "loss": f"{first:.4f} -> {last:.4f}",
                **held_out,
                "wall": f"{seconds:.0f} s",
            }
            record(name, {cell: measured(rates[len(rates) // 2], "tokens/s", **details)})
    sys.exit(bad)


if __name__ == "__main__":
    stage, where, *rest = sys.argv[1:]
    if stage == "device":
        print(device_name(where))
    elif stage == "versions":
        versions(where, rest[0])
    elif stage == "tests":
        tests(where, rest[0])
    elif stage == "train":
        train(where, rest[0], small="--small" in rest)
