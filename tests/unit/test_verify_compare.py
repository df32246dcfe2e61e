"""The comparison on outcomes made by hand: each kind of difference is found and named, and nothing else is."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moetrain import checkpoint
from moetrain.logical import Chunk, Logical
from moetrain.moe.ties import of_top_k
from moetrain.verify import choices, low
from moetrain.verify.compare import compare, kind
from moetrain.verify.outcome import Outcome
from moetrain.verify.report import cause, table

EXPERTS = "blocks.0.moe.experts.down"
NAMES = {"embedding.weight": (7, 4), "blocks.0.attention.q.weight": (6, 4), EXPERTS: (3, 4, 5), "norm.weight": (4,)}
GROUPS = {name: "edp" if "experts" in name else "dp*cp" for name in NAMES}
B, S, E, K = 2, 6, 3, 1
Run = dict[str, Any]


@pytest.fixture
def run() -> Run:
    """What an outcome is written from."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in NAMES.items():
        for what in ("grad", "weight"):
            tensors[f"{what}.{name}"] = torch.randn(shape, dtype=torch.float64, generator=draw)
    tensors["grad.embedding.weight"][2] = 0  # a token that nobody wrote
    tensors["buffer.blocks.0.moe.bias_E"] = torch.tensor([0.1, -0.1, 0.0])
    tensors["load.0"] = torch.tensor([5, 4, 3])
    scores = torch.rand(B, S, E, dtype=torch.float64, generator=draw)
    scores[0, 1], scores[1, 4] = torch.tensor([[0.5, 0.5 + 1e-7, 0.1], [0.5, 0.6, 0.1]]).double()
    return {
        "tensors": tensors,
        "scores": scores,
        "ids": scores.argmax(-1, keepdim=True),
        "numbers": {"loss": 2.5, "grad norm": 1.5, "dropped": 3.0, "balance switch": 4.0},
    }


def write(run: Run, folder: Path, *, dtype: str = "float64") -> Path:
    """As two ranks would: the first three positions and the rest, one of them padding."""
    meta = {"layout": "x", "world": 1, "dtype": dtype, "samples": B, "seq_len": S, "order": list(NAMES)}
    meta |= {"summed_over": GROUPS, "numbers": run["numbers"]}
    whole = {n: Logical(tuple(x.shape), x.dtype, (Chunk((0,) * x.dim(), x),)) for n, x in run["tensors"].items()}
    checkpoint.save(folder / "tensors", whole, meta, group=None)
    (folder / "choices").mkdir()
    for rank, positions in enumerate(([0, 1, 2], [3, 4, 5, 6])):
        at = torch.tensor(positions)
        ids, scores = (torch.nn.functional.pad(run[k], (0, 0, 0, 1))[:, at].contiguous() for k in ("ids", "scores"))
        margins = of_top_k(scores.flatten(0, 1), ids.shape[-1]).view_as(scores)
        part = {"samples": torch.arange(B), "positions": at, "ids.0": ids.int(), "scores.0": scores}
        part["margins.0"] = margins
        save_file(part, folder / "choices" / f"rank-{rank}.safetensors")
    return folder


def add(name: str, at: Any, amount: float):
    def change(run: Run) -> None:
        run["tensors"][name][at] += amount

    return change


def lack(run: Run) -> None:
    for what in ("grad", "weight"):
        del run["tensors"][f"{what}.norm.weight"]


def number(name: str, factor: float):
    def change(run: Run) -> None:
        run["numbers"][name] *= factor

    return change


def nan(run: Run) -> None:
    run["tensors"]["grad.norm.weight"][1] = math.nan


def choose_other(run: Run) -> None:
    run["ids"][1, 4] = 0  # 0.5 against 0.6


CHANGES = {
    "the gradient of one expert": (add(f"grad.{EXPERTS}", 1, 1e-6), "gradients", f"{EXPERTS} (expert 1)", "edp"),
    "a gradient": (add("grad.norm.weight", 2, 1e-6), "gradients", "norm.weight", "dp*cp"),
    "a gradient that is zero": (
        add("grad.embedding.weight", (2, 1), 1e-30),
        "gradients",
        "embedding.weight, error inf",
        "dp*cp",
    ),
    "a gradient that is no number": (nan, "gradients", "norm.weight, error inf", "dp*cp"),
    "the loss": (number("loss", 1 + 1e-8), "loss", "loss, error 1.0e-08", "every gradient is the same"),
    "the norm": (number("grad norm", 1 + 1e-8), "grad norm", "grad norm", "every gradient is the same"),
    "a balance loss": (number("balance switch", 1.1), "balance switch", "balance switch", ""),
    "drops": (number("dropped", 4 / 3), "dropped", "dropped", ""),
    "a load": (add("load.0", 1, 1), "expert load", "expert load, error 1.0e+00 (layer 0)", ""),
    "the expert bias": (add("buffer.blocks.0.moe.bias_E", 0, 1e-3), "expert bias", "blocks.0.moe.bias_E", ""),
    "a next weight": (add("weight.norm.weight", 0, 1e-6), "next weights", "norm.weight", "every gradient is the same"),
    "a missing tensor": (lack, "tensors", "grad.norm.weight is only in the reference", ""),
    "a choice": (choose_other, "choices", "layer 0, sample 1, position 4", "at a gap of 1.0e-01"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_found_and_named(run, tmp_path, change) -> None:
    plant, quantity, where, why = CHANGES[change]
    other = copy.deepcopy(run)
    plant(other)
    report = compare(write(other, tmp_path / "a"), write(run, tmp_path / "b"))
    assert not report.same
    assert {row.quantity for row in report.rows if not row.same} == {quantity}
    assert where in cause(report)
    assert why in cause(report)
    assert sum("DIFFERENT" in line for line in table(report)) == 1


def test_rounding_is_no_difference(run, tmp_path) -> None:
    other = copy.deepcopy(run)
    for name, x in other["tensors"].items():
        if name.startswith(("grad", "weight")):
            x *= 1 + 1e-11
    report = compare(write(other, tmp_path / "a"), write(run, tmp_path / "b"))
    assert report.same
    assert 0 < report.worst < 2e-11
    assert not compare(tmp_path / "a", tmp_path / "b", tolerance=1e-12).same


def test_the_first_of_several_is_named_in_the_order_of_the_model(run, tmp_path) -> None:
    other = copy.deepcopy(run)
    for name in ("norm.weight", EXPERTS, "blocks.0.attention.q.weight"):
        other["tensors"][f"grad.{name}"] += 1e-3
    text = cause(compare(write(other, tmp_path / "a"), write(run, tmp_path / "b")))
    assert text.startswith("first blocks.0.attention.q.weight, error")
    assert text.endswith("its gradient is summed over dp*cp; 2 more, the last norm.weight, summed over dp*cp")


def test_a_gradient_of_rounding_noise_is_held_against_its_share_of_the_whole(run, tmp_path) -> None:
    run["tensors"]["grad.norm.weight"] *= 1e-15
    other = copy.deepcopy(run)
    other["tensors"]["grad.norm.weight"] *= 2
    assert compare(write(other, tmp_path / "a"), write(run, tmp_path / "b")).same


def test_next_weights_are_compared_where_the_gradient_tells_their_sign(run, tmp_path) -> None:
    run["tensors"]["grad.norm.weight"][0] = 1e-9
    other = copy.deepcopy(run)
    other["tensors"]["weight.norm.weight"][0] += 1e-2
    assert compare(write(other, tmp_path / "a"), write(run, tmp_path / "b")).same
    other["tensors"]["weight.embedding.weight"][2, 0] += 1e-2  # the gradient of this row is exactly zero
    report = compare(write(other, tmp_path / "c"), tmp_path / "b")
    assert cause(report).startswith("next weights")


def test_ranks_that_hold_the_same_box_and_not_the_same_numbers_differ(run, tmp_path) -> None:
    a = write(run, tmp_path / "a")
    (a / "replicas").mkdir()
    box = run["tensors"]["grad.embedding.weight"][4:].clone()
    box[1, 1] += 1e-3
    save_file({"grad.embedding.weight[4,0]": box}, a / "replicas" / "rank-00003.safetensors")
    report = compare(a, write(run, tmp_path / "b"))
    assert [d.name for d in report.differences] == ["embedding.weight"]


def test_a_near_tie_is_counted_and_judged_again_on_the_same_choices(run, tmp_path) -> None:
    other = copy.deepcopy(run)
    other["ids"][0, 1] = 0
    a, b = Outcome(write(other, tmp_path / "a")), Outcome(write(run, tmp_path / "b"))
    found = choices.compare(a, b, replayed=False)
    assert (found.near_ties, found.wrong, found.tokens) == (1, None, B * S)
    assert found.widest == pytest.approx(1e-7, rel=0.3)
    # Replayed: the ids are those that it would have chosen by itself, of which one is another.
    other["ids"] = run["ids"].clone()
    choose_other(other)
    found = choices.compare(Outcome(write(other, tmp_path / "c")), b, replayed=True)
    assert found.wrong == "layer 0, sample 1, position 4"


def test_choices_are_sets(run, tmp_path) -> None:
    run["ids"] = run["scores"].sort(-1, descending=True).indices[..., :2]
    other = copy.deepcopy(run)
    other["ids"] = run["ids"].flip(-1)
    a, b = Outcome(write(other, tmp_path / "a")), Outcome(write(run, tmp_path / "b"))
    assert choices.compare(a, b, replayed=False) == choices.Choices(B * S)
    other["ids"][1, 4] = -1  # chosen fewer: no tie of anything
    assert choices.compare(Outcome(write(other, tmp_path / "c")), b, replayed=False).wrong is not None


def test_tokens_that_nobody_recorded_are_an_error(run, tmp_path) -> None:
    a = write(run, tmp_path / "a")
    (a / "choices" / "rank-1.safetensors").unlink()
    with pytest.raises(ValueError, match="no rank recorded the choices of some tokens"):
        Outcome(a).choices(0)


def noisy(run: Run, amount: float, seed: int) -> Run:
    other, draw = copy.deepcopy(run), torch.Generator().manual_seed(seed)
    for name, x in other["tensors"].items():
        if name.startswith(("grad", "weight")):
            x *= 1 + amount * torch.randn(x.shape, dtype=x.dtype, generator=draw)
    return other


@pytest.mark.parametrize(("amount", "same"), [(0.01, True), (0.1, False)])
def test_bfloat16_is_held_against_one_rank_in_bfloat16(run, tmp_path, amount, same) -> None:
    exact = write(run, tmp_path / "exact")
    alone = write(noisy(run, 0.01, 2), tmp_path / "alone")
    report = low.compare(write(noisy(run, amount, 3), tmp_path / "a"), alone, exact)
    assert report.same == same, table(report)
    assert [d.name for d in report.differences] == ([] if same else list(NAMES))


def test_a_kind_of_parameter_is_its_name_without_the_layer() -> None:
    assert kind("blocks.12.moe.experts.down") == "blocks.*.moe.experts.down"


def test_large_parameters_are_measured_by_blocks(run, tmp_path, monkeypatch) -> None:
    other = copy.deepcopy(run)
    other["tensors"][f"grad.{EXPERTS}"][2, 3, 4] += 1e-3
    other["tensors"]["grad.embedding.weight"][2, 1] += 1e-30
    whole = compare(write(other, tmp_path / "a"), write(run, tmp_path / "b"))
    for block in (1, 7, 25):
        monkeypatch.setattr("moetrain.verify.compare._BLOCK", block)
        found = compare(tmp_path / "a", tmp_path / "b")
        assert [(d.name, d.part) for d in found.differences] == [(d.name, d.part) for d in whole.differences]
        assert found.differences[1].error == pytest.approx(whole.differences[1].error)
    assert [d.part for d in whole.differences] == ["", "expert 2"]


def test_every_tensor_is_read_whole(run, tmp_path) -> None:
    read = Outcome(write(run, tmp_path / "a")).read(["grad.embedding.weight", "load.0"])
    assert all(torch.equal(read[n], run["tensors"][n]) for n in read)
    assert isinstance(read["load.0"], Tensor)
