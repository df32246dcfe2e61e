"""A shrunk config keeps what could hide a bug: published layouts and random ones, each property worked out again."""

import functools
import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import config as configs
from moetrain.cli.compose import compose
from moetrain.config import UserError, replace
from moetrain.job import Config
from moetrain.layouts import Layout, ModelShape, broken_rule
from moetrain.model.attention import QKNorm
from moetrain.moe.zero_computation import KINDS, ZeroComputationConfig
from moetrain.parallel import recompute
from moetrain.parallel.context import Method
from moetrain.verify.shrink import Shrunk, shrink, table

AXES = ("pp", "dp", "cp", "tp", "ep", "etp", "edp")


def sizes(n: Layout) -> dict[str, int]:
    own = {axis: getattr(n, axis) for axis in AXES}
    return own | {"replicate": n.replicate, "dp/replicate": n.dp // n.replicate}


def strides(n: Layout) -> tuple[list[int], list[int]]:
    """Where tp, cp, dp and where etp, ep, edp end."""
    return [n.tp, n.tp * n.cp, n.tp * n.cp * n.dp], [n.etp, n.etp * n.ep, n.etp * n.ep * n.edp]


def lies_over(n: Layout) -> dict[str, tuple[str, ...]]:
    """Along which dense axes the ranks of one group of an expert axis differ."""
    found: dict[str, set[str]] = {axis: set() for axis in ("edp", "ep", "etp")}
    first: dict[tuple, tuple[int, int, int]] = {}
    for rank in range(n.dp * n.cp * n.tp):
        dense = rank // n.tp // n.cp, rank // n.tp % n.cp, rank % n.tp
        at = {"edp": rank // n.etp // n.ep, "ep": rank // n.etp % n.ep, "etp": rank % n.etp}
        for axis in found:
            other = first.setdefault((axis, *(i for name, i in at.items() if name != axis)), dense)
            found[axis] |= {name for name, a, b in zip(("dp", "cp", "tp"), dense, other, strict=True) if a != b}
    return {axis: tuple(d for d in ("dp", "cp", "tp") if d in over) for axis, over in found.items()}


def shape(cfg: Config) -> ModelShape:
    m, ulysses = cfg.model, cfg.context.method is Method.ulysses
    return ModelShape(
        m.num_layers, m.num_heads, m.num_kv_heads, tuple(sorted({x.num_experts for x in m.moe_configs})), ulysses
    )


def compare(a: int, b: int) -> str:
    return "less" if a < b else "equal" if a == b else "more"


def divides(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0


def facts(cfg: Config) -> Mapping[str, object]:
    """Every property, worked out from the config alone, under the name that a lost one has."""
    n, m, t = cfg.layout, cfg.model, cfg.train
    moe, layers = m.moe, m.moe_layers
    heads, kv, head_dim = m.num_heads, m.num_kv_heads, m.width_of_heads
    copies = math.gcd(n.replicate, n.edp)
    shards, expert_shards = n.dp * n.cp // n.replicate, n.edp // copies
    dense, experts = strides(n)
    ends = sorted({*dense, *experts})
    width = math.ceil(moe.hidden / n.etp)
    rows = m.padded_vocab(n.tp)
    unit = 2 * n.cp * n.tp if n.cp > 1 else n.tp
    part = math.ceil(t.seq_len / unit)
    steps = t.batch // (n.dp * t.micro_batch)
    stages = [range(i * m.num_layers // n.pp, (i + 1) * m.num_layers // n.pp) for i in range(n.pp)]
    across = n.tp * n.cp if cfg.context.method is Method.ulysses and n.cp > 1 else None
    return {axis: size > 1 for axis, size in sizes(n).items()} | {
        "strides nest": all(b % a == 0 for a, b in itertools.pairwise(ends)),
        **{f"{axis} lies over": over for axis, over in lies_over(n).items()},
        "ep > tp": n.ep > n.tp,
        "pp > 2": n.pp > 2,
        "shards of dense weights": shards > 1,
        "copies of expert weights": copies > 1,
        "shards of expert weights": expert_shards > 1,
        "kv heads": kv > 1,
        "kv heads against tp": (compare(kv, n.tp), divides(kv, n.tp)),
        "query heads of a kv head": heads > kv,
        "query heads of a tp rank": (heads % n.tp == 0, heads > n.tp),
        "query heads over tp * cp (ulysses)": across and (heads % across == 0, heads > across),
        "kv heads against tp * cp (ulysses)": across and (compare(kv, across), divides(kv, across)),
        "heads * head_dim against dim": compare(heads * head_dim, m.dim),
        "dim, multiple of 8": [m.dim % power == 0 for power in (2, 4, 8)],
        "dim over shards of dense weights": m.dim % shards == 0,
        "MoE layers": ["none", "one", "several"][min(len(layers), 2)],
        "first_dense": m.first_dense > 0,
        "moe_every": m.moe_every > 1,
        "the last layer is MoE": m.is_moe(m.num_layers - 1),
        "layers over stages": (m.num_layers % n.pp == 0, m.num_layers > n.pp),
        "windows of attention": min(len({m.window(i) for i in range(m.num_layers)}), 2),
        "stages without MoE": any(not set(stage) & set(layers) for stage in stages),
        "top_k": "1" if moe.router.top_k == 1 else "2" if moe.router.top_k == 2 else "more",
        "top_k < experts": moe.router.top_k < moe.num_experts,
        "experts of an ep rank": (moe.num_experts % n.ep == 0, moe.num_experts > n.ep),
        "a rank's experts over their shards": moe.num_experts // n.ep % expert_shards == 0,
        "zero-computation experts": [min(getattr(moe.zero_computation, kind), 2) for kind in KINDS],
        "hidden over etp": moe.hidden % n.etp == 0,
        "hidden of an etp rank, multiple of 8": [width % power == 0 for power in (2, 4, 8)],
        "hidden of an etp rank over expert shards": width % expert_shards == 0,
        "dense_hidden over tp": m.dense_hidden % n.tp == 0,
        "shared expert": moe.shared_hidden > 0,
        "shared_hidden over tp": moe.shared_hidden % n.tp == 0,
        "vocab_size over tp": m.vocab_size % n.tp == 0,
        "vocab_size over pad_vocab_to": m.vocab_size % m.pad_vocab_to == 0,
        "pad_vocab_to over tp": m.pad_vocab_to % n.tp == 0,
        "pad_vocab_to": m.pad_vocab_to > 1,
        "a tp rank with only padding of the vocabulary": rows - rows // n.tp >= m.vocab_size,
        "seq_len over 2 * cp * tp": [t.seq_len % x == 0 for x in (unit, n.tp, unit // n.tp)],
        "a rank with only padding of a row": (unit - 1) * part >= t.seq_len,
        "micro_batch": t.micro_batch > 1,
        "micro-batches of a rank": (steps > 1, steps >= n.pp, steps % n.pp == 0),
    }  # fmt: skip


def solved(cfg: Config, world: int) -> Config:
    return replace(cfg, layout=cfg.layout.solve(world))


def differing(big: Config, small: Config) -> set[str]:
    before, after = facts(big), facts(small)
    return {name for name in before if before[name] != after[name]}


CHANGED = {
    "layout": set(sizes(Layout(dp=1))),
    "model": {
        "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "first_dense", "moe_every",
        "dense_hidden", "pad_vocab_to", "init_std", "moe.num_experts", "moe.hidden", "moe.shared_hidden",
        "moe.router.top_k", *(f"moe.zero_computation.{kind}" for kind in KINDS),
    },
    "train": {"steps", "batch", "micro_batch", "seq_len", "ramp.start"},
    "optim": {"warmup", "decay"},
    "checkpoint": {"every"},
    "data": {"ignore_tokens"},
}  # fmt: skip


def leaves(node, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {prefix.removeprefix("."): node}
    return {key: leaf for name, child in node.items() for key, leaf in leaves(child, f"{prefix}.{name}").items()}


def check(cfg: Config, got: Shrunk, *, world: int, ranks: int = 16) -> None:
    """What holds whatever the config."""
    big, small = solved(cfg, world), got.cfg
    assert small.layout.world <= ranks
    assert small.layout.solve(small.layout.world) == small.layout
    before, after = sizes(big.layout), sizes(small.layout)
    assert all(after[axis] == 1 for axis, size in before.items() if size == 1)
    lost = [line.partition(": ")[0] for line in got.lost]
    assert len(lost) == len(set(lost))
    assert set(lost) - {"batch ramp"} == differing(big, small), got.lost
    assert ("batch ramp" in lost) == (cfg.train.ramp.start > 0)
    allowed = {f"{node}.{key}" for node, keys in CHANGED.items() for key in keys}
    old, new = leaves(configs.dump(cfg)), leaves(configs.dump(small))
    assert old.keys() == new.keys()
    assert {key for key in old if old[key] != new[key]} <= allowed
    t = small.train
    assert t.batch % (small.layout.dp * t.micro_batch) == 0
    assert (t.steps, small.optim.warmup, small.checkpoint.every, t.ramp.start) == (1, 0, 0, 0)
    assert small.optim.lr_at(0, steps=t.steps) == pytest.approx(small.optim.lr)
    assert bool(cfg.data.ignore_tokens) == bool(small.data.ignore_tokens)
    assert all(0 <= token < small.model.vocab_size for token in small.data.ignore_tokens)
    assert configs.load(configs.dump(small), Config) == small
    again = shrink(small, world=small.layout.world, ranks=ranks)
    assert again.lost == []
    assert again.cfg == small


PUBLISHED = {  # preset, ranks, layout and other keys -> the shrunk layout, what is lost
    "mixtral_8x22b": ("mixtral_8x22b", 128, "dp=8 cp=2 tp=8 ep=8", "pp1 dp2 cp2 tp4 ep4 etp1 edp4", set()),
    "qwen2_57b_a14b": ("qwen2_57b_a14b", 64, "tp=4 ep=4", "pp1 dp2 cp1 tp2 ep2 etp1 edp2", set()),
    "deepseek_moe_16b": ("deepseek_moe_16b", 64, "dp=64 ep=8", "pp1 dp4 cp1 tp1 ep2 etp1 edp2", set()),
    "more tp than kv heads, ep over tp and dp": (
        "qwen3_30b_a3b", 256, "tp=8 ep=64", "pp1 dp4 cp1 tp4 ep8 etp1 edp2", set(),
    ),
    "expert TP": ("mixtral_8x7b", 64, "tp=2 ep=8 etp=2", "pp1 dp8 cp1 tp2 ep4 etp2 edp2", set()),
    "expert TP inside tp": ("mixtral_8x7b", 64, "tp=4 ep=8 etp=2", "pp1 dp4 cp1 tp4 ep4 etp2 edp2", {"ep > tp"}),
    "pipeline": ("mixtral_8x22b", 1024, "pp=8 cp=2 tp=4 ep=8", "pp2 dp2 cp2 tp2 ep4 etp1 edp2", {"pp > 2"}),
    "pipeline of many stages": (
        "deepseek_moe_16b", 512, "pp=4 ep=64", "pp4 dp4 cp1 tp1 ep2 etp1 edp2", {"experts of an ep rank"},
    ),
    "several experts a rank": ("deepseek_moe_16b", 512, "pp=4 ep=16", "pp4 dp4 cp1 tp1 ep2 etp1 edp2", set()),
    "HSDP": ("olmoe_1b_7b", 512, "ep=8 replicate=8", "pp1 dp8 cp1 tp1 ep2 etp1 edp4 replicate2", set()),
    "everything": (
        "mixtral_8x22b", 1024, "pp=2 cp=8 tp=8 ep=8 etp=2 replicate=2", "pp2 dp2 cp2 tp2 ep2 etp2 edp2 replicate2",
        {
            "dp/replicate", "ep lies over", "edp lies over", "shards of expert weights", "experts of an ep rank",
            "a rank's experts over their shards",
        },
    ),
}  # fmt: skip


@functools.cache
def preset(name: str) -> Config:
    return compose([f"model={name}", "train.batch=1024", "train.micro_batch=1", "train.seq_len=4096"])


def job(name: str, words: str) -> Config:
    layout = {axis: int(size) for axis, size in (word.split("=") for word in words.split())}
    return replace(preset(name), layout=Layout(**layout))


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_layouts(case: str) -> None:
    name, world, words, layout, lost = PUBLISHED[case]
    cfg = job(name, words)
    got = shrink(cfg, world=world)
    assert str(got.cfg.layout) == layout
    assert {line.partition(": ")[0] for line in got.lost} == lost
    check(cfg, got, world=world)
    m, before = got.cfg.model, cfg.model
    assert max(m.dim, m.dense_hidden, m.moe.hidden, m.moe.shared_hidden, got.cfg.train.seq_len) <= 64
    assert m.vocab_size <= 256
    assert m.init_std == 0.1
    for name in ("gate", "dispatcher", "placement", "balance", "kernel"):
        assert getattr(m.moe, name) is getattr(before.moe, name)
    assert replace(m.moe.router, top_k=before.moe.router.top_k) == before.moe.router


def test_the_shapes_of_one_preset_each() -> None:
    small = shrink(job("qwen3_30b_a3b", "tp=8 ep=64"), world=256).cfg.model
    assert (small.num_kv_heads, small.num_heads, small.head_dim, small.dim) == (2, 8, 8, 32)
    assert small.qk_norm is QKNorm.head
    assert (small.moe.num_experts, small.moe.router.top_k) == (24, 3)  # 3 over 2 shards: uneven, as 2 over 4
    small = shrink(job("deepseek_moe_16b", "ep=8"), world=64).cfg.model
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == (2, 2, None)
    assert (small.num_layers, small.first_dense, small.moe_layers) == (3, 1, [1, 2])
    assert (small.moe.num_experts, small.moe.router.top_k, small.moe.shared_hidden) == (4, 3, 16)
    small = shrink(job("qwen2_57b_a14b", "tp=4 ep=4"), world=64).cfg.model
    assert small.qkv_bias
    assert small.moe.shared_gate
    assert (small.num_kv_heads, small.num_heads, small.norm_eps) == (2, 4, 1e-6)


def test_what_does_not_divide_still_does_not() -> None:
    words = [
        "model=deepseek_moe_16b", "model.vocab_size=50257", "model.dense_hidden=10946", "model.moe.hidden=1407",
        "model.moe.shared_hidden=2814", "model.num_layers=27", "train.seq_len=4097", "train.batch=384",
        "train.micro_batch=2", "layout.tp=4", "layout.cp=2", "layout.ep=4", "layout.etp=2", "layout.pp=2",
    ]  # fmt: skip
    cfg = compose(words)
    got = shrink(cfg, world=128)
    check(cfg, got, world=128)
    n, m, t = got.cfg.layout, got.cfg.model, got.cfg.train
    assert m.vocab_size % n.tp
    assert m.vocab_size % m.pad_vocab_to
    assert m.dense_hidden % n.tp
    assert m.moe.hidden % n.etp
    assert m.num_layers % n.pp
    assert t.seq_len % (2 * n.cp * n.tp)
    assert t.micro_batch == 2


def test_settings_that_are_not_shapes_survive() -> None:
    words = [
        "model=mixtral_8x7b", "dispatcher=capacity_1_25", "router=topk_sigmoid", "balance=[expert_bias,sequence]",
        "optim=wsd", "optim.decay=300", "data.mask_documents=true", "data.ignore_tokens=[0,31999,128]",
        "train.dtype=bfloat16", "train.deterministic=false", "sharding.dense=2", "sharding.accumulate=sharded",
        "context.method=ulysses", "layout.cp=4", "layout.tp=4", "layout.ep=8", "train.ramp.start=64",
        "train.ramp.increment=64", "train.ramp.samples=1000", "train.batch=128", "model.tie_embeddings=true",
        "model.rope.scaling=yarn", "model.rope.factor=4", "run.name=mine", "seed=7", "train.micro_batch=2",
    ]  # fmt: skip
    cfg = compose(words)
    got = shrink(cfg, world=64)
    check(cfg, got, world=64)
    small = got.cfg
    assert small.model.num_heads % (small.layout.tp * small.layout.cp) == 0
    assert small.data.ignore_tokens == [0, 127]  # 128 is 0 again
    assert [line for line in got.lost if "ramp" in line] == ["batch ramp: 64 -> none: one step is run"]


def test_five_factors_need_32_ranks() -> None:
    n = Layout(dp=8, cp=4, tp=4, ep=4, etp=2)  # strides 4, 16, 128 and 2, 8, 128
    base = Config()
    cfg = replace(base, layout=n, train=replace(base.train, batch=128))
    got = shrink(cfg, world=128)
    check(cfg, got, world=128)
    folds = [line for line in got.lost if "lies over" in line]
    assert folds
    assert all("the 5 factors of a stage's ranks, two ranks each, need 32 ranks; 16 allowed" in line for line in folds)
    more = shrink(cfg, world=128, ranks=32)
    assert more.cfg.layout == Layout(dp=2, cp=4, tp=4, ep=4, etp=2)
    assert not [line for line in more.lost if "lies over" in line]


def test_sizes_that_do_not_nest_stay_so() -> None:
    base = Config()
    model = replace(base.model, num_heads=12, num_kv_heads=12, head_dim=32)
    train = replace(base.train, batch=128)
    cfg = replace(base, layout=Layout(dp=16, tp=6, ep=8, etp=4), model=model, train=train)
    got = shrink(cfg, world=96)
    check(cfg, got, world=96)
    assert not any("nest" in line or "lies over" in line for line in got.lost)
    assert (got.cfg.layout.tp, got.cfg.layout.etp) == (3, 2)


def test_a_small_config_comes_back() -> None:
    model = replace(Config().model, dim=64, vocab_size=200, num_layers=4, dense_hidden=64)
    model = replace(model, moe=replace(model.moe, hidden=64))
    cfg = replace(Config(), model=model, layout=Layout(dp=4, cp=2, tp=2, ep=8))
    cfg = replace(cfg, train=replace(cfg.train, batch=32, seq_len=50))
    got = shrink(cfg, world=16)
    check(cfg, got, world=16)
    assert got.cfg.model is cfg.model
    assert got.cfg.layout == cfg.layout
    assert got.cfg.train == replace(cfg.train, steps=1)
    assert shrink(cfg, world=16, ranks=8).cfg.layout.world == 8


def test_fewer_ranks_lose_axes_and_say_so() -> None:
    cfg = job("mixtral_8x7b", "pp=2 cp=2 tp=2 ep=4")
    for ranks in (1, 2, 4, 8):
        got = shrink(cfg, world=64, ranks=ranks)
        check(cfg, got, world=64, ranks=ranks)
        assert any("does not fit into" in line for line in got.lost)
    with pytest.raises(UserError, match="at least 1 rank"):
        shrink(cfg, world=64, ranks=0)
    with pytest.raises(UserError, match="does not divide the 60 ranks"):
        shrink(cfg, world=60)


def test_the_table_names_everything_that_changed() -> None:
    cfg = job("mixtral_8x22b", "pp=8 cp=2 tp=4 ep=8")
    got = shrink(cfg, world=1024)
    lines = table(got)
    names = [name for name, _, _ in got.rows]
    changed = [name for name, before, after in got.rows if before != after]
    assert len(lines) == len(changed) + 1 + len(got.lost)
    assert set(facts(got.cfg)) <= set(names)
    assert names == [name for name, _, _ in shrink(cfg, world=1024).rows]
    assert all(line.startswith(name) for line, name in zip(lines, changed, strict=False))
    number = len(facts(got.cfg))
    assert lines[len(changed)] == f"kept: {number - len(got.lost)} of {number} properties"
    assert lines[-1].startswith("lost: ")
    assert "model.init_std (routing is decisive, no gradient is tiny)" in names


DIVIDE = (1, 1, 1, 2, 2, 3, 4, 5, 6, 8)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Config, int]:
    def divisor(n: int, most: int = 64) -> int:
        return draw(st.sampled_from([d for d in range(1, most + 1) if n % d == 0]))

    pp, cp, tp = (draw(st.sampled_from(DIVIDE)) for _ in range(3))
    dp = draw(st.integers(1, max(1, 1024 // (pp * cp * tp))))
    stage = dp * cp * tp
    etp = divisor(stage, 8)
    layout = Layout(pp=pp, dp=dp, cp=cp, tp=tp, etp=etp, ep=divisor(stage // etp), replicate=divisor(dp))
    ulysses = draw(st.booleans())
    heads = tp * (cp if ulysses else 1) * draw(st.integers(1, 6))
    head_dim = 2 * draw(st.integers(1, 64))
    dim = heads * head_dim if draw(st.booleans()) else draw(st.integers(16, 4096))
    experts = layout.ep * draw(st.integers(1, 16))
    base = Config()
    counts = st.sampled_from((0, 0, 1, 2, 6))
    extra = ZeroComputationConfig(**{kind: draw(counts) for kind in KINDS})
    top_k = draw(st.integers(1, min(8, experts + extra.total)))
    router = replace(base.model.moe.router, top_k=top_k, renormalize=top_k > 1)
    moe = replace(
        base.model.moe, router=router, num_experts=experts, hidden=draw(st.integers(16, 4096)),
        shared_hidden=draw(st.sampled_from((0, 17, 1408, 2816))), zero_computation=extra,
    )  # fmt: skip
    model = replace(
        base.model, moe=moe, num_heads=heads, num_kv_heads=divisor(heads), head_dim=head_dim, dim=dim,
        num_layers=pp * draw(st.integers(1, 8)) + draw(st.integers(0, 3)), first_dense=draw(st.integers(0, 3)),
        moe_every=draw(st.integers(1, 4)), dense_hidden=draw(st.integers(16, 4096)),
        vocab_size=draw(st.integers(100, 200_000)), pad_vocab_to=draw(st.sampled_from((1, 8, 64, 100, 128))),
    )  # fmt: skip
    micro = draw(st.integers(1, 4))
    train = replace(
        base.train, seq_len=draw(st.integers(128, 8192)), micro_batch=micro,
        batch=dp * micro * draw(st.integers(1, 32)), ramp=replace(base.train.ramp, start=draw(st.sampled_from((0, 8)))),
    )  # fmt: skip
    context = replace(base.context, method=Method.ulysses if ulysses else Method.allgather)
    data = replace(base.data, ignore_tokens=draw(st.lists(st.integers(0, 99), max_size=3)))
    cfg = replace(base, layout=layout, model=model, train=train, context=context, data=data)
    return (replace(cfg, layout=replace(layout, dp=-1)) if draw(st.booleans()) else cfg), layout.world


@settings(deadline=None, max_examples=60)
@given(jobs())
def test_any_job_shrinks_and_says_what_it_lost(drawn: tuple[Config, int]) -> None:
    cfg, world = drawn
    got = shrink(cfg, world=world)
    check(cfg, got, world=world)
    before, after = sizes(solved(cfg, world).layout), sizes(got.cfg.layout)
    assert all(after[axis] > 1 for axis in AXES if before[axis] > 1)
    if broken_rule(solved(cfg, world).layout, shape(cfg)) is None:
        assert broken_rule(got.cfg.layout, shape(got.cfg)) is None


def test_layers_to_recompute_stay_layers_of_the_model() -> None:
    """All MoE layers were, and one of the dense ones: all and the last of the new ones are."""
    layers = f"recompute.layers={[1, *range(3, 48)]}"
    words = ["model=qwen3_30b_a3b", "model.first_dense=3", "recompute.mode=full", layers]
    cfg = compose([*words, "layout.dp=16", "layout.tp=4", "layout.ep=4", "train.batch=1024", "train.seq_len=4096"])
    small = shrink(cfg, world=64, ranks=8).cfg
    first = small.model.first_dense
    assert small.model.num_layers < 48
    assert small.recompute.layers == [first - 1, *small.model.moe_layers]
    recompute.check(small.recompute, small.model)


@pytest.mark.parametrize(
    "words",
    [
        ["router=group_limited", "model.moe.router.num_groups=8", "model.moe.router.max_groups=3"],
        ["router=topk", "balance=[device]", "model.moe.balance.device.num_groups=16"],
    ],
    ids=str,
)
def test_as_many_experts_stay_as_the_router_and_the_balance_terms_take(words) -> None:
    cfg = compose(["model=deepseek_moe_16b", "layout.dp=8", "layout.ep=8", "train.batch=64", *words])
    shrunk = shrink(cfg, world=8).cfg
    shrunk.model.moe.check()
    assert shrunk.model.moe.num_experts < 64


@pytest.mark.parametrize(("node", "shrunk_to"), [(8, 2), (64, 4), (1, 1), (0, 0)])
def test_nodes_shrink_with_the_groups_of_experts(node, shrunk_to) -> None:
    words = ["model=deepseek_moe_16b", "layout.dp=64", "layout.ep=64", "train.batch=64", "train.micro_batch=1"]
    cfg = compose([*words, "dispatcher=hierarchical", f"model.moe.dispatcher.ranks_per_node={node}"])
    small = shrink(cfg, world=64).cfg
    assert small.layout.ep == 4
    assert small.model.moe.dispatcher.ranks_per_node == shrunk_to  # pyright: ignore[reportAttributeAccessIssue]
    small.model.moe.dispatcher.check(ranks=small.layout.ep * small.layout.etp)
