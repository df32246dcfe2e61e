"""Checkpoints of one process: what comes back, what is refused and in which words, and which folders count."""

import json
import os
import runpy
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moetrain import checkpoint
from moetrain.checkpoint import Chunk, Logical
from moetrain.config import UserError

FROZEN = runpy.run_path(str(Path(__file__).parent.parent / "data" / "make_checkpoint.py"))


def whole(tensor):
    return Logical(tuple(tensor.shape), tensor.dtype, (Chunk((0,) * tensor.dim(), tensor),))


def state(step):
    return {
        "w": whole(torch.arange(12.0).reshape(3, 4) + step),
        "b": whole(torch.full((5,), step, dtype=torch.int64)),
        "h": whole(torch.full((2, 2), step, dtype=torch.bfloat16)),
    }


def empty(tensors):
    return {name: whole(torch.zeros(t.shape, dtype=t.dtype)) for name, t in tensors.items()}


def tensor_of(tensors, name):
    return tensors[name].chunks[0].tensor


def save(root, step, **meta):
    folder = checkpoint.step_folder(root, step)
    checkpoint.save(folder, state(step), {"step": step} | meta, group=None)
    return folder


def load(folder):
    tensors = empty(state(0))
    report = checkpoint.load(folder, tensors, group=None)
    for name, logical in state(report.meta["step"]).items():
        assert torch.equal(tensor_of(tensors, name), logical.chunks[0].tensor)
    return report


# What comes back


@pytest.mark.parametrize("folder", FROZEN["FOLDERS"], ids=lambda folder: folder.parent.name)
def test_frozen_checkpoints_load_bit_for_bit(folder):
    shapes, value, logical = FROZEN["SHAPES"], FROZEN["value"], FROZEN["logical"]
    tensors = {name: torch.zeros_like(value(name)) for name in shapes}
    report = checkpoint.load(folder, {n: logical(n, t) for n, t in tensors.items()}, group=None)
    assert report.meta == FROZEN["META"]
    assert report.restored == tuple(sorted(shapes))
    assert report.missing == report.unused == ()
    for name, tensor in tensors.items():
        assert tensor.dtype == shapes[name][1]
        assert torch.equal(tensor, value(name)), name
    whole_tensors = {name: torch.zeros_like(value(name)) for name in shapes}
    checkpoint.load(folder, {n: whole(t) for n, t in whole_tensors.items()}, group=None)
    assert all(torch.equal(t, value(name)) for name, t in whole_tensors.items())
    assert checkpoint.read_index(folder) == shapes
    assert checkpoint.latest(folder.parent) == folder


def test_the_format_has_not_drifted(tmp_path):
    folder = checkpoint.step_folder(tmp_path, 3)
    tensors = {name: FROZEN["logical"](name, FROZEN["value"](name)) for name in FROZEN["SHAPES"]}
    checkpoint.save(folder, tensors, FROZEN["META"], group=None)
    frozen = FROZEN["FOLDERS"][-1]
    for path in frozen.glob("rank-*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    new, old = (json.loads((f / "index.json").read_bytes()) for f in (folder, frozen))
    assert {**new, "writer": ""} == {**old, "writer": ""}, "a changed format needs a new format_version"


def test_strided_views_are_saved_and_filled_in_place(tmp_path):
    base = torch.arange(60.0).reshape(6, 10)
    folder = checkpoint.step_folder(tmp_path, 1)
    checkpoint.save(folder, {"t": whole(base.T), "cut": whole(base[1:5:2, 3:7])}, {}, group=None)
    target = torch.zeros(6, 10)
    checkpoint.load(folder, {"t": whole(target.T)}, group=None)
    assert torch.equal(target, base)
    patch = torch.full((6, 10), -1.0, requires_grad=True)
    with torch.no_grad():
        view = patch[::3, ::3]
    checkpoint.load(folder, {"cut": Logical((2, 4), torch.float32, (Chunk((0, 0), view),))}, group=None)
    expected = torch.full((6, 10), -1.0)
    expected[::3, ::3] = base[1:5:2, 3:7]
    assert torch.equal(patch.detach(), expected)


def test_large_strided_tensors_are_copied_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrain.checkpoint.writing._COPY", 100)
    monkeypatch.setattr("moetrain.checkpoint.writing._SLAB", 48)
    tensors = {"a": torch.arange(7 * 5 * 9.0).reshape(9, 5, 7).permute(2, 1, 0), "b": torch.arange(90).view(2, 45).T}
    tensors["c"] = torch.arange(400.0).view(1, 10, 40)[:, ::2, ::2]
    folder = checkpoint.step_folder(tmp_path, 1)
    checkpoint.save(folder, {n: whole(t) for n, t in tensors.items()}, {}, group=None)
    back = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in tensors.items()}
    checkpoint.load(folder, {n: whole(t) for n, t in back.items()}, group=None)
    assert all(torch.equal(back[n], t) for n, t in tensors.items())


def test_data_files_open_with_safetensors(tmp_path):
    folder = save(tmp_path, 4)
    with safe_open(folder / "rank-00000.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["b", "h", "w"]
        assert torch.equal(file.get_tensor("h"), tensor_of(state(4), "h"))
    with safe_open(FROZEN["FOLDERS"][-1] / "rank-00000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("embedding.weight[10:20,0:8]"), FROZEN["value"]("embedding.weight")[10:20])


def test_report_names_what_was_restored_missing_and_unused(tmp_path):
    folder = save(tmp_path, 4)
    tensors = empty(state(0)) | {"new.gate": whole(torch.full((2,), 9.0)), "head": whole(torch.full((2,), 9.0))}
    del tensors["b"]
    report = checkpoint.load(folder, tensors, group=None, allow_missing=["new", "head"])
    assert (report.restored, report.missing, report.unused) == (("h", "w"), ("head", "new.gate"), ("b",))
    assert tensor_of(tensors, "head").tolist() == [9.0, 9.0]
    with pytest.raises(UserError, match=r"new\.gate is not in .*step-00000004.*another model"):
        checkpoint.load(folder, tensors, group=None, allow_missing=["ne", "head"])


def test_wrong_shape_and_dtype_name_the_tensor_and_both_shapes(tmp_path):
    folder = save(tmp_path, 4)
    for tensor, text in (
        (torch.zeros(4, 3), r"w is float32 \[4, 3\] here and float32 \[3, 4\] in .*: a checkpoint of another model"),
        (torch.zeros(3, 4).half(), r"w is float16 \[3, 4\] here and float32 \[3, 4\] in .*another model"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            checkpoint.load(folder, {"w": whole(tensor)}, group=None)
        assert "\n" not in str(caught.value)


def test_boxes_that_do_not_tile_are_refused_by_name(tmp_path):
    folder, t = checkpoint.step_folder(tmp_path, 1), torch.zeros
    for chunks, text in (
        ((Chunk((0,), t(3)),), r"layers.w \[4\] cannot be saved: 3 of 4 elements"),
        ((), "layers.w .*0 of 4"),
        ((Chunk((0,), t(3)), Chunk((2,), t(2))), r"overlap"),
        ((Chunk((0,), t(4)), Chunk((0,), t(2))), r"overlap"),
        ((Chunk((1,), t(4)),), r"layers.w: box \[1\] \+ \[4\] is not inside \[4\]"),
        ((Chunk((-1,), t(4)),), r"layers.w: box"),
        ((Chunk((0, 0), t(4)),), r"layers.w: box"),
        ((Chunk((0,), t(4).half()),), r"layers.w: a chunk is torch.float16"),
    ):
        with pytest.raises(ValueError, match=text):
            checkpoint.save(folder, {"layers.w": Logical((4,), torch.float32, chunks)}, {}, group=None)
    for tensors, meta, text in (
        ({"w": whole(torch.zeros(2, dtype=torch.complex64))}, {}, "complex64 cannot be saved"),
        ({"w[0]": whole(torch.zeros(2))}, {}, "cannot name a tensor"),
        ({}, {"set": {1}}, "not JSON serializable"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            checkpoint.save(folder, tensors, meta, group=None)
    assert list(tmp_path.iterdir()) == []
    twice = Logical((4,), torch.float32, (Chunk((0,), t(4)), Chunk((0,), t(4)), Chunk((4,), t(0))))
    checkpoint.save(folder, {"w": twice}, {}, group=None)
    assert (folder / "rank-00000.safetensors").stat().st_size < 150


# Folders


def test_latest_goes_by_the_marker_alone(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest(tmp_path) is None
    old, new = save(tmp_path, 9), save(tmp_path, 100000012)
    os.utime(old)
    (tmp_path / "step-00000500").mkdir()
    (tmp_path / "step-00000600").mkdir()
    (tmp_path / "step-00000600" / "COMMITTED").write_text("0" * 64)
    (tmp_path / "step-00000700.tmp-abc").mkdir()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-200000000").write_text("a file")
    assert checkpoint.latest(tmp_path) == new
    (new / "COMMITTED").unlink()
    assert checkpoint.latest(tmp_path) == old
    with pytest.raises(UserError, match=rf"{new} is not a committed checkpoint .*: use {old}"):
        checkpoint.read_meta(new)
    with pytest.raises(UserError, match=rf"there is no checkpoint .*: use {old}"):
        checkpoint.read_meta(tmp_path / "step-00000011")
    with pytest.raises(UserError, match="there is no older checkpoint"):
        checkpoint.read_meta(tmp_path / "step-00000002")


def names(root):
    return sorted(p.name for p in root.iterdir())


def test_prune_keeps_the_newest_and_those_of_every_nth_step(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.prune(tmp_path, keep=0)
    checkpoint.prune(tmp_path / "none", keep=1)
    for step in (1, 2, 3, 4, 5, 6):
        save(tmp_path, step)
    for name in ("notes", "step-00000008"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002" / "index.json").write_text("{}")
    checkpoint.prune(tmp_path, keep=2, keep_every=3)
    kept = ["notes", "step-00000002", "step-00000003", "step-00000005", "step-00000006", "step-00000008"]
    assert names(tmp_path) == kept, "an index that is not the one committed is kept for a person to look at"
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["notes", "step-00000002", "step-00000006", "step-00000008"]
    assert load(checkpoint.latest(tmp_path)).meta["step"] == 6


def test_a_new_life_clears_what_the_dead_left(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003.tmp-0a1b").mkdir()
    checkpoint.take_over(tmp_path)
    assert names(tmp_path) == ["life-00000001", "step-00000003"], "no checkpoint yet: kept for a person to look at"
    (tmp_path / "life-00000001" / "step-00000004.0a1b").mkdir()
    save(tmp_path, 5)
    for name in ("notes", "step-00000008", "step-00000005.aside-0a1b", "life-00000007.over-0a1b"):
        (tmp_path / name).mkdir()
    assert checkpoint.take_over(tmp_path).number == 2
    assert names(tmp_path) == [
        "life-00000002", "notes", "step-00000005", "step-00000005.aside-0a1b", "step-00000008",
    ]  # fmt: skip


def test_a_life_leaves_a_word_of_its_end(tmp_path):
    assert checkpoint.last_word(tmp_path / "nowhere") == ""
    assert checkpoint.last_word(tmp_path) == ""
    with checkpoint.take_over(tmp_path).ending():
        assert checkpoint.last_word(tmp_path).startswith("life 1 said nothing of its end")
    assert checkpoint.last_word(tmp_path) == "life 1 ended: it was done"
    with pytest.raises(ValueError, match="no room"), checkpoint.take_over(tmp_path).ending():
        raise ValueError("no room\nmore of it")
    assert checkpoint.last_word(tmp_path) == "life 2 ended: no room"
    with checkpoint.take_over(tmp_path).ending():
        checkpoint.take_over(tmp_path)
    assert checkpoint.last_word(tmp_path).startswith("life 4 said nothing"), "of one that is over there is none"


def test_a_life_that_is_over_can_neither_commit_nor_remove(tmp_path):
    old = checkpoint.take_over(tmp_path)
    for step in (1, 2):
        checkpoint.save(checkpoint.step_folder(tmp_path, step), state(step), {"step": step}, group=None, life=old)
    new = checkpoint.take_over(tmp_path)
    before = names(tmp_path)
    for late in (
        lambda: checkpoint.save(checkpoint.step_folder(tmp_path, 3), state(3), {"step": 3}, group=None, life=old),
        lambda: checkpoint.prune(tmp_path, keep=1, life=old),
        lambda: checkpoint.set_aside(checkpoint.step_folder(tmp_path, 2), life=old),
    ):
        with pytest.raises(checkpoint.SupersededError, match="life 1 of the run was taken over by life 2"):
            late()
    assert names(tmp_path) == before
    checkpoint.prune(tmp_path, keep=1, life=new)
    assert names(tmp_path) == ["life-00000002", "step-00000002"]
    assert list(new.folder.iterdir()) == []


@pytest.mark.parametrize("operation", ["open", "mkdir", "rename", "fsync"])
def test_a_life_is_taken_over_in_the_middle_of_a_save(tmp_path, monkeypatch, operation):
    """Before each call of the operation in turn: what is there is committed whole, or nothing of it."""
    real = {"open": open, "mkdir": os.mkdir, "rename": os.rename, "fsync": os.fsync}[operation]
    for at in range(50):
        root = tmp_path / str(at)
        old, left = checkpoint.take_over(root), [at]

        def late(*args, left=left, root=root, **more):
            left[0] -= 1
            if left[0] == -1:
                monkeypatch.undo()
                checkpoint.take_over(root)
            return real(*args, **more)

        target = "builtins.open" if operation == "open" else f"os.{operation}"
        monkeypatch.setattr(target, late)
        try:
            checkpoint.save(checkpoint.step_folder(root, 3), state(3), {"step": 3}, group=None, life=old)
        except checkpoint.SupersededError:
            assert names(root) == ["life-00000002"]
        else:
            assert load(checkpoint.latest(root)).meta["step"] == 3
        monkeypatch.undo()
        if left[0] >= 0:
            break
    assert at > 0
    assert left[0] >= 0


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    life, folder = checkpoint.take_over(tmp_path), save(tmp_path, 4)
    aside = checkpoint.set_aside(folder, life=life)
    assert aside.name.startswith("step-00000004.aside-")
    assert names(tmp_path) == ["life-00000001", aside.name]
    assert checkpoint.latest(tmp_path) is None


def test_a_committed_checkpoint_is_never_written_over(tmp_path):
    folder = save(tmp_path, 4)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="already a committed checkpoint"):
        save(tmp_path, 4)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "COMMITTED").unlink()
    (folder / "junk").write_text("from a killed save")
    save(tmp_path, 4, again=True)
    assert load(folder).meta == {"step": 4, "again": True}
    assert sorted(p.name for p in folder.iterdir()) == ["COMMITTED", "index.json", "rank-00000.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_everything_is_on_disk_before_it_is_named(tmp_path, monkeypatch):
    """The order that a power cut would test: data, index, marker, folder; the rename that commits; root."""
    done = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append((a.name, b.name)), rename(a, b)))
    folder = save(tmp_path, 4)
    prepared = done[0].parent
    assert prepared.name.startswith("step-00000004.tmp-")
    assert done == [
        prepared / "rank-00000.safetensors",
        prepared / "index.json",
        prepared / "COMMITTED",
        prepared,
        (prepared.name, folder.name),
        tmp_path,
    ]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(zlib, "crc32", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
