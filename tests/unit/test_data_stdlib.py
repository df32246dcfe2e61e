"""The default corpus, built from a small library: fixed, no near-duplicates, built once by racing processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.config import UserError
from moetrain.data import bpe, stdlib
from moetrain.data.corpus import Corpus

BUILD = """
import sys
from pathlib import Path
from moetrain.data import stdlib
print(stdlib.prepare(Path(sys.argv[1]), vocab_size=300, log=print, root=Path(sys.argv[2])))
"""


@pytest.fixture
def root(tmp_path) -> Path:
    """120 files that differ, one copied ten times with an edit, and what must be left out."""
    root = tmp_path / "lib"
    (root / "package").mkdir(parents=True)
    for i in range(120):
        lines = [f"def function_{i}_{j}(x):\n    return x * {i} + {j * i}\n" for j in range(20)]
        (root / "package" / f"module_{i}.py").write_text("\n".join(lines))
    original = (root / "package" / "module_7.py").read_text()
    for i in range(10):
        (root / f"copy_{i}.py").write_text(f"# copy {i}\n{original}")
    (root / "package" / "notes.rst").write_text("Notes\n=====\n" * 5)
    for folder in ("site-packages", "__pycache__", "dist-packages", "config-3.11-x86"):
        (root / folder).mkdir()
        (root / folder / "alien.py").write_text("alien = 1\n" * 9)
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "empty.py").write_text("")
    (root / "library.so").write_bytes(b"\x7fELF")
    (root / "_sysconfigdata_linux.py").write_text("alien = 1\n")
    (root / "sitecustomize.py").symlink_to(tmp_path / "gone.py")
    return root


def documents(path: Path) -> dict[str, list[str]]:
    corpus, tokenizer = Corpus.open(path), bpe.load(path)
    texts = {}
    for split in ("train", "valid"):
        parts = " ".join(map(str, getattr(corpus, split).tolist())).split(f" {corpus.eos}")[:-1]
        texts[split] = [tokenizer.decode([int(i) for i in part.split()]) for part in parts]
    return texts


def test_what_is_in_it(tmp_path, root):
    lines: list[str] = []
    path = stdlib.prepare(tmp_path / "cache", vocab_size=300, log=lines.append, root=root)
    corpus = Corpus.open(path)
    corpus.verify()
    texts = documents(path)
    every = texts["train"] + texts["valid"]
    assert not any("alien" in t or "caf" in t for t in every)
    assert sum("def function_7_0(x)" in t for t in every) <= 1 + sum("def function_7_0" in t for t in texts["valid"])
    assert not {t.removeprefix("# copy")[3:] for t in texts["train"]} & {
        t.removeprefix("# copy")[3:] for t in texts["valid"]
    }
    assert 110 <= len(every) <= 123
    assert 1 <= len(texts["valid"]) <= 15
    assert corpus.meta["source"]["train_files"] == len(texts["train"])
    assert lines[-1].startswith("built ")


def test_built_once_and_named_by_its_content(tmp_path, root):
    lines: list[str] = []
    first = stdlib.prepare(tmp_path / "cache", vocab_size=300, log=lines.append, root=root)
    first.rename(killed := first.with_name(f"{first.name}.12345.tmp"))
    (killed / "corpus.json").unlink()
    assert stdlib.prepare(tmp_path / "cache", vocab_size=300, log=lines.append, root=root) == first
    assert not killed.exists(), "what a killed build left is not used and is cleared away"
    num_lines = len(lines)
    assert stdlib.prepare(tmp_path / "cache", vocab_size=300, log=lines.append, root=root) == first
    assert len(lines) == num_lines
    again = stdlib.prepare(tmp_path / "elsewhere", vocab_size=300, log=lines.append, root=root)
    assert again.name == first.name
    assert Corpus.open(again).fingerprint == Corpus.open(first).fingerprint
    (root / "package" / "module_3.py").write_text("changed = True\n")
    assert stdlib.prepare(tmp_path / "cache", vocab_size=300, log=lines.append, root=root).name != first.name


def test_racing_processes_build_one(tmp_path, root):
    command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(root)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert all(child.returncode == 0 for child in children)
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("built" in output for output in outputs) == 1, "the others wait for the one that builds"
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.suffix not in (".lock", "")] == []


def test_cap_takes_a_fixed_subset_and_says_so(tmp_path, root, monkeypatch):
    monkeypatch.setattr(stdlib, "_MAX_BYTES", 40_000)
    lines: list[str] = []
    path = stdlib.prepare(tmp_path / "cache", vocab_size=300, log=lines.append, root=root)
    assert any("files are left out" in line for line in lines)
    size = sum(split["num_bytes"] for split in Corpus.open(path).meta["splits"].values())
    assert 20_000 < size <= 40_000
    monkeypatch.undo()
    assert stdlib.prepare(tmp_path / "cache", vocab_size=300, log=lines.append, root=root) != path


def test_errors(tmp_path, root):
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="no text files under"):
        stdlib.prepare(tmp_path / "cache", vocab_size=300, log=print, root=tmp_path / "void")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache=.*file/cache cannot be made"):
        stdlib.prepare(tmp_path / "file" / "cache", vocab_size=300, log=print, root=root)
    with pytest.raises(UserError, match="vocab_size=9 is below 257"):
        stdlib.prepare(tmp_path / "cache", vocab_size=9, log=print, root=root)
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []
