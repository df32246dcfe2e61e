"""Arithmetic of boxes (offsets, sizes) in an index space: which ones touch, what they share, whether they tile it."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one of each per dimension."""


def volume(box: Box) -> int:
    """Number of elements; 1 for the box of a scalar."""
    return math.prod(box[1])


def intersection(a: Box, b: Box) -> Box | None:
    """What ``a`` and ``b`` share, or ``None`` if that is empty."""
    offsets, sizes = [], []
    for a_start, a_size, b_start, b_size in zip(*a, *b, strict=True):
        start = max(a_start, b_start)
        size = min(a_start + a_size, b_start + b_size) - start
        if size <= 0:
            return None
        offsets.append(start)
        sizes.append(size)
    return tuple(offsets), tuple(sizes)


def within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Index of ``part`` in an array that holds ``whole``."""
    return tuple(
        slice(start - origin, start - origin + size) for start, size, origin in zip(*part, whole[0], strict=True)
    )


class BoxIndex:
    """Finds the boxes that touch a given one by a sorted sweep along the dimension with the most distinct starts.

    Experts under a permuted owner map have as many starts as experts, rows of a sharded matrix as many as shards:
    there a query looks at the boxes it finds and few others.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        dims = len(boxes[0][0]) if boxes else 0
        self._dim = max(range(dims), key=lambda dim: len({box[0][dim] for box in boxes}), default=None)
        if self._dim is not None and len(boxes) > 1:
            dim = self._dim
            self._order = sorted(range(len(boxes)), key=lambda i: boxes[i][0][dim])
            self._starts = [boxes[i][0][dim] for i in self._order]
            self._extent = max(box[1][dim] for box in boxes)

    def touching(self, box: Box) -> list[int]:
        """Positions of the boxes that share an element with ``box``."""
        if self._dim is None or len(self.boxes) == 1:
            candidates: Sequence[int] = range(len(self.boxes))
        else:
            start, size = box[0][self._dim], box[1][self._dim]
            low = bisect_right(self._starts, start - self._extent)
            candidates = self._order[low : bisect_left(self._starts, start + size)]
        return [i for i in candidates if intersection(self.boxes[i], box) is not None]


def untiled(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Why distinct, non-empty ``boxes`` inside ``shape`` do not tile it, or ``None`` if they do.

    Disjoint boxes whose volumes add up to the whole cover it.
    """
    index = BoxIndex(boxes)
    if len(boxes) > 1:
        for i, box in enumerate(boxes):
            for j in index.touching(box):
                if j != i:
                    return f"boxes {_text(box)} and {_text(boxes[j])} overlap"
    covered = sum(volume(box) for box in boxes)
    if covered != math.prod(shape):
        return f"{covered} of {math.prod(shape)} elements are held by a rank"
    return None


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{start + size}" for start, size in zip(*box, strict=True)) + "]"
