"""The results of ``benchmarks/gpu.sh``: one JSON file a device, cell by cell; the table in docs/gpu.md is made of it.

    python benchmarks/gpu_results.py plan nvidia-h200 "NVIDIA H200"    every cell that is missing becomes "not measured"
    python benchmarks/gpu_results.py render                            print the tables and put them into docs/gpu.md

A cell is measured, not measured (with why), or failed (with why); ``data`` is what the tables leave out: every time,
every try, versions. A later run replaces cells one by one; what was once
measured is replaced by a measurement or a failure, never by silence. Standard library only.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- results: made by benchmarks/gpu_results.py render -->", "<!-- end of results -->"
STATUSES = ("measured", "not measured", "failed")
SHAPES = [  # T tokens, D width, F expert width, E experts, K chosen
    (24576, 1536, 256, 128, 8),
    (24576, 1536, 1024, 32, 2),
    (32768, 4096, 256, 256, 16),
    (32768, 4096, 1024, 64, 4),
]
KINDS, WHOLE = ("random", "balanced", "Zipf"), "whole layer"  # routings of the experts alone; gate to sum
DISPATCHERS = ("dropless", "dropless, routing fused", "capacity", "allgather", "hierarchical")
DISPATCH_SHAPES = (SHAPES[0], SHAPES[2])
MICRO_BATCHES = (1, 2, 4, 8)
PEERS_OF_STEP = ("transformers", "torchtitan")
FASTEST, PHASES = "model: olmoe_1b_7b, fastest, order fixed or not", "model: olmoe_1b_7b, phases of a step"

Cell = dict[str, Any]


def named(shape: tuple[int, ...]) -> str:
    return " ".join(f"{name}{n}" for name, n in zip("TDFEK", shape, strict=True)) + ", bf16"


def layer_cell(shape: tuple[int, ...], kind: str) -> str:
    return f"layer: {named(shape)}, {kind}"


def dispatch_cell(shape: tuple[int, ...], dispatcher: str) -> str:
    return f"dispatch: {named(shape)}, {dispatcher}, 1 rank"


def step_cell(peer: str) -> str:
    return f"model: olmoe_1b_7b beside {peer}"


def model_cell(micro_batch: int, *, deterministic: bool = True) -> str:
    return f"model: olmoe_1b_7b, 4096 tokens x {micro_batch}, bf16" + ("" if deterministic else ", order not fixed")


TRAIN_CELLS = ("train: quickstart, 1 rank", "train: quickstart, 2 ranks sharing the GPU over gloo")


def test_cells() -> list[str]:
    """One for each test function of tests/gpu."""
    found = []
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        tree = ast.parse(path.read_text())
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        found += [test_cell(path.stem, name) for name in names]
    return found


def test_cell(module: str, function: str) -> str:
    return f"tests: {module.removeprefix('test_')}: {function.removeprefix('test_').replace('_', ' ')}"


def planned() -> list[str]:
    models = [*map(model_cell, MICRO_BATCHES), model_cell(1, deterministic=False)]
    models += [FASTEST, *map(step_cell, PEERS_OF_STEP), PHASES]
    layers = [layer_cell(shape, kind) for shape in SHAPES for kind in (*KINDS, WHOLE)]
    dispatches = [dispatch_cell(shape, name) for shape in DISPATCH_SHAPES for name in DISPATCHERS]
    return ["versions", *test_cells(), *layers, *dispatches, *models, *TRAIN_CELLS]


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str:
    if given := os.environ.get("GPU_COMMIT"):
        return given
    try:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def versions_here() -> dict[str, str]:
    """Of what a measurement depends on, as far as it is here; for cells whose stage has run alone."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "moetrain", "transformers", "torchtitan", "megatron-core", "transformer-engine"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def measured(value: Any, unit: str = "", **details: Any) -> Cell:
    return {"status": "measured", "value": value, "unit": unit} | ({"details": details} if details else {})


def failed(why: str) -> Cell:
    return {"status": "failed", "why": why}


def not_measured(why: str) -> Cell:
    return {"status": "not measured", "why": why}


def path_of(device: str) -> Path:
    return Path(os.environ.get("GPU_RESULTS_DIR") or FOLDER) / f"{slug(device)}.json"


def read(path: Path, *, device: str) -> dict[str, Any]:
    """The file's results, every planned cell among them; cells of tests that are gone are dropped."""
    known = json.loads(path.read_text()) if path.exists() else {"device": device, "cells": {}}
    missing = not_measured("benchmarks/gpu.sh has not run on this device yet")
    cells = {name: known["cells"].get(name, missing) for name in planned()}
    return known | {"cells": cells}


def record(device: str, cells: dict[str, Cell]) -> None:
    """Put cells into the device's file at once: a stage that is cut short keeps what it has."""
    path = path_of(device)
    results = read(path, device=device)
    for name, cell in cells.items():
        old = results["cells"].get(name, {})
        if cell["status"] == "not measured" and old.get("status") == "measured":
            continue
        if cell["status"] != "not measured":
            cell = cell | {"date": date.today().isoformat(), "commit": commit()}
        results["cells"][name] = cell
    if log := os.environ.get("GPU_RECORDED"):
        with open(log, "a") as file:
            file.writelines(f"{name}\n" for name in cells)
    write(path, results)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        file.write(json.dumps(results, indent=1) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def fail_rest(device: str, stage: str, why: str) -> None:
    """A stage ended badly: its cells that this run did not write have failed with it."""
    recorded = os.environ.get("GPU_RECORDED")
    done = set(Path(recorded).read_text().splitlines()) if recorded and Path(recorded).exists() else set()
    names = [n for n in planned() if n.split(":")[0] == stage and n not in done]
    record(device, {name: failed(why) for name in names})


def table(results: dict[str, Any]) -> str:
    """Markdown: what was measured, what failed, what was not measured and why."""
    lines = [f"### {results['device']}", "", "| what | result | when |", "|---|---|---|"]
    for name, cell in results["cells"].items():
        if cell["status"] == "measured":
            value = cell["value"]
            shown = (
                f"{value:,.4g}"
                if isinstance(value, float) and value < 1000
                else f"{value:,.0f}"
                if isinstance(value, float)
                else str(value)
            )
            details = "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in cell.get("details", {}).items())
            words = f"**{shown} {cell['unit']}**".replace(" **", "**") + (f" ({details})" if details else "")
            when = f"{cell['date']}, {cell['commit']}"
        else:
            words = f"{cell['status']}: {_one_line(cell['why'])}"
            when = f"{cell['date']}, {cell['commit']}" if "date" in cell else ""
        lines.append(f"| {name} | {words} | {when} |")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= 240 else "... " + text[-236:]


def files() -> list[Path]:
    """The results of devices: other benchmarks keep theirs in the same folder."""
    return [p for p in sorted(FOLDER.glob("*.json")) if json.loads(p.read_text()).keys() >= {"device", "cells"}]


def page(text: str) -> str:
    """The page with its tables made anew."""
    head, rest = text.split(BEGIN)
    tables = "\n\n".join(table(json.loads(path.read_text())) for path in files())
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def main(argv: list[str]) -> None:
    if argv[:1] == ["plan"] and len(argv) == 3:
        path = Path(os.environ.get("GPU_RESULTS_DIR") or FOLDER) / f"{argv[1]}.json"
        write(path, read(path, device=argv[2]))
        print(f"{path}: {len(planned())} cells")
    elif argv == ["render"]:
        PAGE.write_text(page(PAGE.read_text()))
        print("\n\n".join(table(json.loads(path.read_text())) for path in files()))
    elif argv[:1] == ["show"] and len(argv) == 2:
        print(table(json.loads(Path(argv[1]).read_text())))
    elif argv[:1] == ["fail"] and len(argv) == 4:
        fail_rest(argv[1], argv[2], argv[3])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
