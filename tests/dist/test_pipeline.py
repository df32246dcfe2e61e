"""Steps through a pipeline are those of one rank: losses, held-out loss, norms, loads, every tensor of the checkpoint."""

import pytest
import torch
import whole
from drawn import drawn
from test_train import MODEL, TRAIN, close, config, curve, error
from torch import Tensor

from moetrain.config import config as config_node
from moetrain.config import replace
from moetrain.model.layers import Linear
from moetrain.moe.types import Carry, GateConfig

DEEP = MODEL | {"num_layers": 6, "first_dense": 2}
CASES = {
    "1f1b, uneven": (2, {"pp": 2}, {"stages": [4, 2]}, {}),
    "1f1b, more micro-batches in flight than ranks": (4, {"pp": 4}, {}, {"train": TRAIN | {"micro_batch": 1}}),
    "1f1b, one micro-batch": (2, {"pp": 2}, {}, {"train": TRAIN | {"micro_batch": 8}}),
    "interleaved, three stages a rank, two of all without MoE": (
        4, {"pp": 2, "dp": 2, "ep": 2}, {"schedule": "interleaved", "chunks": 3}, {},
    ),
    "interleaved zero bubble": (2, {"pp": 2}, {"schedule": "interleaved_zero_bubble"}, {}),
    "zbv, gathered weights dropped between": (
        4, {"pp": 2, "dp": 2}, {"schedule": "zbv"}, {"sharding": {"accumulate": "sharded"}},
    ),
    "dualpipev": (4, {"pp": 2, "tp": 2, "ep": 2}, {"schedule": "dualpipev"}, {"sharding": {"dense": 2}}),
    "tied, the ends apart": (4, {"pp": 2, "dp": 2, "replicate": 2}, {}, {"model": DEEP | {"tie_embeddings": True}}),
    "tied, the ends on one rank": (2, {"pp": 2}, {"schedule": "zbv"}, {"model": DEEP | {"tie_embeddings": True}}),
}  # fmt: skip


@pytest.mark.parametrize("case", drawn(CASES, 4, of="pipelines"))
def test_the_steps_are_those_of_one_rank(ranks, small_corpus, tmp_path, case) -> None:
    world, layout, pipeline, groups = CASES[case]
    groups = {"model": DEEP} | groups
    alone = config(small_corpus, tmp_path / "alone", **groups)
    want = ranks(1).run(curve, alone)[0]
    cfg = config(small_corpus, tmp_path / "pipeline", layout=layout, pipeline=pipeline, **groups)
    got = ranks(world).run(curve, cfg)
    assert all(g == got[0] for g in got), "ranks agree"
    close(got[0], want)
    saved = whole.tensors(whole.newest(alone.run.folder))
    for name, tensor in whole.tensors(whole.newest(cfg.run.folder)).items():
        assert error(tensor, saved[name]) < 1e-9, name


class DepthSum(torch.nn.Module):
    """A gate that sees what the gates before it saw."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.down, self.up = Linear(dim, 4), Linear(4, num_experts)

    def forward(self, x_TD: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        seen_TW = self.down(x_TD) + carry.get("seen", 0.0)
        return self.up(seen_TW), carry | {"seen": seen_TW}


@config_node
class DepthSumConfig(GateConfig):
    @property
    def carries(self) -> dict[str, int]:
        return {"seen": 4}

    def build(self, *, dim: int, num_experts: int) -> DepthSum:
        return DepthSum(dim, num_experts)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_what_gates_pass_on_crosses_stages_and_its_gradient_comes_back(ranks, small_corpus, tmp_path, schedule) -> None:
    curves = []
    for world in (1, 2):
        cfg = config(small_corpus, tmp_path / str(world), layout={"pp": world}, pipeline={"schedule": schedule}, model=DEEP)
        cfg = replace(cfg, model=replace(cfg.model, moe=replace(cfg.model.moe, gate=DepthSumConfig())))
        curves.append(ranks(world).run(curve, cfg)[0])
    close(*curves)


def test_a_pipeline_goes_on_where_another_layout_stopped(ranks, small_corpus, tmp_path) -> None:
    train = TRAIN | {"steps": 4}
    alone = config(small_corpus, tmp_path / "unbroken", model=DEEP, train=train)
    want = ranks(1).run(curve, alone, 4)[0]
    start = config(small_corpus, tmp_path / "start", model=DEEP, train=train, layout={"tp": 2, "ep": 2})
    ranks(2).run(curve, start, 2)
    for n, (layout, pipeline) in enumerate([({"pp": 2}, {"schedule": "zbv"}), ({"pp": 2, "dp": 2}, {})]):
        cfg = config(small_corpus, tmp_path / str(n), model=DEEP, train=train, layout=layout, pipeline=pipeline)
        close(ranks(2 if n == 0 else 4).run(curve, cfg, 2, whole.newest(start.run.folder))[0], want[2:])
