"""Layouts as integers: what is legal and nothing else, what folds over what, what a refusal says, what is printed."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.cli.main import main
from moetrain.config import UserError, replace
from moetrain.layouts import (
    AXES,
    Layout,
    ModelShape,
    broken_rule,
    coordinates,
    count_legal,
    divisors,
    folds,
    legal,
    nearest_legal,
    slices,
    views,
)

SMALL = ModelShape(num_layers=4, num_heads=12, num_kv_heads=4, experts=(8,))
COUNTS = {1: 1, 2: 10, 4: 46, 8: 146, 12: 460, 16: 371, 24: 1460}


@pytest.mark.parametrize("world", COUNTS)
def test_how_many_are_legal(world: int) -> None:
    found = legal(world)
    assert len(found) == len({layout.words() for layout in found}) == count_legal(world) == COUNTS[world]
    assert all(layout.solve(world) is layout and layout.world == world for layout in found)
    for pp in (1, 2, 3, 5):
        assert legal(world, pp=pp) == [layout for layout in found if layout.pp == pp]
        assert count_legal(world, pp=pp) == len(legal(world, pp=pp))


degree = st.sampled_from([1, 2, 3, 4, 6, 8])


@given(world=st.integers(1, 24), degrees=st.fixed_dictionaries(dict.fromkeys(AXES, degree)), free=st.booleans())
@settings(max_examples=150, deadline=None)
def test_solve_takes_what_is_legal_and_refuses_the_rest(world: int, degrees: dict[str, int], free: bool) -> None:
    layout = Layout(**degrees | ({"dp": -1} if free else {}))
    fixed = [a for a in AXES if getattr(layout, a) != -1]
    same = [each for each in legal(world) if all(getattr(each, a) == degrees[a] for a in fixed)]
    if same:
        assert [layout.solve(world)] == same
    else:
        with pytest.raises(UserError, match=r"ranks there are: .*; nearest legal: pp="):
            layout.solve(world)


def distance(layout: Layout, to: Layout) -> tuple[int, float]:
    pairs = [(getattr(layout, a), getattr(to, a)) for a in (*AXES, "replicate") if getattr(layout, a) != -1]
    return sum(a != b for a, b in pairs), round(sum(abs(math.log(a / b)) for a, b in pairs), 9)


@given(
    world=st.integers(1, 12),
    degrees=st.fixed_dictionaries(dict.fromkeys(AXES, degree)),
    free=st.booleans(),
    copies=st.integers(1, 3),
    shape=st.builds(
        ModelShape, num_layers=st.integers(1, 8), num_heads=degree, num_kv_heads=degree,
        experts=st.sampled_from([(), (2,), (6,), (8,), (4, 6)]), ulysses=st.booleans(),
    ),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_nearest_legal_ones_are_legal_and_no_other_is_nearer(world, degrees, free, copies, shape) -> None:
    layout = Layout(**degrees | ({"dp": -1} if free else {}), replicate=copies)
    found = nearest_legal(layout, world, shape)
    kept = [replace(each, replicate=copies if each.dp % copies == 0 else 1) for each in legal(world)]
    fit = [each for each in kept if broken_rule(each, shape, near=0) is None]
    assert len(found) == min(3, len(fit)) > 0
    assert all(each in fit for each in found)
    assert [distance(layout, each) for each in found] == sorted(distance(layout, each) for each in fit)[:3]


@pytest.mark.parametrize("world", [8, 12])
def test_every_view_of_every_layout_is_the_ranks_in_order(world: int) -> None:
    """Any axes of any view part the ranks: disjoint groups of one size, each in order, which together are all."""
    for layout in legal(world):
        for view in views(layout).values():
            assert math.prod(view.values()) == world
            assert [tuple(coordinates(view, r).values()) for r in range(world)] == list(
                itertools.product(*map(range, view.values()))
            )
            for axes in itertools.chain(((a,) for a in view), itertools.combinations(view, 2)):
                groups = slices(view, axes)
                assert sorted(itertools.chain(*groups)) == list(range(world))
                assert {len(g) for g in groups} == {math.prod(view[a] for a in axes)}
                assert all(list(g) == sorted(g) for g in groups)
        stages = {tuple(slices(view, tuple(a for a in view if a != "pp"))) for view in views(layout).values()}
        assert len(stages) == 1


def test_copies_of_the_weights_are_slices_of_dp() -> None:
    seen = views(Layout(dp=4, cp=2, tp=1, ep=2, replicate=2))
    assert seen["fsdp"] == {"pp": 1, "replicate": 2, "shard": 4, "tp": 1}
    assert slices(seen["fsdp"], ("shard",)) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert slices(seen["experts"], ("shard",)) == [(0, 2), (1, 3), (4, 6), (5, 7)]


FOLDS = {
    "dp=2 cp=2 tp=4 ep=4 etp=2": {"ep": ("cp", "tp"), "etp": ("tp",), "edp": ("dp",)},
    "dp=8 ep=4": {"ep": ("dp",), "etp": (), "edp": ("dp",)},
    "pp=2 dp=2 cp=2 tp=2 ep=8": {"ep": ("dp", "cp", "tp"), "etp": (), "edp": ()},
    "dp=2 tp=2 etp=4": {"ep": (), "etp": ("dp", "tp"), "edp": ()},
    "cp=4 tp=2 dp=1 ep=2 etp=2": {"ep": ("cp",), "etp": ("tp",), "edp": ("cp",)},
    "dp=2 tp=6 ep=4": {"ep": ("dp", "tp"), "etp": (), "edp": ("dp", "tp")},  # ranks 4 to 7 lie on both sides of dp
    "dp=1": {"ep": (), "etp": (), "edp": ()},
}


def degrees(words: str) -> dict[str, int]:
    return {key: int(value) for key, value in (word.split("=") for word in words.split())}


@pytest.mark.parametrize("words", FOLDS)
def test_folds(words: str) -> None:
    assert folds(Layout(**degrees(words))) == FOLDS[words]


WORLD_RULES = {
    "both ways are given and do not fit": (
        "dp=2 tp=2", 6,
        "layout pp*dp*cp*tp = 1*2*1*2 = 4 does not equal the 6 ranks there are: start 4 ranks or set layout.dp=-1; "
        "nearest legal: pp=1 dp=3 cp=1 tp=2 ep=1 etp=1 or ",
    ),
    "the dense view": (
        "pp=2 tp=2", 6,
        "layout pp*cp*tp = 2*1*2 = 4 does not divide the 6 ranks there are: start a multiple of 4 ranks or lower pp, "
        "cp or tp; nearest legal: pp=2 dp=1 cp=1 tp=3 ep=1 etp=1 or pp=3 dp=1 cp=1 tp=2 ep=1 etp=1 or ",
    ),
    "the expert view": (
        "dp=2 ep=4", 2,
        "layout pp*ep*etp = 1*4*1 = 4 does not divide the 2 ranks there are: ep*etp has to divide dp*cp*tp = 2; "
        "nearest legal: pp=1 dp=2 cp=1 tp=1 ep=2 etp=1 or pp=1 dp=2 cp=1 tp=1 ep=1 etp=1 or ",
    ),
    "copies of the weights": (
        "dp=4 replicate=3", 4,
        "layout.replicate=3 does not divide dp=4: each copy of the weights takes a whole number of data-parallel "
        "ranks, use one of [1, 2, 4]; nearest legal: pp=1 dp=4 cp=1 tp=1 ep=1 etp=1 or ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WORLD_RULES)
def test_what_a_world_refuses(case: str) -> None:
    words, world, says = WORLD_RULES[case]
    with pytest.raises(UserError) as caught:
        Layout(**degrees(words)).solve(world)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_what_a_world_refuses_is_refused_with_the_model_too() -> None:
    assert (broken_rule(Layout(dp=4, replicate=3), SMALL) or "").startswith("layout.replicate=3 does not divide dp=4")
    assert (broken_rule(Layout(dp=2, ep=4), SMALL) or "").startswith("layout pp*ep*etp = 1*4*1 = 4 does not divide")
    with pytest.raises(UserError, match=r"nearest legal: pp=1 dp=2 cp=3 tp=1 ep=2 etp=1 or pp=1 dp=2 cp=3 tp=1 ep=1 "):
        Layout(dp=2, cp=3, ep=4).solve(6, SMALL)  # without the model: ep=3 is nearer
    with pytest.raises(UserError, match=r"nearest legal: pp=1 dp=2 cp=3 tp=1 ep=3 etp=1 or "):
        Layout(dp=2, cp=3, ep=4).solve(6)


@pytest.mark.parametrize("axis", [*AXES, "replicate"])
def test_a_degree_below_one(axis: str) -> None:
    with pytest.raises(UserError, match=rf"layout.{axis}=0: a degree is at least 1"):
        Layout(**{axis: 0})


MODEL_RULES = {
    "tp and the heads": (
        "dp=1 tp=8", {},
        "layout.tp=8 does not divide model.num_heads=12: use one of [1, 2, 4, 12]; "
        "nearest legal: pp=1 dp=2 cp=1 tp=4 ep=1 etp=1 or pp=1 dp=1 cp=2 tp=4 ep=1 etp=1 or ",
    ),
    "tp and the key-value heads": (
        "dp=1 tp=6", {},
        "layout.tp=6 and model.num_kv_heads=4: one has to divide the other, so that each rank has whole key-value "
        "heads or a copy of one, use one of [1, 2, 4, 12]; nearest legal: pp=1 dp=3 cp=1 tp=2 ep=1 etp=1 or ",
    ),
    "ep and the experts": (
        "dp=6 ep=3", {},
        "layout.ep=3 does not divide model.moe.num_experts=8: use one of [1, 2, 4, 8]; "
        "nearest legal: pp=1 dp=6 cp=1 tp=1 ep=2 etp=1 or pp=1 dp=6 cp=1 tp=1 ep=1 etp=1 or ",
    ),
    "pp and the layers": (
        "dp=1 pp=8", {},
        "layout.pp=8 is more than model.num_layers=4: a stage takes at least one layer, use layout.pp=4 or less; "
        "nearest legal: pp=4 dp=2 cp=1 tp=1 ep=1 etp=1 or ",
    ),
    "cp and the heads of a rank, with ulysses": (
        "dp=1 cp=4 tp=2", {"ulysses": True},
        "layout.cp=4 does not divide model.num_heads / layout.tp = 12 / 2 = 6, as ulysses needs: use one of "
        "[1, 2, 3, 6] or context.method=allgather; nearest legal: pp=1 dp=2 cp=4 tp=1 ep=1 etp=1 or "
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODEL_RULES)
def test_what_a_model_refuses(case: str) -> None:
    words, more, says = MODEL_RULES[case]
    layout, shape = Layout(**degrees(words)), ModelShape(**vars(SMALL) | more)
    rule = broken_rule(layout, shape)
    assert rule is not None
    assert rule.startswith(says), rule
    assert "\n" not in rule
    assert broken_rule(layout, shape, near=0) == rule.split("; nearest legal: ")[0]
    for near in rule.split("; nearest legal: ")[1].split(" or "):
        proposed = Layout(**degrees(near))
        assert proposed.world == layout.world
        assert broken_rule(proposed, shape) is None


def test_nothing_else_is_refused() -> None:
    """Copied key-value heads, uneven stages, any etp, any cp without ulysses, any ep of a model without experts."""
    for words in ("dp=1 tp=12", "dp=1 pp=3", "dp=35 ep=1 etp=35", "dp=1 cp=7", "pp=4 dp=1 tp=4 ep=2 etp=2"):
        assert broken_rule(Layout(**degrees(words)), SMALL) is None, words
    assert broken_rule(Layout(dp=35, ep=35), ModelShape(num_layers=1, num_heads=1, num_kv_heads=1)) is None
    assert broken_rule(Layout(dp=1, cp=3, tp=4), ModelShape(**vars(SMALL) | {"ulysses": True})) is None


def test_divisors() -> None:
    assert [divisors(n) for n in (1, 7, 12, 16)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16]]


MODEL = ["model.num_heads=8", "model.num_kv_heads=4", "model.num_layers=4", "model.moe.num_experts=8"]


def printed(capsys, words: str, code: int = 0) -> list[str]:
    assert main(["layout", *MODEL, *words.split()]) == code
    out, err = capsys.readouterr()
    assert bool(out) != bool(err)
    return (out + err).splitlines()


def test_the_table_of_two_nodes(capsys) -> None:
    lines = [" ".join(line.split()) for line in printed(capsys, "layout.dp=2 cp=2 layout.tp=4 ep=4 etp=2")]
    assert lines[0] == "layout pp1 dp2 cp2 tp4 ep4 etp2 edp2: 16 ranks on 2 nodes of 8"
    assert lines[1] == "ep folds over cp, tp; etp folds over tp; edp folds over dp"
    assert lines[2] == "8 experts, a rank holds 1/2 of each of 2"
    first, second = lines.index("node 0"), lines.index("node 1")
    assert lines[first + 1] == lines[second + 1] == "rank | pp dp cp tp | pp edp ep etp | experts"
    assert lines[first + 2] == "0 | 0 0 0 0 | 0 0 0 0 | 0-1"
    assert lines[first + 8] == "6 | 0 0 1 2 | 0 0 3 0 | 6-7"
    assert lines[second + 5] == "11 | 0 1 0 3 | 0 1 1 1 | 2-3"
    groups = lines[lines.index("group size stride groups across nodes") + 1 :]
    assert groups == [
        "tp 4 1 4 none",
        "cp 2 4 8 none",
        "dp 2 8 8 all",
        "sequence = cp*tp 8 1 2 none",
        "dp*cp storage 4 4 4 all",
        "ep*etp 8 1 2 none",
        "ep 4 2 4 none",
        "etp 2 1 8 none",
        "edp 2 8 8 all",
        "pp 1 - - -",
    ]


def test_groups_of_which_some_cross_nodes(capsys) -> None:
    lines = [
        " ".join(line.split())
        for line in printed(capsys, "dp=2 tp=6 model.num_heads=6 model.num_kv_heads=2 model.head_dim=32")
    ]
    assert "12 ranks on 2 nodes of 8" in lines[0]
    assert "tp 6 1 2 1 of 2" in lines


def test_copies_of_the_weights_have_a_column(capsys) -> None:
    lines = [" ".join(line.split()) for line in printed(capsys, "--ranks=8 replicate=2 ep=8 --node 4")]
    assert lines[0] == "layout pp1 dp8 cp1 tp1 ep8 etp1 edp1 replicate2: 8 ranks on 2 nodes of 4"
    assert "4 | 0 4 0 0 | 0 0 4 0 | 1 4" in lines
    assert "dp*cp/2 storage 4 1 2 none" in lines
    assert "replicate 2 4 4 all" in lines


def test_many_ranks_are_cut_short(capsys) -> None:
    short = printed(capsys, "--ranks 72 tp=4 ep=8")
    assert [line for line in short if line.startswith("node")] == ["node 0", "node 8"]
    assert "..." in short
    whole = printed(capsys, "--ranks 72 tp=4 ep=8 --all")
    assert [line for line in whole if line.startswith("node")] == [f"node {n}" for n in range(9)]
    assert "..." not in whole
    assert "node 1" in printed(capsys, "--ranks 64")


def test_without_ranks_the_fewest(capsys) -> None:
    assert printed(capsys, "dp=-1 cp=2 ep=4")[0].startswith("layout pp1 dp2 cp2 tp1 ep4 etp1 edp1: 4 ranks on 1 node")
    alone = printed(capsys, "")
    assert alone[0].endswith(": 1 rank on 1 node of 8")
    assert alone[1] == "nothing folds: one rank a stage"
    assert "experts" not in "\n".join(printed(capsys, "model.first_dense=4"))


def test_the_list_of_legal_layouts(capsys) -> None:
    lines = printed(capsys, "--legal 12")
    assert len(lines) == 461
    refused = [line for line in lines if "refused: " in line]
    assert lines[-1] == f"460 layouts of 12 ranks; this model takes {460 - len(refused)}"
    assert lines[0] == "pp=1 dp=12 cp=1 tp=1 ep=1 etp=1   edp=12"
    assert any("tp=3 ep=1" in line and "layout.tp=3 does not divide model.num_heads=8" in line for line in refused)
    assert all("nearest" not in line for line in refused)
    assert len(printed(capsys, "--legal 12 --pp 3")) == 37


BAD = {
    "--ranks 6 dp=2 tp=2": "does not equal the 6 ranks there are",
    "tp=16": "layout.tp=16 does not divide model.num_heads=8: use one of [1, 2, 4, 8]; nearest legal: ",
    "ep=3": "layout.ep=3 does not divide model.moe.num_experts=8: use one of [1, 2, 4, 8]; nearest legal: ",
    "cp=16 context.method=ulysses": "context.method=allgather; nearest legal: ",
    "tp=0": "layout.tp=0: a degree is at least 1",
    "tq=2": "unknown key 'tq'",
    "two": "'two' is not key=value",
    "--ranks": "--ranks without a number",
    "--ranks none": "--ranks none: give a whole number",
    "--node 0": "--node 0: give a whole number from 1",
    "--rank 4": "unknown option --rank; did you mean '--ranks'?",
    "--pp 2": "--pp 2 goes with --legal N: for one layout write pp=2",
    "--legal 8 --pp 3": "--pp 3 does not divide the 8 ranks: use one of [1, 2, 4, 8]",
    "--legal 8 tp=2": "layout.tp=2 says nothing beside --legal",
    "--legal 8 --node 4": "--node says nothing beside --legal",
    "--legal 2520": "671,600 layouts are more than a list of 100,000",
    "dp=1000000": "asks for 1,000,000 ranks",
    "--config": "--config needs a file",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_words_are_one_line_and_exit_code_2(words: str, capsys) -> None:
    (line,) = printed(capsys, words, code=2)
    assert line.startswith("error: ")
    assert BAD[words] in line


def test_help(capsys) -> None:
    assert printed(capsys, "--help")[0].startswith("usage: moetrain layout")
    assert main([]) == 2
    assert "  layout " in capsys.readouterr().out
