"""The real ``moetrain train`` with train.compile: the losses of the run without it, what is compiled in its folder."""

from pathlib import Path

import pytest
import torch
from test_train_command import losses, train, words

from moetrain import caches, compiling
from moetrain.config import UserError


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_run_is_the_run(small_corpus, tmp_path, monkeypatch, ranks) -> None:
    try:
        compiling.check(torch.device("cpu"))
    except UserError as e:
        pytest.skip(str(e))
    for name in caches._FOLDERS:
        monkeypatch.delenv(name, raising=False)
    own = ["train.steps=3", "optim.warmup=1", "train.dtype=float64", "checkpoint.every=0", f"layout.ep={ranks}"]

    def run(name: str, *more: str) -> tuple[Path, list[tuple[int, float]], str]:
        folder = tmp_path / name
        done = train(*words(small_corpus, folder, *own, *more), timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, losses(folder), done.stdout

    _, want, said = run("plain")
    assert "dense parts compiled" not in said
    folder, got, said = run("compiled", "train.compile=true")
    assert "dense parts compiled" in said
    assert [step for step, _ in got] == [step for step, _ in want] == [1, 2, 3]
    for (_, mine), (_, plain) in zip(got, want, strict=True):
        assert abs(mine - plain) < 1e-9
    assert list((folder / "cache" / "inductor").rglob("*.so")), "what the compiler made is in the run's cache"
