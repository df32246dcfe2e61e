"""The real ``moetrain verify``: what it prints and returns for the same run, a planted fault, bad words, a sweep."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.cli.main import main
from moetrain.cli.verify import _cases, _parser, _trials
from moetrain.layouts import count_legal
from moetrain.verify.report import parse

SMALL = [
    "model.vocab_size=64", "model.dim=16", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2",
    "model.moe.num_experts=4", "model.moe.hidden=8", "train.batch=4", "train.micro_batch=1", "train.seq_len=12",
    "train.device=cpu", "train.dtype=float64", "optim.warmup=0",
]  # fmt: skip


def test_a_layout_is_the_same_run(capsys) -> None:
    assert main(["verify", "layout.tp=2", "layout.ep=2", "train.device=cpu", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    assert "\nkept: " in out, "what was shrunk"
    assert "tp=2 ep=2 beside one rank, float64" in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert {"choices", "loss", "grad norm", "expert load", "gradients", "next weights", "expert bias"} <= rows.keys()
    assert out.splitlines()[-1] == "the same run"
    groups = out[out.index("gradients are summed over") : out.index("quantity")].splitlines()
    at = groups.index("  tp")
    assert "blocks.*.attention_norm.weight" in groups[at + 1]


def test_a_planted_fault_is_found_kept_and_named(capsys, tmp_path) -> None:
    folder = tmp_path / "kept"
    words = ["layout.ep=2", "--inject", "double_division", "--full", "--keep", str(folder)]
    assert main(["verify", *SMALL, *words]) == 1
    out = capsys.readouterr().out
    assert "gradients" in out
    assert "DIFFERENT: first embedding.weight, error 5.0e-01, its gradient is summed over dp*cp; " in out
    assert (folder / "layout" / "tensors" / "COMMITTED").exists()
    assert (folder / "ranks" / "life-0" / "rank-1.log").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--agianst dp=2", "unknown option --agianst; did you mean '--against'?"),
        ("layout.ep=3", "layout.ep=3 does not divide model.moe.num_experts=8"),
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("layout.ep=2 --inject nonsense", "--inject nonsense: no such fault"),
        ("layout.ep=2 --against dp=2", "--against needs --full"),
        ("layout.ep=2 --full --against dp=4", "is a layout of 4 ranks, the config's of 2: give one of 1 or 2"),
        ("layout.ep=2 --full --against dp:2", "'dp:2' in layout 'dp:2' is not axis=degree"),
        ("--all-layouts two", "'two' is not a number of ranks"),
        ("--all-layouts 2 --full", "leave torchrun, --full, --ranks and --against away"),
        ("--all-layouts 2 --case capacity", "--case 'capacity' is not NAME:KEY=VALUE"),
        ("--write page.md", "--write is for a sweep: add --all-layouts N"),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("", "the layout is one rank, which is what it is compared with"),
        ("--all-layouts 2 --inject dubble_division", "no such fault; did you mean 'double_division'?"),
        ("--ranks 0", "--ranks 0: has to be at least 1"),
        ("--keep /dev/null/x layout.ep=2", "/dev/null/x cannot be written (Not a directory)"),
    ],
)
def test_what_can_be_mended_is_one_line_and_code_2(capsys, words, line) -> None:
    assert main(["verify", "train.device=cpu", *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err


def test_a_sweep_prints_a_line_a_layout_and_writes_a_page(capsys, tmp_path) -> None:
    page = tmp_path / "docs" / "verified.md"
    cases = ["--case", "plain:", "--case", "three heads: model.num_heads=3 model.num_kv_heads=3 model.head_dim=4"]
    assert main(["verify", *SMALL, "--all-layouts", "2", *cases, "--write", str(page)]) == 0
    out = capsys.readouterr().out.splitlines()
    n = count_legal(2)
    assert sum(line.startswith("[") for line in out) == 2 * n
    assert f"[1/{2 * n}] plain  dp=2 " in out[0]
    assert out[0].endswith("  the same run")
    refused = [line for line in out if "refused: layout.tp=2 does not divide model.num_heads=3" in line]
    assert len(refused) == 3
    assert out[-2].startswith(f"{2 * n} comparisons: {2 * n - 3} same, 3 gap; worst gradient error ")
    text = page.read_text()
    assert "moetrain verify " in text
    assert "| 2 | 10 | 17 | 0 | 0 | 3 |" in text
    assert "## Gaps\n\n| feature | dimension | cause |\n|---|---|---|\n" in text
    assert "| three heads | tp=2 | layout.tp=2 does not" in text
    found = parse(page)
    assert len(found) == 2 * n
    assert ("plain", "dp=2 ep=2", "same") in found
    assert ("three heads", "tp=2 etp=2", "gap") in found


def test_a_sample_of_a_sweep_is_the_same_for_the_same_seed() -> None:
    def drawn(*words: str) -> dict[int, list[str]]:
        options = _parser().parse_args(["--all-layouts", "2,8", *words])
        layouts = _trials(_cases(options)["config"], options.seed)
        return {world: [str(layout) for layout in found] for world, found in layouts.items()}

    every, some = drawn(), drawn("--sample", "12", "--seed", "1")
    assert {world: len(found) for world, found in every.items()} == {n: count_legal(n) for n in (2, 8)}
    assert some[2] == every[2], "fewer than that there are all"
    assert some[8] == [layout for layout in every[8] if layout in some[8]], "in the order of all"
    assert len(some[8]) == 12
    assert some == drawn("--sample", "12", "--seed", "1") != drawn("--sample", "12", "--seed", "2")


def test_under_torchrun_the_ranks_that_are_there_do_it(tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "moetrain", "verify", *SMALL, "layout.ep=2", "--full", "--against", "dp=2"]
    done = subprocess.run(
        [*torchrun, *words, f"run.dir={tmp_path}", "run.name=x"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dp=2 ep=2 beside dp=2, float64" in done.stdout
    assert done.stdout.count("the same run") == 1, "one rank speaks"
    assert not Path(tmp_path / "x" / "verify").exists()
