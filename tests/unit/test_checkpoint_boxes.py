"""Box arithmetic against counting cells one by one."""

import random

import numpy as np
import pytest

from moetrain.checkpoint.boxes import BoxIndex, intersection, untiled, within


def random_tiling(draw: random.Random, offsets, sizes, depth=0):
    """Boxes that tile a box, by cutting at random."""
    dims = [d for d, size in enumerate(sizes) if size > 1]
    if not dims or depth > 6 or (depth > 1 and draw.random() < 0.2):
        return [(tuple(offsets), tuple(sizes))]
    d = draw.choice(dims)
    cut = draw.randrange(1, sizes[d])
    left, right = list(sizes), list(sizes)
    left[d], right[d] = cut, sizes[d] - cut
    moved = list(offsets)
    moved[d] += cut
    return random_tiling(draw, offsets, left, depth + 1) + random_tiling(draw, moved, right, depth + 1)


def count(shape, boxes):
    cells = np.zeros(shape, int)
    for box in boxes:
        cells[within(box, ((0,) * len(shape), shape))] += 1
    return cells


@pytest.mark.parametrize("shape", [(), (1,), (40,), (9, 7), (6, 5, 4)])
def test_tilings_pass_and_every_defect_is_found(shape):
    draw = random.Random(str(shape))
    for _ in range(20):
        boxes = random_tiling(draw, [0] * len(shape), shape)
        draw.shuffle(boxes)
        assert (count(shape, boxes) == 1).all()
        assert untiled(shape, boxes) is None
        assert "elements are held" in (untiled(shape, boxes[:-1]) or "")
        if shape and len(boxes) > 1:
            offsets, sizes = draw.choice(boxes)
            dim = draw.randrange(len(shape))
            if offsets[dim] > 0:  # grow one box into its neighbour
                grown = (
                    tuple(o - (d == dim) for d, o in enumerate(offsets)),
                    tuple(s + (d == dim) for d, s in enumerate(sizes)),
                )
                assert "overlap" in (untiled(shape, [grown if b == (offsets, sizes) else b for b in boxes]) or "")


def test_touching_is_every_box_that_intersects():
    draw = random.Random(5)
    for _ in range(50):
        shape = tuple(draw.randrange(1, 9) for _ in range(draw.randrange(1, 4)))
        boxes = random_tiling(draw, [0] * len(shape), shape)
        query = draw.choice(random_tiling(draw, [0] * len(shape), shape))
        expected = [i for i, box in enumerate(boxes) if intersection(box, query) is not None]
        assert sorted(BoxIndex(boxes).touching(query)) == expected


def test_nothing_to_tile():
    assert untiled((0, 4), []) is None
    assert untiled((2,), []) == "0 of 2 elements are held by a rank"
