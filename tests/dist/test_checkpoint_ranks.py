"""Checkpoints across ranks: saved under one layout, loaded under others; failures of one rank raised on all."""

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from calls import count
from rankpool import RankPool

from moetrain import checkpoint
from moetrain.checkpoint import Chunk, Logical
from moetrain.config import UserError

NUM_EXPERTS = 7
SHAPES = {
    "embedding": ((10, 6), torch.float32),
    "wq": ((8, 6), torch.bfloat16),
    "norm": ((6,), torch.float32),
    "stage": ((3, 3), torch.float16),
    "experts.w1": ((NUM_EXPERTS, 6, 4), torch.bfloat16),
    "optim.exp_avg.experts.w1": ((NUM_EXPERTS, 6, 4), torch.float32),
    "optim.step": ((), torch.int64),
    "expert_bias": ((NUM_EXPERTS,), torch.float64),
}


def truth(name):
    shape, dtype = SHAPES[name]
    number = list(SHAPES).index(name)
    cells = (11 * torch.arange(torch.Size(shape).numel()) + 5 * number) % 101
    return (cells - 50).to(dtype).reshape(shape)


def rows(whole, parts):
    """Uneven cut: ceil-sized blocks, so that the last ones are short or empty."""
    size = -(-whole // parts)
    return [slice(min(i * size, whole), min(i * size + size, whole)) for i in range(parts)]


def layout(rank, world, seed):
    """Name -> the boxes (as indices) that this rank holds in the layout that ``seed`` draws."""
    draw = random.Random(seed)
    owner_E = [draw.randrange(world) for _ in range(NUM_EXPERTS)]  # permuted, uneven; some ranks may own none
    cut = draw.choice([1, 2, 3])  # expert tensor parallelism: parts of dim 1 on neighbouring ranks
    tp = 2 if world % 2 == 0 and draw.random() < 0.7 else 1
    last = draw.randrange(world)
    experts = [
        (slice(e, e + 1), part)
        for e in draw.sample(range(NUM_EXPERTS), NUM_EXPERTS)
        for p, part in enumerate(rows(6, cut))
        if (owner_E[e] + p) % world == rank
    ]
    grid = (rows(8, world // tp)[rank // tp], rows(6, tp)[rank % tp])
    held = {
        "embedding": [(rows(10, world)[rank],)],
        "wq": [grid],
        "norm": [(slice(None),)],
        "experts.w1": experts,
        "optim.exp_avg.experts.w1": experts,
        "optim.step": [()],
        # replicated in pairs: the same box on several ranks
        "expert_bias": [(rows(NUM_EXPERTS, (world + 1) // 2)[rank // 2],)],
    }
    if rank >= last:  # a pipeline stage: the other ranks do not know the name
        held["stage"] = [(slice(None),)]
    return held


def logical(name, tensor, boxes):
    shape, dtype = SHAPES[name]
    chunks = []
    for box in boxes:
        offsets = [s.start or 0 for s in box] + [0] * (len(shape) - len(box))
        chunks.append(Chunk(tuple(offsets), tensor[box]))
    return Logical(shape, dtype, tuple(chunks))


def save_then_load_elsewhere(rank, world, root, savers):
    groups = {n: dist.new_group(list(range(n))) for n in range(1, world + 1)}
    pairs = 0
    for seed, saver in enumerate(savers):
        folder = checkpoint.step_folder(root, seed)
        if rank < saver:
            held = layout(rank, saver, seed)
            tensors = {n: logical(n, truth(n), boxes) for n, boxes in held.items()}
            checkpoint.save(folder, tensors, {"step": seed}, group=groups[saver])
        dist.barrier()
        for loader in range(1, world + 1):
            for other in (seed, 100 + seed, 200 + seed):
                if rank < loader:
                    held = layout(rank, loader, other)
                    mine = {n: torch.full_like(truth(n), -99) for n in held}
                    asked = {n: logical(n, mine[n], boxes) for n, boxes in held.items()}
                    report = checkpoint.load(folder, asked, group=groups[loader])
                    assert report.restored == tuple(sorted(SHAPES))
                    assert report.unused == report.missing == ()
                    assert report.meta == {"step": seed}
                    for n, boxes in held.items():
                        expected = torch.full_like(truth(n), -99)
                        for box in boxes:
                            expected[box] = truth(n)[box]
                        assert torch.equal(mine[n], expected), (n, saver, loader, other)
                    pairs += 1
    size = sum(path.stat().st_size for path in root.glob("step-00000000/rank-*"))
    return pairs, size


def test_any_layout_loads_under_any_other(ranks, tmp_path):
    pairs, size = ranks(4).run(save_then_load_elsewhere, tmp_path, [4, 4, 4, 3, 2, 1])[0]
    assert pairs == 72
    data = sum(truth(name).numel() * truth(name).element_size() for name in SHAPES)
    assert data < size < data + 4 * 4096, "what several ranks hold is saved once"
    # ... and by a process without any group.
    for seed in range(6):
        mine = {name: torch.zeros_like(truth(name)) for name in SHAPES}
        asked = {name: logical(name, tensor, [()]) for name, tensor in mine.items()}
        checkpoint.load(checkpoint.step_folder(tmp_path, seed), asked, group=None)
        assert all(torch.equal(mine[name], truth(name)) for name in SHAPES)


def every_expert_rank_to_rank(rank, world, root):
    """Owner maps fixed by hand: permuted, uneven, one rank without experts, cut along dim 1."""
    full = truth("experts.w1")

    def held(owner_E, tensor, num_ranks):
        boxes = [
            (slice(e, e + 1), half)
            for e in reversed(range(NUM_EXPERTS))
            for half, who in ((slice(0, 3), owner_E[e]), (slice(3, 6), (owner_E[e] + 1) % num_ranks))
            if who == rank
        ]
        return {"experts.w1": logical("experts.w1", tensor, boxes)}

    save_map = [2, 0, 2, 0, 2, 2, 0]
    checkpoint.save(root / "step-00000001", held(save_map, full, 4), {}, group=dist.group.WORLD)
    counts = {}
    for num_ranks, load_map in ((1, [0] * 7), (2, [1, 1, 0, 1, 1, 1, 1]), (3, [0, 2, 1, 2, 0, 2, 1])):
        group = dist.new_group(list(range(num_ranks)))
        if rank < num_ranks:
            mine = torch.zeros_like(full)
            asked = held(load_map, mine, num_ranks)
            checkpoint.load(root / "step-00000001", asked, group=group)
            for chunk in asked["experts.w1"].chunks:
                e, cut, _ = chunk.offsets
                assert torch.equal(chunk.tensor, full[e : e + 1, cut : cut + 3])
            counts[num_ranks] = len(asked["experts.w1"].chunks)
    return counts


def test_experts_move_between_owner_maps(ranks, tmp_path):
    counts = ranks(4).run(every_expert_rank_to_rank, tmp_path)
    assert [sum(c.get(n, 0) for c in counts) for n in (1, 2, 3)] == [14, 14, 14]


def replicas(rank, world, root):
    """Ten tensors that all ranks hold, and one that weighs as much as five of them, on rank 0 alone."""
    ones = torch.ones(500).double()
    tensors = {f"t{i}": Logical((100,), torch.float64, (Chunk((0,), ones[:100]),)) for i in range(10)}
    if rank == 0:
        tensors["own"] = Logical((500,), torch.float64, (Chunk((0,), ones),))
    checkpoint.save(root / "step-00000001", tensors, {}, group=dist.group.WORLD)


def test_ranks_share_the_writing_of_what_they_all_hold(ranks, tmp_path):
    ranks(3).run(replicas, tmp_path)
    sizes = [path.stat().st_size // 800 for path in sorted(tmp_path.glob("*/rank-*"))]
    assert sizes == [5, 5, 5]


def raised(work):
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def failures(rank, world, root):
    group = dist.group.WORLD
    fine = {"w": Logical((4,), torch.float32, (Chunk((2 * rank,), torch.full((2,), float(rank))),))}

    def save(step, tensors):
        return raised(lambda: checkpoint.save(checkpoint.step_folder(root, step), tensors, {}, group=group))

    def load(step, tensors):
        return raised(lambda: checkpoint.load(checkpoint.step_folder(root, step), tensors, group=group))

    answers = {"fine": save(1, fine), "committed": save(1, fine)}
    short = {"w": Logical((4,), torch.float32, fine["w"].chunks if rank == 0 else ())}
    answers["uncovered"] = save(2, short)
    overlap = {"w": Logical((4,), torch.float32, (Chunk((rank,), torch.zeros(3)),))}
    answers["overlap"] = save(2, overlap)
    answers["other shape"] = save(2, {"w": Logical((4 + rank,), torch.float32, ())})
    answers["bad chunk"] = save(2, {"w": Logical((4,), torch.float32, (Chunk((3 * rank,), torch.zeros(2)),))})
    real = torch.Tensor.is_contiguous
    if rank == 1:

        def full(_):
            raise OSError(28, "No space left on device")

        torch.Tensor.is_contiguous = full  # pyright: ignore
    answers["disk full"] = save(2, fine)
    torch.Tensor.is_contiguous = real
    answers["missing"] = load(1, fine if rank == 0 else {"v": fine["w"]})
    answers["other model"] = load(1, {"w": Logical((4 + rank,), torch.float32, ())})
    if rank == 0:
        (path,) = root.glob("step-00000001/rank-00001*")
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    dist.barrier()
    answers["damage"] = load(1, fine)
    return answers, sorted(path.name for path in root.iterdir())


def test_a_failure_on_one_rank_is_raised_on_all(ranks, tmp_path):
    (zero, left), (one, _) = ranks(2).run(failures, tmp_path)
    assert left == ["step-00000001"], "nothing is left of failed saves"
    assert zero["fine"] is one["fine"] is None
    for case, kind, text in (
        ("committed", "UserError", "already a committed checkpoint"),
        ("uncovered", "ValueError", "w [4] cannot be saved: 2 of 4 elements"),
        ("overlap", "ValueError", "overlap"),
        ("other shape", "ValueError", "w is ((4,), torch.float32) on one rank and ((5,), torch.float32) on rank 1"),
        ("bad chunk", "ValueError", "w: box [3] + [2] is not inside [4]"),
        ("disk full", "OSError", "No space left"),
        ("missing", "UserError", "v is not in"),
        ("other model", "UserError", "w is float32 [5] here and float32 [4] in"),
        ("damage", "DamagedError", "rank-00001.safetensors fails the checksum of w"),
    ):
        for answer in (zero[case], one[case]):
            assert answer is not None, case
            assert text in answer[1], (case, answer)
            assert answer[0] in (kind, "RuntimeError"), (case, answer)
        assert kind in (zero[case][0], one[case][0])
    assert zero["damage"] == one["damage"]


def report_over_ranks(rank, world, root):
    names = ("a", "b", "c")
    checkpoint.save(
        root / "step-00000001",
        {name: Logical((2,), torch.float32, (Chunk((0,), torch.ones(2)),)) for name in names},
        {"from": rank},
        group=dist.group.WORLD,
    )
    mine = {names[rank]: Logical((2,), torch.float32, (Chunk((0,), torch.zeros(2)),))}
    mine[f"new.{rank}"] = mine[names[rank]]
    return checkpoint.load(root / "step-00000001", mine, group=dist.group.WORLD, allow_missing=["new"])


def test_the_report_is_of_all_ranks(ranks, tmp_path):
    zero, one = ranks(2).run(report_over_ranks, tmp_path)
    assert zero == one
    assert (zero.restored, zero.missing, zero.unused) == (("a", "b"), ("new.0", "new.1"), ("c",))
    assert zero.meta == {"from": 0}


def many_small_chunks(rank, world, root):
    found = []
    for step, many in enumerate((500, 2500)):
        tensors = {
            f"layers.{i}.w": Logical((2, 1000), torch.float32, (Chunk((rank, 0), torch.full((1, 1000), float(i))),))
            for i in range(many)
        }
        folder = checkpoint.step_folder(root, step)
        save = count(lambda: checkpoint.save(folder, tensors, {}, group=dist.group.WORLD))  # noqa: B023
        load = count(lambda: checkpoint.load(folder, tensors, group=dist.group.WORLD))  # noqa: B023
        found.append((save, load))
    return found


def test_many_small_chunks_are_no_more_work_each(ranks, tmp_path):
    for few, many in ranks(2).run(many_small_chunks, tmp_path):
        assert many[0] < 5.5 * few[0], "save"
        assert many[1] < 5.5 * few[1], "load"
        assert max(many) < 1000 * 2500, "calls"


def test_a_group_of_one_and_no_group_write_the_same_files(tmp_path):
    pool = RankPool(1)
    try:
        pool.run(save_alone, tmp_path / "grouped")
    finally:
        pool.close()
    save_alone(0, 1, tmp_path / "alone", grouped=False)
    for path in (tmp_path / "alone" / "step-00000001").iterdir():
        assert (tmp_path / "grouped" / "step-00000001" / path.name).read_bytes() == path.read_bytes()


def save_alone(rank, world, root: Path, grouped=True):
    tensors = {name: logical(name, truth(name), [()]) for name in SHAPES}
    group = dist.group.WORLD if grouped else None
    checkpoint.save(root / "step-00000001", tensors, {"step": 1}, group=group)
    with pytest.raises(UserError):
        checkpoint.save(root / "step-00000001", tensors, {"step": 1}, group=group)
