"""Fixtures for every test: ``ranks(4)`` is a pool of four gloo ranks (tests/rankpool.py)."""

from collections.abc import Callable, Iterator

import pytest
from rankpool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(world).run(fn, *args)``. One pool is alive at a time; asking for another size closes the last."""
    pools: list[RankPool] = []

    def pool(world: int) -> RankPool:
        if not pools or pools[0].world != world:
            for old in pools:
                old.close()
            pools[:] = [RankPool(world)]
        return pools[0]

    yield pool
    for old in pools:
        old.close()
