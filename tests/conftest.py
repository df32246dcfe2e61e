"""Fixtures for every test: ``ranks(4)`` is a pool of four gloo ranks (tests/rankpool.py)."""

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rankpool import RankPool

from moetrain.data.tokenize import tokenize


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


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenized corpus of real text: some 40 modules of this Python's standard library, 512 token ids."""
    folder = tmp_path_factory.mktemp("corpus")
    names = sorted(str(p) for p in Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    corpus = tokenize(names, output=folder / "small", vocab_size=512, valid_fraction=0.1, log=lambda line: None)
    return corpus.path
