"""A whole training step on the device: equal to the CPU's, the same bits when replayed, without a hidden host sync."""

import pytest
import torch
import torch.distributed as dist
from small import MODEL, config, trainer, weights

from moetrain import comm
from moetrain.config import replace
from moetrain.mesh import Mesh
from moetrain.train import Trainer


def moe(**keys) -> dict:
    return {"model": MODEL | {"moe": MODEL["moe"] | keys}}


DISPATCHERS = {"dropless": {}, "capacity": moe(dispatcher={"kind": "capacity", "factor": 1.0})}


def error(run: Trainer, other: Trainer) -> float:
    """The largest relative difference of a weight."""
    ours, theirs = weights(run), weights(other)
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)


@pytest.fixture
def one_rank_group(device, tmp_path, monkeypatch):
    """A world of one rank with a real process group (NCCL on a GPU), which the axes of the mesh then use."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    bound = {"device_id": device} if device.type == "cuda" else {}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=store, **bound)

    def group(self, view: str, *axes: str, use: str = ""):
        return None if axes == ("cp",) else dist.group.WORLD  # one rank's chunk of a sequence is the sequence

    monkeypatch.setattr(Mesh, "group", group)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_step_equals_the_cpu_in_float32(device, small_corpus, tmp_path) -> None:
    cfg = config(small_corpus, tmp_path / "run")
    here, there = trainer(cfg, device), trainer(cfg, torch.device("cpu"))
    assert error(here, there) < 1e-7, "the weights at step 0 are a function of the seed"
    for _ in range(2):
        a, b = here.step(), there.step()
        assert torch.equal(a.load_LE.cpu(), b.load_LE)
        torch.testing.assert_close(a.loss.cpu(), b.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.norm.cpu(), b.norm, rtol=1e-4, atol=0)


def test_collectives_and_their_gradients_over_one_rank(one_rank_group, device) -> None:
    x = torch.randn(12, 8, device=device, requires_grad=True)
    y = comm.all_to_all(x, recv=[12], send=[12], group=one_rank_group)
    y.square().sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, 2 * x)  # pyright: ignore[reportArgumentType]
    assert torch.equal(comm.all_reduce_(x.detach().clone(), group=one_rank_group), x)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_a_step_over_a_group_of_one_rank_equals_the_cpu(
    one_rank_group, device, small_corpus, tmp_path, dispatcher
) -> None:
    """FSDP2, the all-to-alls and the reductions all run, over NCCL on a GPU; the step is still one rank's."""
    cfg = config(small_corpus, tmp_path / "run", **DISPATCHERS[dispatcher])
    grouped = trainer(cfg, device)
    assert grouped.all_ranks is one_rank_group, "the group is used"
    results = [grouped.step() for _ in range(2)]
    alone = _without_groups(cfg)
    for a in results:
        b = alone.step()
        torch.testing.assert_close(a.loss.cpu(), b.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.norm.cpu(), b.norm, rtol=1e-4, atol=0)


def _without_groups(cfg) -> Trainer:
    """One rank on the CPU under the plain mesh."""
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(Mesh, "group", lambda *_, **__: None)
        return trainer(cfg, torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_a_step_replayed_is_the_same_bits(device, small_corpus, tmp_path, dispatcher, dtype) -> None:
    train = {"seq_len": 512, "batch": 8, "micro_batch": 4, "steps": 10, "dtype": dtype}
    if device.type == "cpu":
        train |= {"seq_len": 64, "batch": 4, "micro_batch": 2}
    cfg = config(small_corpus, tmp_path / "run", train=train, **DISPATCHERS[dispatcher])
    runs = [trainer(cfg, device) for _ in range(2)]
    for _ in range(3):
        a, b = (run.step() for run in runs)
        assert torch.equal(a.loss, b.loss)
        assert torch.equal(a.norm, b.norm)
    a, b = (weights(run) for run in runs)
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("documents", [False, True], ids=["", "document masks"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_a_step_makes_no_host_sync(device, small_corpus, tmp_path, dispatcher, documents) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA can tell: torch.cuda.set_sync_debug_mode")
    data = {"corpora": {"small": {"path": str(small_corpus)}}, "mask_documents": documents}
    cfg = config(small_corpus, tmp_path / "run", train={**_bf16(), "steps": 10}, data=data, **DISPATCHERS[dispatcher])
    run = trainer(cfg, device)
    for _ in range(2):  # tables that are copied once, workspaces
        run.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _bf16() -> dict:
    return {"batch": 8, "micro_batch": 2, "seq_len": 64, "dtype": "bfloat16"}


def test_bfloat16_is_close_to_float32(device, small_corpus, tmp_path) -> None:
    cfg = config(small_corpus, tmp_path / "run")
    low = replace(cfg, train=replace(cfg.train, dtype=type(cfg.train.dtype)("bfloat16")))
    a, b = (trainer(c, device).step() for c in (low, cfg))
    torch.testing.assert_close(a.loss, b.loss, rtol=2e-2, atol=0)
