"""The ledger of storages: what it counts, and under which name."""

import torch
from torch import nn

from moetrain.memory.ledger import Kind, Ledger, alive

KIB = 1024


def kib(n: int) -> torch.Tensor:
    return torch.empty(n * KIB // 4)


def test_a_storage_counts_once_until_it_is_dropped() -> None:
    with Ledger() as ledger:
        a = kib(4)
        views = [a[:10], a.view(2, -1)]
        b = kib(8)
        del a
        assert ledger.now().total == 12 * KIB
        del views
        assert ledger.now().total == 8 * KIB
        b.untyped_storage().resize_(0)
        assert ledger.now().total == 0
        b.untyped_storage().resize_(2 * KIB)
    assert ledger.now().total == 2 * KIB
    assert ledger.peak().total == 12 * KIB
    del b
    assert ledger.now().total == 0


def test_what_was_there_before_is_held() -> None:
    weight, state = nn.Parameter(kib(4)), kib(8)
    ledger = Ledger()
    ledger.hold([weight], Kind.parameters)
    ledger.hold([state, state[1:]], Kind.optimizer)
    usage = ledger.now()
    assert {kind: n for kind, n in usage.by_kind.items() if n} == {Kind.parameters: 4 * KIB, Kind.optimizer: 8 * KIB}


def test_a_step_by_kinds() -> None:
    w = nn.Parameter(torch.zeros(16, 16))
    x = torch.zeros(64, 16)
    ledger = Ledger()
    ledger.hold([w], Kind.parameters)
    ledger.hold([x], Kind.optimizer)
    with ledger:
        h = (x @ w).exp()  # kept for the backward; the product is not
        h.sum().backward()
        del h
        w.grad.mul_(2)  # pyright: ignore[reportOptionalMemberAccess]
        kib(64)
    peak, left = ledger.peak(), ledger.now()
    assert peak.total == sum(peak.by_kind.values()) == KIB + 4 * KIB + KIB + 64 * KIB
    assert peak.by_kind[Kind.other] == 64 * KIB
    assert peak.when == "update"
    assert left.by_kind[Kind.gradients] == left.by_kind[Kind.parameters] == KIB
    assert left.total == 6 * KIB


def test_activations_are_what_outlives_its_forward() -> None:
    w = nn.Parameter(torch.zeros(16, 16))
    ledger = Ledger()
    with ledger:
        y = torch.zeros(64, 16) @ w  # the zeros are saved for w's gradient
        (y * y).sum().backward()
    assert ledger.peak().by_kind[Kind.activations] >= 8 * KIB
    assert ledger.peak().when.startswith("backward")


def test_alive_sees_what_is_there() -> None:
    before = alive()
    x = kib(64)
    assert alive() - before == 64 * KIB, x.shape
