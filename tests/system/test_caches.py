"""Nothing is written to the home or the temporary folder that no key names."""

import os
import subprocess
import sys
from pathlib import Path

from test_train_command import COMMAND, words

from moetrain import caches


def strangers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_run_leaves_home_and_temporary_folder_empty(small_corpus, tmp_path) -> None:
    """Two ranks of `moetrain train`, and one under torchrun; then the page, where matplotlib is there."""
    home, temporary, run = tmp_path / "home", tmp_path / "tmp", tmp_path / "runs" / "run"
    home.mkdir()
    temporary.mkdir()
    ours = {k: v for k, v in os.environ.items() if k not in caches._FOLDERS and not k.startswith("XDG_")}
    env = ours | {"HOME": str(home), "TMPDIR": str(temporary)}

    def done(*command: str) -> None:
        found = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env, cwd=tmp_path)
        assert found.returncode == 0, found.stdout + found.stderr

    done(*COMMAND, *words(small_corpus, run, "train.steps=3", "optim.warmup=1"))
    assert (run / "cache" / "inductor").is_dir(), "where torch's own goes instead"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--log-dir={tmp_path / 'logs'}"]
    argv = words(small_corpus, run.with_name("other"), "train.steps=3", "optim.warmup=1", "layout.ep=1")
    done(*torchrun, "-m", "moetrain", "train", *argv)
    done(sys.executable, "-m", "moetrain", "status", str(run))
    done(sys.executable, "-m", "moetrain", "report", str(run))
    assert strangers(home) == []
    assert strangers(temporary) == []


def test_the_users_own_environment_comes_first(monkeypatch, tmp_path) -> None:
    for name in caches._FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(caches, "_ours", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    caches.keep_in(tmp_path / "first")
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ["CUDA_CACHE_PATH"] == str(tmp_path / "first" / "cuda")
    caches.keep_in(tmp_path / "second")
    assert os.environ["CUDA_CACHE_PATH"] == str(tmp_path / "second" / "cuda"), "the next job of a sweep"
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    with caches.unused():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "second" / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with caches.unused():
        assert os.path.isdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
