"""The promise: on random layouts of random models, of the model of docs/verified.md, and on the presets' layouts."""

import random
import shlex
from pathlib import Path

import pytest
import torch
from drawn import ALL, commit, drawn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from test_verify import Pool

from moetrain.cli.compose import compose
from moetrain.cli.verify import _cases, _parser, _trials
from moetrain.config import load, replace
from moetrain.job import Config
from moetrain.layouts import Layout, broken_rule, legal
from moetrain.mesh import Mesh
from moetrain.model.flops import size
from moetrain.model.transformer import Transformer
from moetrain.moe.types import Dispatcher
from moetrain.parallel import ShardingConfig, parallelize, shape
from moetrain.parallel.context import ContextConfig
from moetrain.parallel.recompute import RecomputeConfig
from moetrain.parallel.schedules import PipelineConfig, Schedule, too_few
from moetrain.verify.report import parse, table, words
from moetrain.verify.session import Verdict, make_reference, verify
from moetrain.verify.shrink import shrink

ROOT = Path(__file__).parents[2]
DISPATCHERS = {
    "dropless": {"kind": "dropless"},
    "capacity that drops": {"kind": "capacity", "factor": 1.0},
    "capacity without drops": {"kind": "capacity", "factor": 64.0},
}


def check(verdict: Verdict) -> None:
    found = verdict.error if verdict.report is None else "\n".join(table(verdict.report))
    assert verdict.kind == "same", f"{verdict.layout}: {verdict.kind}\n{found}"


@st.composite
def jobs(draw, world: int) -> Config:
    """A legal layout of ``world`` ranks and a small model that it fits, shapes that nothing asks to divide included."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    n = draw(st.sampled_from([n for n in legal(world) if n.pp <= 4]))
    pipeline = PipelineConfig(schedule=draw(st.sampled_from([s.value for s in Schedule])), chunks=pick(1, 2, 3))
    stages = n.pp * pipeline.stages_a_rank if n.pp > 1 else 1
    enough = [m for m in (1, 2, 3, 4, 6, 8) if n.pp == 1 or not too_few(pipeline, pp=n.pp, micro_batches=m)]
    ulysses = draw(st.booleans())
    heads = n.tp * (n.cp if ulysses else 1) * pick(1, 2, 3)
    fits = [k for k in range(1, heads + 1) if heads % k == 0 and (k % n.tp == 0 or n.tp % k == 0)]
    experts = n.ep * pick(1, 2, 3)
    replicate = draw(st.sampled_from([d for d in range(1, n.dp + 1) if n.dp % d == 0]))
    micro_batch = pick(1, 2)
    balance = [k for k in ("switch", "sequence", "z_loss", "expert_bias") if draw(st.booleans())]
    top_k = draw(st.integers(1, min(3, experts)))
    moe = {
        "num_experts": experts, "hidden": pick(4, 5, 12), "shared_hidden": pick(0, 6, 7),
        "shared_gate": draw(st.booleans()), "balance": {k: {"kind": k} for k in balance},
        "router": {"kind": "topk", "top_k": top_k, "score": pick("softmax", "sigmoid"), "renormalize": top_k > 1},
        "dispatcher": DISPATCHERS[draw(st.sampled_from(sorted(DISPATCHERS)))],
    }  # fmt: skip
    model = {
        "vocab_size": pick(50, 64), "pad_vocab_to": pick(1, 8), "dim": pick(16, 18), "num_layers": max(2, stages) + pick(0, 1),
        "num_heads": heads, "num_kv_heads": draw(st.sampled_from(fits)), "head_dim": pick(2, 4),
        "qk_norm": pick("none", "head", "full"), "qkv_bias": draw(st.booleans()), "first_dense": pick(0, 1),
        "windows": pick([], [], [3], [5, 0], [0, 1]), "moe_every": pick(1, 1, 2), "dense_hidden": pick(8, 9), "tie_embeddings": draw(st.booleans()),
        "init_std": 0.1, "moe": moe,
    }  # fmt: skip
    train = {
        "batch": n.dp * micro_batch * draw(st.sampled_from(enough)), "micro_batch": micro_batch, "seq_len": draw(st.integers(2, 19)),
        "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    data = {"mask_documents": draw(st.booleans()), "ignore_tokens": pick([], [3, 5])}
    sharding = {"dense": pick(2, 3), "experts": pick(2, 3), "accumulate": pick("local", "sharded")}
    layout = {axis: getattr(n, axis) for axis in ("pp", "dp", "cp", "tp", "ep", "etp")} | {"replicate": replicate}
    context = {"method": "ulysses" if ulysses else "allgather"}
    recompute: dict = {"mode": pick("none", "full", "selective"), "loss_rows": pick(0, 5)}
    if recompute["mode"] == "selective":
        recompute["parts"] = pick(None, ["norm"], ["attention", "experts_activation"], ["norm", "attention", "moe"])
    parts = {"model": model, "layout": layout, "context": context, "sharding": sharding, "data": data, "train": train}
    parts["pipeline"] = {"schedule": pipeline.schedule, "chunks": pipeline.chunks}
    parts["optim"] = {"kind": pick("adamw", "muon")}
    return load(parts | {"recompute": recompute, "seed": draw(st.integers(0, 9))}, Config)


@pytest.mark.parametrize(("world", "examples"), [(2, 20), (4, 20), (8, 5)] if ALL else [(2, 4), (4, 3), (8, 1)])
def test_any_legal_layout_of_any_model_is_the_run_of_one_rank(ranks, tmp_path_factory, world, examples) -> None:
    pool = Pool(ranks(world))

    @seed(commit())
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(jobs(world))
    def same(cfg: Config) -> None:
        folder = tmp_path_factory.mktemp("job")
        reference = make_reference(cfg, pool, folder / "reference")
        check(verify(cfg.layout.solve(world), reference, pool, folder / "layout"))

    same()


@pytest.mark.parametrize(("world", "number"), [(4, 1), (8, 1)])
@pytest.mark.parametrize("pipeline", [False, True], ids=["one stage", "pipeline"])
def test_a_sample_of_the_layouts_drawn_by_the_commit(ranks, tmp_path, world, number, pipeline) -> None:
    """Of docs/verified.md: other layouts and schedules at each commit, over time all of them."""
    luck = random.Random(f"{commit()} {world} {pipeline}")
    schedule, deep = luck.choice([s.value for s in Schedule]), ["model.num_layers=8", "train.batch=16"]
    cfg = compose(["experiment=verified", *([f"pipeline.schedule={schedule}", *deep] if pipeline else [])])
    name, dispatcher = luck.choice(sorted(DISPATCHERS.items()))
    cfg = replace(cfg, model=replace(cfg.model, moe=replace(cfg.model.moe, dispatcher=load(dispatcher, Dispatcher))))
    pool = Pool(ranks(world))
    reference = make_reference(cfg, pool, tmp_path / "reference")
    for layout in luck.sample([n for n in legal(world) if n.pp in ((2, 4) if pipeline else (1,))], number):
        print(f"{name}, {schedule}: {layout}")
        check(verify(layout, reference, pool, tmp_path / "layout"))


PUBLISHED = {
    # arXiv 2504.14960's mapping: TP2 EP8 ETP1 PP8, at 1,024 GPUs
    "mixtral_8x22b": "layout.pp=8 layout.dp=64 layout.tp=2 layout.ep=8 pipeline.schedule=interleaved",
    "mixtral_8x7b": "layout.dp=64 layout.ep=8",
    # Megatron Bridge's guide: TP4 EP4 PP2, TP1 EP8
    "qwen3_30b_a3b": "layout.pp=2 layout.dp=16 layout.tp=4 layout.ep=4",
    "olmoe_1b_7b": "layout.dp=256 layout.ep=8",
    # in the same manner: one expert a rank, zero bubble; long rows and expert TP
    "qwen2_57b_a14b": "layout.pp=4 pipeline.schedule=zbv layout.dp=32 layout.tp=4 layout.ep=64",
    "deepseek_moe_16b": "layout.dp=16 layout.cp=4 layout.ep=32 layout.etp=2 dispatcher=capacity",
}


@pytest.mark.parametrize("preset", drawn(PUBLISHED, 3, of="presets"))
def test_the_presets_layouts_shrink_and_pass(ranks, tmp_path, preset) -> None:
    cfg = compose(
        [f"model={preset}", *PUBLISHED[preset].split(), "train.batch=1024", "train.micro_batch=1", "train.seq_len=4096"]
    )
    world = cfg.layout.world
    assert 64 <= world <= 1024
    small = shrink(cfg, world=world, ranks=8)
    pool = Pool(ranks(small.cfg.layout.world))
    reference = make_reference(small.cfg, pool, tmp_path / "reference")
    check(verify(small.cfg.layout, reference, pool, tmp_path / "layout"))


def test_every_preset_has_a_layout_here() -> None:
    presets = {p.stem for p in (ROOT / "configs/model").glob("*.yaml")} - {"tiny"}
    assert presets == set(PUBLISHED)


def test_the_page_of_verified_layouts_is_whole() -> None:
    """Every legal layout of 1, 2, 4 and 8 ranks, for dropless and capacity dispatch and with pp > 1 for four schedules,
    and five dimensions on 16; and all that is there is the same."""
    page = parse(ROOT / "docs/verified.md")
    wanted = {words(n) for world in (1, 2, 4, 8) for n in legal(world, pp=1)}
    for case in ("dropless", "capacity"):
        assert {layout for name, layout, _ in page if name == case} == wanted, case
    deep = {words(n) for world in (2, 4, 8) for n in legal(world) if n.pp > 1}
    deep |= {words(n) for n in legal(16, pp=2) if (n.dp, n.cp, n.tp) == (2, 2, 2) and n.ep > 1 and n.etp < 4}
    for schedule in ("1f1b", "interleaved", "zbv", "dualpipev"):
        assert {layout for name, layout, _ in page if name.partition(",")[0] == schedule} == deep, schedule
    assert {verdict for _, _, verdict in page} == {"same"}
    shapes = shape(compose(["experiment=verified"]).model, ContextConfig())
    assert [n for world in (1, 2, 4, 8, 16) for n in legal(world, pp=1) if broken_rule(n, shapes)] == []


def test_the_page_is_what_make_verified_writes() -> None:
    """Its commands are the Makefile's, its model the config's, and it has the layouts that they would visit."""
    page, makefile = (ROOT / "docs/verified.md").read_text(), (ROOT / "Makefile").read_text()
    recipes = [part.partition(" $(ARGS)")[0] for part in makefile.split("-m moetrain verify ")[1:]]
    recipes = [recipe for recipe in recipes if "--write docs/verified.md" in recipe]
    commands = [shlex.split(part.partition("\n```")[0]) for part in page.split("```bash\n")[1:]]
    assert commands == [["moetrain", "verify", *shlex.split(recipe.replace("\\\n", " "))] for recipe in recipes]
    assert f"- model: {size(compose(['experiment=verified']).model)}\n" in page
    visited = []
    for command in commands:
        options, _ = _parser().parse_known_args(command[2:])
        for name, case in _cases(options).items():
            visited += [(name, words(n)) for layouts in _trials(case, options.seed).values() for n in layouts]
    assert sorted(visited) == sorted((case, layout) for case, layout, _ in parse(ROOT / "docs/verified.md"))


def undeclared(rank: int, world: int) -> str:
    cfg = compose(["experiment=verified"]).model
    mesh = Mesh.build(Layout(dp=1, tp=world), rank=rank, world=world, device=torch.device("cpu"))
    build = Transformer.__init__

    def with_one_more(self, *args, **kwargs) -> None:
        build(self, *args, **kwargs)
        self.surprise = torch.nn.Parameter(torch.empty(3))

    Transformer.__init__ = with_one_more
    try:
        parallelize(
            cfg, mesh, sharding=ShardingConfig(), context_cfg=ContextConfig(), stages=PipelineConfig(),
            recompute_cfg=RecomputeConfig(), dtype=torch.float32,
        )  # fmt: skip
    except RuntimeError as e:
        return str(e)
    finally:
        Transformer.__init__ = build
    return ""


def test_a_parameter_whose_sum_nobody_declared_fails_when_the_model_is_built(ranks) -> None:
    for said in ranks(2).run(undeclared):
        assert said.startswith("surprise: nobody declared which ranks hold it")
