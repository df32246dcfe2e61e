"""The rank pool itself: results in rank order, failures with a traceback, and a pool that works again afterwards."""

import os
import time

import pytest
import torch
import torch.distributed as dist


def total(rank: int, world: int, start: int) -> float:
    value = torch.tensor([float(start + rank)])
    dist.all_reduce(value)
    return value.item()


def fail(rank: int, world: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise RuntimeError("on purpose")
    if rank == 1 and how == "die":
        os._exit(7)
    time.sleep(30)


def test_results_in_rank_order(ranks):
    assert ranks(2).run(total, 10) == [21.0, 21.0]
    assert ranks(2).run(total, 1) == [3.0, 3.0]


@pytest.mark.parametrize(("how", "shows"), [("raise", "on purpose"), ("die", "exit code 7")])
def test_failure_is_reported_and_the_pool_recovers(ranks, how, shows):
    with pytest.raises(AssertionError, match=shows) as caught:
        ranks(2).run(fail, how)
    assert "failed ranks [1], stuck ranks [0]" in str(caught.value)
    assert "time.sleep" in str(caught.value) or "in fail" in str(caught.value)
    assert ranks(2).run(total, 0) == [1.0, 1.0]
