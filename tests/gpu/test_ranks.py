"""Several ranks that share one device over gloo: the collectives that it needs, and training curves of one rank.

NCCL refuses two ranks on one GPU, so this is how one GPU tests what several would do.
"""

import pytest
import torch
import torch.distributed as dist
from small import TRAIN, config, curve, spawn

STEPS = 4


def collective(rank: int, world: int, device: str, name: str, dtype: torch.dtype) -> str:
    """ "" if the collective gave what it should, the error where gloo refuses it."""
    x = torch.arange(4 * world, device=device).to(dtype) + 100 * rank
    every = [torch.arange(4 * world).to(dtype) + 100 * r for r in range(world)]
    mine = slice(4 * rank, 4 * rank + 4)
    try:
        if name == "all_reduce":
            got, want = x.clone(), sum(every)
            dist.all_reduce(got)
        elif name == "all_gather_into_tensor":
            got, want = x.new_zeros(4 * world * world), torch.cat(every)
            dist.all_gather_into_tensor(got, x)
        elif name == "reduce_scatter_tensor":
            got, want = x.new_zeros(4), sum(every)[mine]  # pyright: ignore
            dist.reduce_scatter_tensor(got, x)
        elif name == "all_to_all_single":
            got, want = torch.zeros_like(x), torch.cat([e[mine] for e in every])
            dist.all_to_all_single(got, x)
        else:  # uneven: everything goes to rank 0
            sizes = [4 * world] + [0] * (world - 1)
            got = x.new_zeros(4 * world * world if rank == 0 else 0)
            want = torch.cat(every) if rank == 0 else x.new_zeros(0).cpu()
            dist.all_to_all_single(got, x, [4 * world] * world if rank == 0 else [0] * world, sizes)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    assert torch.equal(got.cpu(), want), f"{name}: {got} is not {want}"
    return ""


NAMES = [
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "all_to_all_single, uneven",
]


def collectives(rank: int, world: int, device: str) -> dict[str, str]:
    types = (torch.float32, torch.bfloat16, torch.int64)
    return {f"{name}, {dtype}": collective(rank, world, device, name, dtype) for name in NAMES for dtype in types}


@pytest.fixture(scope="module")
def refused(device) -> dict[str, str]:
    """Collective and dtype -> why gloo does not run it on this device; empty where it gave the right result."""
    return spawn(2, collectives, device=device)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gloo_runs_the_collective_on_the_device(refused, name, dtype) -> None:
    if why := refused[f"{name}, {dtype}"]:
        pytest.skip(f"gloo has no {name} for {dtype} here: {why}")


LAYOUTS = {
    "2 ranks, ep2": (2, {"ep": 2}),
    "2 ranks, dp2": (2, {"dp": 2}),
    "4 ranks, dp4 ep2": (4, {"dp": 4, "ep": 2}),
    "4 ranks, ep4": (4, {"ep": 4}),
}


@pytest.fixture(scope="module")
def alone(device, small_corpus, tmp_path_factory) -> dict[str, torch.Tensor]:
    """dtype -> the curve of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        dtype: torch.tensor(
            curve(0, 1, str(device), config(small_corpus, folder / dtype, train=TRAIN | {"dtype": dtype}), STEPS)
        )
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_float32_curve_is_one_ranks(device, alone, small_corpus, tmp_path, layout) -> None:
    world, degrees = LAYOUTS[layout]
    cfg = config(small_corpus, tmp_path / "run", layout=degrees)
    for got in spawn(world, curve, cfg, STEPS, device=device):
        torch.testing.assert_close(torch.tensor(got)[:, 0], alone["float32"][:, 0], rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(got)[:, 1], alone["float32"][:, 1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", ["2 ranks, dp2", "2 ranks, ep2"])
def test_bfloat16_under_fsdp_is_close_to_one_rank(device, alone, small_corpus, tmp_path, layout) -> None:
    world, degrees = LAYOUTS[layout]
    cfg = config(small_corpus, tmp_path / "run", layout=degrees, train=TRAIN | {"dtype": "bfloat16"})
    for got in spawn(world, curve, cfg, STEPS, device=device):
        torch.testing.assert_close(torch.tensor(got)[:, 0], alone["bfloat16"][:, 0], rtol=1e-2, atol=0)
