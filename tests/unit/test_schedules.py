"""Schedules as tables: complete, free of deadlock on paper, and what one cannot run is said."""

import itertools
from collections import Counter

import pytest

from moetrain.config import UserError, replace
from moetrain.layouts import Layout
from moetrain.model.flops import layer_flops
from moetrain.model.transformer import ModelConfig
from moetrain.moe.layer import MoEConfig
from moetrain.parallel.pipeline import check_enough, even, stages
from moetrain.parallel.schedules import (
    RECEIVED_AS,
    STEP,
    Action,
    Kind,
    PipelineConfig,
    Schedule,
    delivered,
    table,
    too_few,
)  # fmt: skip

SHAPES = [
    (schedule, pp, chunks, n)
    for schedule, pp, chunks, n in itertools.product(Schedule, (2, 3, 4, 8), (1, 2, 3), (1, 2, 4, 5, 8, 16))
    if chunks == PipelineConfig(schedule=schedule.value, chunks=chunks).stages_a_rank
    and not too_few(PipelineConfig(schedule=schedule.value, chunks=chunks), pp=pp, micro_batches=n)
]


@pytest.mark.parametrize("schedule", Schedule)
def test_every_micro_batch_goes_once_through_every_stage(schedule) -> None:
    for _, pp, chunks, n in (s for s in SHAPES if s[0] is schedule):
        cfg = PipelineConfig(schedule=schedule.value, chunks=chunks)
        for rank, actions in enumerate(table(schedule, pp=pp, chunks=chunks, micro_batches=n)):
            count = Counter((a.kind, a.stage) for a in actions)
            assert {a.stage for a in actions} == set(cfg.stages_of(rank, pp=pp))
            for s in cfg.stages_of(rank, pp=pp):
                whole = count[Kind.backward, s]
                assert count[Kind.forward, s] == n
                assert whole + count[Kind.backward_input, s] == whole + count[Kind.backward_weight, s] == n
                assert schedule.splits_backward or whole == n


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("schedule", Schedule)
def test_no_rank_waits_forever_and_what_was_delivered_was_used(schedule, backward) -> None:
    """Ranks take turns; a receive needs its send, a message's pair keeps the order of both ends (NCCL has no tags)."""
    for _, pp, chunks, n in (s for s in SHAPES if s[0] is schedule):
        orders = table(schedule, pp=pp, chunks=chunks, micro_batches=n, backward=backward)
        cfg = PipelineConfig(schedule=schedule.value, chunks=chunks)
        used, sent, at = set(), set(), [0] * pp
        freed = [delivered(r, schedule, pp=pp, chunks=chunks, micro_batches=n, backward=backward) for r in range(pp)]
        while any(i < len(order) for i, order in zip(at, orders, strict=True)):
            before = list(at)
            for rank, order in enumerate(orders):
                while at[rank] < len(order):
                    kind, s, m = order[at[rank]]
                    needs = _needs(kind, s, m, cfg, rank, pp)
                    if needs is not None and needs not in sent:
                        break
                    if needs is not None:
                        for send in freed[rank].get(Action(RECEIVED_AS[needs.kind], s, m), ()):
                            assert send in used, f"{send} may still be on its way"
                        used.add(needs)
                    if kind in RECEIVED_AS:
                        sent.add(Action(kind, s, m))
                    at[rank] += 1
            assert at != before, f"{schedule} pp={pp} n={n}: ranks wait for one another at {at}"
        for a, b in itertools.permutations(range(pp), 2):
            out = [x for x in orders[a] if x.kind in RECEIVED_AS and cfg.rank_of(x.stage + STEP[x.kind], pp=pp) == b]
            arrives = [Action(RECEIVED_AS[x.kind], x.stage + STEP[x.kind], x.micro_batch) for x in out]
            assert arrives == [x for x in orders[b] if x in set(arrives)]


def _needs(kind: Kind, s: int, m: int, cfg: PipelineConfig, rank: int, pp: int) -> Action | None:
    """The message that a computation waits for."""
    sender = {Kind.forward: -1, Kind.backward: 1, Kind.backward_input: 1}.get(kind)
    if sender is None or not 0 <= s + sender < pp * cfg.stages_a_rank or cfg.rank_of(s + sender, pp=pp) == rank:
        return None
    return Action(Kind.send_forward if sender == -1 else Kind.send_backward, s + sender, m)


def test_one_f_one_b_holds_as_many_micro_batches_as_stages_are_left() -> None:
    for rank, actions in enumerate(table(Schedule.one_f_one_b, pp=4, chunks=1, micro_batches=16)):
        flying = most = 0
        for kind in (a.kind for a in actions):
            flying += {Kind.forward: 1, Kind.backward: -1}.get(kind, 0)
            most = max(most, flying)
        assert most == 4 - rank


def test_layers_are_dealt_by_cost() -> None:
    plain = ModelConfig(num_layers=12, vocab_size=256)
    assert even(plain, 4) == [3, 3, 3, 3]
    wide = replace(plain, vocab_size=32768)
    assert even(wide, 4)[-1] < 3, "the head counts"
    assert sum(even(wide, 4)) == 12
    mixed = replace(plain, first_dense=4, dense_hidden=4096, vocab_size=8192, moe=MoEConfig(hidden=16))
    costs = layer_flops(mixed)

    def most(sizes: list[int]) -> float:
        ends = list(itertools.accumulate(sizes))
        parts = [sum(costs[i] for i in range(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
        parts[0] += costs["embedding"]
        parts[-1] += costs["head"]
        return max(parts)

    every = [[a, b, 12 - a - b] for a in range(1, 11) for b in range(1, 12 - a)]
    assert most(even(mixed, 3)) == pytest.approx(min(map(most, every)))


V = PipelineConfig(schedule="zbv")


@pytest.mark.parametrize(
    ("layers", "pipeline", "line"),
    [
        (3, PipelineConfig(), "layout.pp=4 (pipeline.schedule=1f1b) makes 4 stages of model.num_layers=3 layers: each"),
        (7, V, "layout.pp=4 with 2 stages a rank (pipeline.schedule=zbv) makes 8 stages of model.num_layers=7 layers"),
        (
            8, PipelineConfig(schedule="interleaved", chunks=3),
            "makes 12 stages of model.num_layers=8 layers: each takes at least one, lower layout.pp or pipeline.chunks",
        ),
        (
            8, PipelineConfig(stages=[2, 2, 2]),
            "pipeline.stages=[2, 2, 2] is 3 stages of 6 layers, layout.pp=4 under pipeline.schedule=1f1b needs 4 of "
            "model.num_layers=8: for example [2, 2, 2, 2]",
        ),
        (8, PipelineConfig(stages=[2, 2, 2, 3]), "is 4 stages of 9 layers"),
    ],
)  # fmt: skip
def test_stages_that_do_not_add_up(layers, pipeline, line) -> None:
    with pytest.raises(UserError) as found:
        stages(ModelConfig(num_layers=layers, vocab_size=64), Layout(pp=4, dp=1), pipeline)
    assert line in str(found.value)


def test_stages_are_runs_of_layers() -> None:
    dealt = stages(ModelConfig(num_layers=8, vocab_size=64), Layout(pp=2, dp=1), PipelineConfig(stages=[5, 3]))
    assert [(s.layers, s.first, s.last) for s in dealt] == [(range(5), True, False), (range(5, 8), False, True)]


@pytest.mark.parametrize(
    ("pipeline", "n", "line"),
    [
        (
            PipelineConfig(schedule="dualpipev"), 7,
            "pipeline.schedule=dualpipev needs 2 * layout.pp = 8 micro-batches a step or more, there are 7: raise "
            "train.batch",
        ),
        (
            PipelineConfig(schedule="interleaved"), 9,
            "pipeline.schedule=interleaved deals micro-batches in equal rounds of at least layout.pp=4: 9 do not "
            "divide into 2",
        ),
    ],
)  # fmt: skip
def test_micro_batches_that_a_schedule_cannot_run(pipeline, n, line) -> None:
    with pytest.raises(UserError) as found:
        check_enough(Layout(pp=4, dp=1), pipeline, micro_batches=n)
    assert line in str(found.value)
    assert "or choose another schedule" in str(found.value)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"schedule": "zbw"}, "pipeline.schedule=zbw: no such schedule; did you mean 'zbv'? (there are: 1f1b, inter"),
        ({"chunks": 0}, "pipeline.chunks=0: a rank has at least one stage"),
        ({"stages": [3, 0]}, "pipeline.stages=[3, 0]: each stage takes at least one layer"),
    ],
)
def test_words_that_make_no_pipeline(keys, line) -> None:
    with pytest.raises(UserError) as found:
        PipelineConfig(**keys)
    assert line in str(found.value)
