"""The architecture, as a test: a module imports only lower floors, or its own; Hydra has one importer."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "moetrain"
FLOORS = [
    {"caches", "compiling", "config", "logical", "counter", "deferred", "rerun", "signals", "where"},
    {"comm", "launchers", "layouts", "mesh", "world"},
    {"kernels", "moe"},
    {"model"},
    {"parallel", "data", "optim", "checkpoint", "telemetry"},
    {"bad_steps"},
    {"job", "evaluate", "train", "run", "loop", "begin", "resume", "changes", "saving", "stop", "watchdog"}
    | {"origin", "recovery", "first_lines", "norms", "out_of_memory", "steady"},
    {"verify", "memory", "report", "simulate", "cluster", "doctor"},
    {"cli"},
]
APART = FLOORS[4]  # these do not import each other
OPTIONAL = {
    "wandb",
    "tensorboardX",
    "pynvml",
    "transformer_engine",
    "megatron",
    "deepspeed",
    "pyarrow",
    "matplotlib",
    "liger_kernel",
}


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(("moetrain", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        if name not in ("moetrain", "moetrain.__main__"):
            found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "moetrain":
            found |= {f"moetrain.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def test_nobody_imports_upstairs() -> None:
    for name, tree in modules().items():
        mine = name.split(".")[1]
        for other in imports(tree):
            if not other.startswith("moetrain.") or other == "moetrain.__version__":
                continue
            theirs = other.split(".")[1]
            same_room = theirs == mine
            neighbours = floor(theirs) == floor(mine) and not (mine in APART and theirs in APART)
            assert same_room or neighbours or floor(theirs) < floor(mine), f"{name} imports {other}"


def test_hydra_and_optional_libraries_have_one_importer_each() -> None:
    importers: dict[str, list[str]] = {}
    for name, tree in modules().items():
        for package in {other.split(".")[0] for other in imports(tree)}:
            importers.setdefault(package, []).append(name)
    assert importers["hydra"] == ["moetrain.cli.compose"]
    assert all(len(importers.get(package, [])) <= 1 for package in OPTIONAL)


def test_the_model_does_not_know_that_it_is_parallel() -> None:
    for name, tree in modules().items():
        if name.split(".")[1] in ("model", "moe", "kernels"):
            assert not {
                i for i in imports(tree) if i.startswith(("torch.distributed.fsdp", "torch.distributed.tensor"))
            }


def test_files_stay_small_and_say_what_they_are() -> None:
    for path in ROOT.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path
        assert lines[0].startswith('"""'), f"{path}: the first line says what the file is"
