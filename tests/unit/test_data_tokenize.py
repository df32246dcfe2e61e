"""Tokenizing real files: every input format, a kill -9 in the middle, and every message a user can get."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import drawn

import moetrain.data
from moetrain.config import UserError
from moetrain.data import bpe, sources
from moetrain.data.corpus import Corpus, is_whole
from moetrain.data.tokenize import tokenize

WORDS = ["token", "expert", "router", "größe", "load", "balance", "日本", "gate", "pipeline", "and", "the", "of"]


def texts(count: int, *, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [f"document {i}: " + " ".join(rng.choices(WORDS, k=words)) + ".\n" for i in range(count)]


def write_jsonl(path: Path, rows: list[str], field: str = "text") -> Path:
    data = "".join(json.dumps({field: row}) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(inputs, output: Path, **options) -> Corpus:
    options = {"log": lambda line: None} | options
    if "tokenizer" not in options:
        options.setdefault("vocab_size", 300)
    return tokenize([str(i) for i in inputs], output=output, **options)


def documents(corpus: Corpus, split: str) -> list[str]:
    tokenizer = bpe.load(corpus.path)
    ends = np.flatnonzero(getattr(corpus, split) == corpus.eos)
    return [tokenizer.decode(part[part != corpus.eos].tolist()) for part in np.split(getattr(corpus, split), ends)][:-1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(bpe.train(texts(50), vocab_size=320).to_str())
    return str(path)


def test_jsonl_gives_a_document_per_line(tmp_path):
    rows = [*texts(200), "", "no newline, <|eos|> spelled out"]
    corpus = run([write_jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "out", valid_fraction=0.2)
    corpus.verify()
    train, valid = documents(corpus, "train"), documents(corpus, "valid")
    assert sorted(train + valid) == sorted(row for row in rows if row)
    assert 20 <= len(valid) <= 60
    assert not (tmp_path / "out.partial").exists()


def test_every_format_and_every_way_to_name_files(tmp_path, tokenizer):
    folder = tmp_path / "in"
    (folder / "sub" / ".git").mkdir(parents=True)
    rows = texts(40)
    write_jsonl(folder / "a.jsonl", rows[:10])
    write_jsonl(folder / "b.jsonl.gz", rows[10:20])
    for i in range(20, 30):
        (folder / "sub" / f"{i}.txt").write_text(rows[i])
        (folder / f"{i}.txt.gz").write_bytes(gzip.compress(rows[i + 10].encode()))
    (folder / "sub" / ".git" / "x.txt").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text("")
    for name, inputs in {
        "folder": [folder],
        "globs": [folder / "*.jsonl*", folder / "**" / "*.txt", folder / "*.txt.gz"],
        "overlap": [folder, folder / "a.jsonl"],
    }.items():
        corpus = run(inputs, tmp_path / name, tokenizer=tokenizer, valid_fraction=0.0)
        assert sorted(documents(corpus, "train")) == sorted(rows), name
        assert len(corpus.valid) == 0


def test_large_text_file_is_streamed_in_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    text = "".join(texts(60)) + "ü" * 3000
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = run([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer, valid_fraction=0.0, part_bytes=2500)
    assert documents(corpus, "train") == [text]
    whole = run([tmp_path / "a.txt"], tmp_path / "again", tokenizer=tokenizer, valid_fraction=0.0)
    assert corpus.fingerprint == whole.fingerprint, "where parts end leaves no trace"


def test_one_book_holds_out_its_tail(tmp_path, tokenizer):
    text = "".join(texts(100))
    (tmp_path / "book.txt").write_text(text)
    lines: list[str] = []
    corpus = run([tmp_path / "book.txt"], tmp_path / "out", tokenizer=tokenizer, valid_fraction=0.1, log=lines.append)
    assert any("are held out" in line for line in lines)
    assert len(corpus.valid) == pytest.approx(len(corpus.train) / 9, rel=0.01)
    assert corpus.train[-1] == corpus.valid[-1] == corpus.eos
    pieces = [bpe.load(corpus.path).decode(split[:-1].tolist()) for split in (corpus.train, corpus.valid)]
    assert "".join(pieces) == text


def test_a_corpus_lends_its_tokenizer(tmp_path):
    first = run([write_jsonl(tmp_path / "a.jsonl", texts(50))], tmp_path / "one")
    second = run([write_jsonl(tmp_path / "b.jsonl", texts(50, seed=1))], tmp_path / "two", tokenizer=str(first.path))
    assert first.tokenizer_fingerprint == second.tokenizer_fingerprint
    assert first.fingerprint != second.fingerprint


CHILD = """
import sys
from pathlib import Path
from moetrain.data.tokenize import tokenize
tokenize(sys.argv[1:-1], output=Path(sys.argv[-1]), vocab_size=300, valid_fraction=0.1, part_bytes=20_000)
"""


@pytest.mark.parametrize("name", drawn(["a.jsonl", "a.jsonl.gz", "a.txt"], 1, of="kills"))
def test_kill_9_then_resume_is_byte_identical(tmp_path, name):
    rows = texts(6000)
    inputs = [tmp_path / name, tmp_path / "small.jsonl"]
    write_jsonl(inputs[1], texts(30, seed=2))
    if name == "a.txt":
        inputs[0].write_text("".join(rows))
    else:
        write_jsonl(inputs[0], rows)
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    child = subprocess.Popen([sys.executable, "-c", CHILD, *map(str, inputs), str(output)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(partial.glob("part-*.json"))) < (2 if name == "a.txt" else 5):
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not is_whole(output)
    options = {"valid_fraction": 0.1, "part_bytes": 20_000}
    kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("part-*.json")}
    lines: list[str] = []
    resumed = run(inputs, output, log=lines.append, **options)
    assert any(line.startswith("continuing") and f"{len(kept)} parts" in line for line in lines), lines
    straight = run(inputs, tmp_path / "straight", **options | {"part_bytes": 10**9})
    for file in ("train.bin", "valid.bin", "tokenizer.json", "token_bytes.npy"):
        assert (output / file).read_bytes() == (tmp_path / "straight" / file).read_bytes(), file
    assert resumed.fingerprint == straight.fingerprint
    assert resumed.meta["splits"]["train"]["num_documents"] > 0


def test_error_in_the_middle_then_mended_starts_anew(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", texts(300))
    good = file.read_bytes()
    file.write_bytes(good + b'{"text": "cut\n')
    with pytest.raises(UserError, match=r"a\.jsonl:301: not a JSON line"):
        run([file], tmp_path / "out", tokenizer=tokenizer, part_bytes=5000)
    assert not (tmp_path / "out").exists()
    assert not is_whole(tmp_path / "out.partial")
    file.write_bytes(good)
    lines: list[str] = []
    corpus = run([file], tmp_path / "out", tokenizer=tokenizer, log=lines.append, part_bytes=5000)
    assert any("starting anew" in line for line in lines)
    assert sum(corpus.meta["splits"][s]["num_documents"] for s in ("train", "valid")) == 300


def test_changed_options_start_anew_and_a_damaged_part_is_done_again(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", texts(300))
    bad = write_jsonl(tmp_path / "b.jsonl", ["x"], field="other")
    for fraction, line_start in ((0.1, None), (0.1, "continuing"), (0.2, "starting anew")):
        lines: list[str] = []
        with pytest.raises(UserError, match="no field 'text'"):
            run(
                [file, bad],
                tmp_path / "out",
                tokenizer=tokenizer,
                valid_fraction=fraction,
                log=lines.append,
                part_bytes=5000,
            )
        assert line_start is None or any(line_start in line for line in lines)
        part = tmp_path / "out.partial" / "part-000001.train.bin"
        part.write_bytes(part.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", r"the input is empty: 1 files"),
        ("a.txt", b"", r"the input is empty"),
        ("a.jsonl", b"\n\n", r"the input is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not a JSON line"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"body": "a", "id": 1}\n',
            r"a\.jsonl:3: no field 'text' \(it has 'body', 'id'\)",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' is int, not a string"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: not a JSON object but list"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: .*lone surrogate"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 \(byte 0xff at offset 24\)"),
        ("a.txt", b"one\ntwo\nthr\xe9e\n", r"a\.txt:3: not UTF-8 \(byte 0xe9 at offset 11\)"),
        (
            "a.txt.gz",
            gzip.compress(b"one two three\n" * 99, mtime=0)[:-9],
            r"a\.txt\.gz is a truncated or damaged gzip",
        ),
        ("a.jsonl.gz", b"not gzip at all", r"a\.jsonl\.gz is a truncated or damaged gzip"),
        ("a.jsonl.zst", b"", r"\.zst is not read here: decompress it"),
    ],
)
def test_bad_input_is_named(tmp_path, tokenizer, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        run([tmp_path / name], tmp_path / "out", tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_paths_and_options_are_named(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", texts(5))
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "void").mkdir()
    for inputs, message in (
        ([tmp_path / "none*.txt"], r"none\*\.txt: no files matched"),
        ([tmp_path / "void"], r"void: no files matched \(a folder gives its .txt"),
        ([tmp_path / "link.txt"], r"cannot read .*link\.txt: No such file"),
        ([], "no input given"),
    ):
        with pytest.raises(UserError, match=message):
            run(inputs, tmp_path / "out", tokenizer=tokenizer)
    for options, message in (
        ({"tokenizer": tokenizer, "vocab_size": 300}, "give either tokenizer=PATH .* or vocab_size=N"),
        ({"vocab_size": 3}, "vocab_size=3 is below 257"),
        ({"vocab_size": 300, "valid_fraction": 1.0}, r"valid_fraction=1.0 is not in \[0, 1\)"),
        ({"tokenizer": str(tmp_path / "void")}, "cannot read .*tokenizer.json"),
    ):
        with pytest.raises(UserError, match=message):
            run([file], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_named(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", texts(5))
    file.chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: Permission denied"):
        run([file], tmp_path / "out", tokenizer=tokenizer)


def test_existing_output(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", texts(50))
    first = run([file], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(UserError, match="is already a whole corpus: add overwrite=true"):
        run([file], tmp_path / "out", tokenizer=tokenizer)
    write_jsonl(file, texts(60, seed=1))
    assert run([file], tmp_path / "out", tokenizer=tokenizer, overwrite=True).fingerprint != first.fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists and is not a tokenized corpus"):
        run([file], tmp_path / "mine", tokenizer=tokenizer, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_two_runs_into_one_output(tmp_path, tokenizer):
    fcntl = pytest.importorskip("fcntl")
    file = write_jsonl(tmp_path / "a.jsonl", texts(5))
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            run([file], tmp_path / "out", tokenizer=tokenizer)


def test_parquet(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet inputs are not tested here")
    import pyarrow.parquet as pq

    rows = texts(50)
    pq.write_table(pa.table({"body": rows, "id": list(range(50))}), tmp_path / "a.parquet", row_group_size=8)
    corpus = run([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=tokenizer, field="body", valid_fraction=0.0)
    assert documents(corpus, "train") == rows
    source = sources.find_sources([str(tmp_path / "a.parquet")])[0]
    rest = list(sources.read_pieces(source, field="body", start=sources.Place(19, 20)))
    assert [piece.text for piece in rest] == rows[19:]
    with pytest.raises(UserError, match=r"no column 'text' \(it has body, id\)"):
        run([tmp_path / "a.parquet"], tmp_path / "bad", tokenizer=tokenizer)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"cannot read .*b\.parquet"):
        run([tmp_path / "b.parquet"], tmp_path / "bad", tokenizer=tokenizer)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "moetrain.data.parquet", raising=False)
    monkeypatch.delattr(moetrain.data, "parquet", raising=False)  # as if it had never been imported
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        run([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=tokenizer)
