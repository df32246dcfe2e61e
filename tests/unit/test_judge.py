"""What is a bad step, by the definition; samples that are skipped; who is where in a hang."""

import json
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain import where
from moetrain.bad_steps import BadStepsConfig, Judge
from moetrain.config import UserError
from moetrain.data.loader import Batch
from moetrain.data.skipping import Skipping
from moetrain.origin import bits
from moetrain.watchdog import told


def test_limits_are_deviations_above_the_mean_of_the_last_good_steps() -> None:
    """By the definition with numpy; some losses and norms spike, some are not finite; through a restore."""
    luck = np.random.default_rng(4)
    judge = Judge(BadStepsConfig(loss_spike=3.0, norm_spike=2.0, window=8), torch.device("cpu"))
    good: list[np.ndarray] = []
    verdicts = []
    for step in range(80):
        now = luck.normal([5.0, 1.0], [0.5, 0.2])
        now *= luck.choice([1.0, 1.0, 1.0, 1.0, 3.0, np.nan, np.inf])
        last, limits = np.array(good[-8:]), np.full(2, np.inf)
        if len(good) >= 4:
            limits = last.mean(0) + np.array([3.0, 2.0]) * last.std(0, ddof=1)
        bad = not np.isfinite(now).all() or (now > limits).any()
        good += [now] * (not bad)
        found = judge(torch.tensor(now[0]), torch.tensor(now[1]))
        assert bool(found.bad) == bad
        np.testing.assert_allclose(found.limits_2.numpy(), limits, rtol=1e-12)
        verdicts.append(bad)
        if step == 40:
            state = json.loads(json.dumps(judge.state()))
            judge = Judge(judge.cfg, torch.device("cpu"))
            judge.restore(state)
    assert 10 < sum(verdicts) < 60
    plain = Judge(BadStepsConfig(), torch.device("cpu"))
    assert [bool(plain(torch.tensor(x), torch.tensor(1.0)).bad) for x in (1.0, 1e30, float("nan"))] == [
        False,
        False,
        True,
    ]


def test_a_setting_that_cannot_be_is_one_line() -> None:
    with pytest.raises(UserError, match=r"bad_steps.window=1: a deviation needs at least 2 steps"):
        BadStepsConfig(window=1)
    with pytest.raises(UserError, match=r"bad_steps.skip=false with loss_spike=3.0"):
        BadStepsConfig(skip=False, loss_spike=3.0)


class Order:
    """Samples 0, 1, 2, ... whose token is their number."""

    fingerprint = "x"

    def batch(self, first: int, count: int) -> Batch:
        tokens_BS = torch.arange(first, first + count)[:, None]
        return Batch(tokens_BS, tokens_BS, tokens_BS[:, 0])

    def num_targets(self, first: int, count: int) -> int:
        return sum(range(first, first + count))


def test_samples_that_are_skipped_are_left_out_once_and_nothing_else() -> None:
    luck = random.Random(7)
    for _ in range(50):
        left, samples = list(range(200)), Skipping(Order(), [])
        for _ in range(4):
            first, count = luck.randrange(40), luck.randrange(12)
            samples.skip(first, count)
            del left[first : first + count]
        assert samples.ranges == sorted(samples.ranges)
        for _ in range(10):
            first, count = luck.randrange(90), luck.randrange(1, 9)
            batch = samples.batch(first, count)
            assert batch.sample_B.tolist() == left[first : first + count] == batch.tokens_BS[:, 0].tolist()
            assert batch.mask_BS is None
            assert samples.num_targets(first, count) == sum(left[first : first + count])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 700) * 100).to(dtype)
    size = x.element_size()
    for _ in range(100):
        y = x.clone()
        flat = y.view(torch.uint8).view(-1)
        at = random.randrange(len(flat))
        flat[at] ^= 1 << random.randrange(8)
        assert bits(y) != bits(x)
    i, j = random.sample(range(x.numel()), 2)
    y: Tensor = x.clone()
    y.view(-1)[i], y.view(-1)[j] = x.view(-1)[j], x.view(-1)[i]
    assert torch.equal(x, y) or bits(y) != bits(x), (i, j, size)


def test_who_is_where(tmp_path) -> None:
    stuck = where.Here(step=7, part="forward", layer=3, collective="all-to-all", entered=40)
    for rank in (0, 1, 2, 4):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(vars(stuck) | {"words": "", "seconds": 9.0}))
    busy = where.Here(step=7, part="forward", layer=2, entered=39)
    (tmp_path / "rank-5.json").write_text(json.dumps(vars(busy) | {"words": "", "seconds": 9.0}))
    assert told(tmp_path, 7) == [
        "hang: ranks 0 to 2, 4 are in the all-to-all of layer 3, forward of step 7 (40 collectives so far)",
        "hang: rank 5 is in forward of layer 2 of step 7 (39 collectives so far)",
        "hang: ranks 3, 6 said nothing: stopped, cut off or gone; the others wait for them",
    ]
