"""Context parallelism: which positions of a sequence a rank holds, and how its queries meet all keys."""

from enum import Enum

from moetrain.config import config


class Method(Enum):
    allgather = "allgather"  # keys and values are gathered, queries stay: any number of heads
    ulysses = "ulysses"  # heads against positions by all-to-all (arXiv 2309.14509): cp divides the heads of a tp rank


@config
class ContextConfig:
    """How attention crosses the ranks of cp. Positions are dealt in zigzag, so that causal work is even."""

    method: Method = Method.allgather
