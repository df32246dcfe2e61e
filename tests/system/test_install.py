"""The installer's choice of torch, run for real: a real interpreter, fake torches to import, a fake package index.

Nothing is downloaded or installed: every run is a dry run, a refusal, or one that finds its stamp.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "install.py"
sys.path.insert(0, str(SCRIPT.parent))

import choose_torch  # noqa: E402
import install  # noqa: E402

LISTED = ["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.13.0+cpu", "2.14.0", "2.14.0+cpu"]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real interpreter that has pip and no torch."""
    try:  # without importing pip, which makes setuptools another for whoever compiles in this process
        pip = importlib.metadata.distribution("pip").locate_file("pip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("there is no pip here to lend")
    folder = tmp_path_factory.mktemp("interpreter")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (packages / "pip").symlink_to(Path(str(pip)))
    return folder / "bin" / "python"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder of wheels, empty but for their names: all that pip needs to list versions."""
    folder = tmp_path / "index"
    folder.mkdir()
    for version in LISTED:
        (folder / f"torch-{version}-py3-none-any.whl").touch()
    return folder


def fake_torch(folder: Path, version: str, cuda: str | None) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"from torch import version\n__version__ = {version!r}\n")
    (folder / "torch" / "version.py").write_text(f"cuda = {cuda!r}\n")
    return folder


def run(
    python: Path, tmp_path: Path, *arguments: str, index: Path | None = None, torch: Path | None = None
) -> tuple[int, str]:
    """Exit status and everything printed, for `python launch/install.py ...` with no network."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index or tmp_path), "PIP_CONFIG_FILE": os.devnull}
    if torch:
        environment["PYTHONPATH"] = str(torch)
    done = subprocess.run(
        [str(python), str(SCRIPT), "--venv", str(tmp_path / "venv"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("version", "cuda", "option", "line"),
    [
        ("2.13.0+cu130", "13.0", "auto", "using the system's 2.13.0+cu130 with CUDA 13.0 (nothing downloaded)"),
        ("2.12.0a0+gitabc.nv25.9", "13.0", "auto", "using the system's 2.12.0a0+gitabc.nv25.9 with CUDA 13.0"),
        ("2.11.0a0+nv", "12.9", "auto", "using the system's 2.11.0a0+nv with CUDA 12.9"),
        ("2.13.0", None, "system", "using the system's 2.13.0 without CUDA (nothing downloaded)"),
        ("2.13.0", None, "auto", "the system's 2.13.0 has no CUDA, so it is not used"),
        ("2.10.0", "12.6", "auto", "the system's 2.10.0 is outside 2.11 to 2.13"),
        ("2.14.0a0+nv", "13.0", "auto", "the system's 2.14.0a0+nv is outside 2.11 to 2.13"),
    ],
)
def test_system_torch(
    python: Path, tmp_path: Path, index: Path, version: str, cuda: str | None, option: str, line: str
) -> None:
    torch = fake_torch(tmp_path / "site", version, cuda)
    code, text = run(python, tmp_path, "--dry-run", "--torch", option, index=index, torch=torch)
    assert code == 0
    assert line in text
    assert ("will be installed" in text) == ("using" not in line)
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("version", "found"), [(None, "cannot import torch"), ("2.9.1", "2.9.1 with CUDA 12.6")])
def test_system_torch_that_does_not_fit(python: Path, tmp_path: Path, version: str | None, found: str) -> None:
    torch = fake_torch(tmp_path / "site", version, "12.6") if version else None
    code, text = run(python, tmp_path, "--torch", "system", torch=torch)
    assert code == 2
    assert len(text.splitlines()) == 1
    for part in (found, "2.11 to 2.13", "PYTHON="):
        assert part in text
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="torch has one build per version elsewhere")
def test_no_torch_takes_a_build_from_the_users_index(python: Path, tmp_path: Path, index: Path) -> None:
    assert "2.13.0+cpu will be installed (TORCH=cpu; about 190 MB)" in run(
        python, tmp_path, "--dry-run", "--torch", "cpu", index=index
    )[1]  # fmt: skip
    assert "2.13.0 will be installed (TORCH=cuda; about 3 GB" in run(
        python, tmp_path, "--dry-run", "--torch", "cuda", index=index
    )[1]  # fmt: skip
    code, text = run(python, tmp_path, "--dry-run")
    assert code == 2
    assert "no torch 2.11 to 2.13" in text


def test_a_failed_import_is_no_torch(python: Path, tmp_path: Path, index: Path) -> None:
    torch = fake_torch(tmp_path / "site", "2.13.0", "13.0")
    (torch / "torch" / "__init__.py").write_text("raise OSError('libcudart.so: cannot open shared object file')\n")
    code, text = run(python, tmp_path, "--dry-run", index=index, torch=torch)
    assert code == 0
    assert "will be installed" in text


@pytest.mark.parametrize(
    ("gpu", "listed", "requirement", "said"),
    [
        (False, LISTED, "torch==2.13.0+cpu", "no NVIDIA GPU found; about 190 MB"),
        (True, LISTED, "torch==2.13.0,!=2.13.0+cpu", "an NVIDIA GPU found; about 3 GB"),
        (True, [*LISTED, "2.13.0+cu130"], "torch==2.13.0+cu130", "about 3 GB"),
        (True, ["2.13.0+cpu"], "torch==2.13.0+cpu", "training will NOT use the GPU"),
        (False, ["2.12.1", "2.13.0"], "torch==2.13.0", "PIP_ARGS"),
        (False, ["2.11.0+cpu", "2.12.0+cpu", "2.12.1"], "torch==2.12.0+cpu", "190 MB"),
        (False, ["2.13.0rc1", "2.9.0", "2.12.0"], "torch==2.12.0", "no CPU build"),
        (False, None, "torch>=2.11,<2.14", "could not be listed"),
    ],
)
def test_build(gpu: bool, listed: list[str] | None, requirement: str, said: str) -> None:
    assert choose_torch.choose_build("auto", gpu, listed, "linux")[0] == requirement
    assert said in choose_torch.choose_build("auto", gpu, listed, "linux")[1]


def test_a_constraint_on_the_systems_torch_is_ignored_where_ours_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for text, ignored in (("numpy==1.26.4\ntorch==2.10.0a0+nv\n", True), ("torchao==0.9\n", False)):
        (tmp_path / "constraint.txt").write_text(text)
        monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraint.txt"))
        assert ("PIP_CONSTRAINT" not in choose_torch.pip_environment(isolated=True, say=said.append)) == ignored
        assert "PIP_CONSTRAINT" in choose_torch.pip_environment(isolated=False, say=said.append)
    assert len(said) == 1


def test_pyprojects_requirements_leave_torch_to_the_choice() -> None:
    wanted, dev = install.requirements(["dev"])
    assert not [r for r in wanted if r.startswith("torch")]
    assert {"pytest", "ruff", "pyright"} <= set(dev)
    assert any(r.startswith("hydra-core") for r in wanted)


def test_a_stamp_that_fits_is_all_that_is_read(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(python)
    stamp = {
        "key": install.key(),
        "root": str(ROOT),
        "extras": ["dev"],
        "torch_option": "system",
        "python": str(python),
        "python_option": "",
        "system_torch": [],
        "ours": True,
    }
    (folder / install.STAMP).write_text(json.dumps(stamp))
    assert run(python, tmp_path) == (0, "")
    assert run(python, tmp_path, "--extras", "dev,", "--torch", "system") == (0, "")
    # Each of these asks for something else, so the script goes on, and finds no torch in the system.
    assert run(python, tmp_path, "--extras", "wandb")[0] == 2
    (folder / install.STAMP).write_text(json.dumps({**stamp, "key": "of an older pyproject.toml"}))
    assert run(python, tmp_path)[0] == 2
    assert (folder / install.STAMP).exists()


def test_a_foreign_environment_is_never_emptied(python: Path, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine.txt").touch()
    code, text = run(python, tmp_path)
    assert code == 2
    assert "was not made by this script" in text
    assert (tmp_path / "venv" / "mine.txt").exists()


def test_unknown_words_are_refused_by_name(python: Path, tmp_path: Path) -> None:
    assert "none of auto, system, cpu, cuda" in run(python, tmp_path, "--torch", "gpu")[1]
    assert "no extra is called 'gpus'" in run(python, tmp_path, "--extras", "gpus")[1]
