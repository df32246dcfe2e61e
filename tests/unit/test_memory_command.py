"""``moetrain memory`` on a laptop: 1,024 ranks, real shapes; words that are wrong are one line."""

import json

import pytest
import torch.distributed as dist

from moetrain.cli.main import main
from moetrain.memory.ledger import Kind

BIG = [
    "model=mixtral_8x22b", "model.num_layers=3", "layout.tp=4", "layout.ep=8", "memory.world=1024",
    "train.dtype=bfloat16", "train.seq_len=4096", "train.micro_batch=1", "train.batch=1024",
]  # fmt: skip


def run(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert main(["memory", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_rank_of_1024(capsys) -> None:
    found = run(capsys, *BIG)
    assert (found["world"], found["layout"]["dp"], found["device"]) == (1024, 256, "cuda")
    (stage,) = found["stages"]
    assert stage["rank"] == 0
    assert stage["at_peak"].keys() == {kind.value for kind in Kind}
    assert sum(stage["at_peak"].values()) == stage["peak"]
    assert stage["at_peak"]["optimizer"] == pytest.approx(2 * stage["at_peak"]["parameters"], rel=0.01)
    assert not dist.is_initialized()


def test_more_rows_more_bytes(capsys) -> None:
    small = [
        "model.num_layers=2", "layout.dp=4", "layout.ep=4", "train.micro_batch=1", "train.seq_len=512", "train.batch=4",
    ]  # fmt: skip
    even, loaded = (run(capsys, *small, f"memory.imbalance={x}")["stages"][0]["peak"] for x in (1, 3))
    assert loaded > 1.1 * even
    cpu = run(capsys, *small, "train.device=cpu")
    assert cpu["device"] == "cpu"


def test_the_table(capsys) -> None:
    assert main(["memory", "model.num_layers=1", "layout.dp=2", "train.seq_len=64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, row = (next(x.split() for x in lines if x.split()[:1] == [word]) for word in ("stage", "0"))
    assert header == ["stage", "layers", "rank", *(kind.value for kind in Kind), "peak", "in"]
    assert sum(map(float, row[3:10])) == pytest.approx(float(row[10]), abs=0.004)
    assert "Not counted" in lines[-2]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("memory.imbalance=0", "has to be above 0"),
        ("memory.imbalanc=2", "did you mean 'imbalance'?"),
        ("memory.device=tpu", "is not one of cpu, cuda"),
        ("memory.world=0", "has to be at least 1"),
        ("memory.world=3 layout.tp=2", "does not divide the 3 ranks"),
        ("memory.world", "is not key=value"),
        ("--stge 1", "did you mean '--stage'?"),
        ("--stage 3", "has stages 0 to 0"),
        ("--stage", "without a number"),
        ("optim.lrr=1", "did you mean 'optim.lr'?"),
        ("layout.dp=64", "train.batch=32 is not a multiple of"),
    ],
)
def test_one_line_for_what_can_be_mended(capsys, words: str, answer: str) -> None:
    assert main(["memory", *words.split()]) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 1


def test_help(capsys) -> None:
    assert main(["memory", "--help"]) == 0
    assert "memory.imbalance" in capsys.readouterr().out
