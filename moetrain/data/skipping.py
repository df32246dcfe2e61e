"""An order of samples without some of them: those after come in their place."""

from dataclasses import fields

import torch

from moetrain.data.loader import Batch, Samples


class Skipping:
    """``samples`` without ``ranges`` [first, last + 1) of its sample ids, which are kept in order and apart."""

    def __init__(self, samples: Samples, ranges: list[list[int]]) -> None:
        self.samples, self.ranges = samples, ranges

    @property
    def fingerprint(self) -> str:
        return self.samples.fingerprint

    def pieces(self, first: int, count: int) -> list[tuple[int, int]]:
        """(first sample id, how many) of each run of ids that the samples [first, first + count) are."""
        found, at, end = [], first, first + count
        for start, stop in self.ranges:
            if start >= end:
                break
            if at < start:
                found.append((at, start - at))
                at = start
            at, end = at + stop - start, end + stop - start
        return [*found, (at, end - at)] if end > at else found

    def skip(self, first: int, count: int) -> None:
        """From now on without the samples [first, first + count) as they are numbered now."""
        every = sorted([*self.ranges, *([at, at + n] for at, n in self.pieces(first, count))])
        self.ranges[:] = every[:1]
        for start, stop in every[1:]:
            if start == self.ranges[-1][1]:
                self.ranges[-1][1] = stop
            else:
                self.ranges.append([start, stop])

    def batch(self, first: int, count: int) -> Batch:
        parts = [self.samples.batch(*piece) for piece in self.pieces(first, count)]
        if len(parts) == 1:
            return parts[0]
        columns = ([getattr(part, f.name) for part in parts] for f in fields(Batch))
        return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))  # pyright: ignore

    def num_targets(self, first: int, count: int) -> int:
        return sum(self.samples.num_targets(*piece) for piece in self.pieces(first, count))
