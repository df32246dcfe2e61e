"""Checkpoints that were damaged or planted: a ``UserError`` that helps, and nothing is ever executed."""

import ast
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from moetrain import checkpoint
from moetrain.checkpoint import Chunk, Logical
from moetrain.config import UserError


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


def save(root, step, **meta):
    folder = checkpoint.step_folder(root, step)
    checkpoint.save(folder, state(step), {"step": step} | meta, group=None)
    return folder


def load(folder):
    tensors = empty(state(0))
    report = checkpoint.load(folder, tensors, group=None)
    for name, logical in state(report.meta["step"]).items():
        assert torch.equal(tensors[name].chunks[0].tensor, logical.chunks[0].tensor)
    return report


def commit_anew(folder, data: bytes):
    """What an attacker would do: a changed index with a marker that fits."""
    (folder / "index.json").write_bytes(data)
    (folder / "COMMITTED").write_text(hashlib.sha256(data).hexdigest())


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: flip(f / "rank-00000.safetensors"), "rank-00000.safetensors fails the checksum of h"),
        (lambda f: os.truncate(f / "rank-00000.safetensors", 100), "rank-00000.safetensors has 100 bytes, not"),
        (lambda f: (f / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
        (lambda f: flip(f / "index.json"), "index.json is not the one that was committed"),
        (lambda f: (f / "index.json").unlink(), "index.json cannot be read"),
        (lambda f: (f / "COMMITTED").write_bytes(b"\xff" * 64), "index.json is not the one"),
    ],
)
def test_damage_names_the_file_and_an_older_checkpoint(tmp_path, damage, says):
    folder = save(tmp_path, 5)
    damage(folder)
    with pytest.raises(UserError, match=f"{folder} is damaged: {says}.*; there is no older checkpoint in {tmp_path}"):
        checkpoint.load(folder, empty(state(0)), group=None)
    older = save(tmp_path, 4)
    with pytest.raises(UserError, match=f"{says}.*: use {older}"):
        checkpoint.load(folder, empty(state(0)), group=None)


def test_a_flip_of_any_byte_is_found(tmp_path):
    folder = save(tmp_path, 5)
    for name in ("rank-00000.safetensors", "index.json", "COMMITTED"):
        path = folder / name
        data = path.read_bytes()
        for at in range(len(data) - (name == "COMMITTED")):  # whose last byte ends a line
            path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
            with pytest.raises(checkpoint.DamagedError, match=re.escape(str(folder))):
                checkpoint.check_files(folder)
        path.write_bytes(data)
    checkpoint.check_files(folder)


def test_a_newer_format_says_who_wrote_it(tmp_path):
    folder = save(tmp_path, 5)
    index = json.loads((folder / "index.json").read_bytes()) | {"format_version": 3, "writer": "moetrain 9.1"}
    commit_anew(folder, json.dumps(index).encode())
    with pytest.raises(UserError, match=r"written by 'moetrain 9\.1' in checkpoint format 3.*reads up to format 2"):
        checkpoint.read_meta(folder)


def planted():
    """(path of keys into index.json, what a stranger put there)."""
    top = [("format_version", v) for v in (None, "1", True, -1, 0, 1.0)]
    top += [(key, v) for key in ("meta", "files", "tensors") for v in (None, 3, "x", [[]])]
    yield from (((key,), v) for key, v in top if not (key == "files" and v is None))
    names = (
        "../rank-00000.safetensors",
        "/etc/passwd",
        "..",
        "rank-00000.safetensors/../x",
        "rank-٣٣٣٣٣.safetensors",
        "",
    )
    yield from ((("files", 0, 0), name) for name in (*names, None, 5, ["a"]))
    yield from ((("files", 0, 1), v) for v in (-1, 2**70, "9", None, 1, 10**9))
    yield from ((("files", 0, 2), v) for v in (-1, 2**64, "9", None, 1))
    yield from ((("tensors", "w"), v) for v in (None, [], "x", {}))
    yield from ((("tensors", "w", "shape"), v) for v in (None, [-3, -4], [2**40, 2**40], [3, 4, 1], [3, "4"], [3.0, 4]))
    yield from ((("tensors", "w", "dtype"), v) for v in (None, "float8", ["float32"], {}, "__class__", "float64"))
    yield from ((("tensors", "w", "boxes"), v) for v in (None, [], [[]], [7], {}))
    for at, values in {
        0: ([0], [-1, 0], [1, 0], [0, 2**62], None, "00"),
        1: ([3], [4, 4], [0, 4], [2, 4], [True, 4], None),
        2: (-1, 1, 2**64, None),
        3: (-8, 2, 2**62, 10**6, None, "0"),
        4: (-1, 0, 47, 2**62, None),
        5: (-1, None, "x", 0),
    }.items():
        yield from ((("tensors", "w", "boxes", 0, at), v) for v in values)


ONLY_SEEN_WHEN_LOADED = (
    (("tensors", "w", "boxes"), []),
    (("tensors", "w", "boxes", 0, 5), 0),
    (("files", 0, 1), 10**9),
    (("files", 0, 2), 1),
)
"""Well-formed, but not the truth about the data; everything else is refused before a data file is opened."""


@pytest.mark.parametrize(("keys", "value"), list(planted()), ids=repr)
def test_a_planted_index_is_a_user_error(tmp_path, keys, value):
    folder = save(tmp_path, 5)
    index = json.loads((folder / "index.json").read_bytes())
    at = index
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    commit_anew(folder, json.dumps(index).encode())
    with pytest.raises(UserError):
        checkpoint.load(folder, empty(state(0)), group=None)
    if (keys, value) not in ONLY_SEEN_WHEN_LOADED:
        with pytest.raises(UserError):
            checkpoint.read_index(folder)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100000, b"\xff\xfe", b"1", b"null", b'{"format_version":' + b"9" * 9999]
)
def test_an_index_that_is_not_json_is_a_user_error(tmp_path, data):
    folder = save(tmp_path, 5)
    commit_anew(folder, data)
    for read in (checkpoint.read_meta, checkpoint.read_index, load):
        with pytest.raises(UserError):
            read(folder)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    for name in ("index.json", "COMMITTED", "rank-00000.safetensors"):
        folder = save(tmp_path / name, 5)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError):
            load(folder)


# Nothing is executed


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("recommit", [False, True])
@pytest.mark.parametrize(
    "name",
    ["index.json", "COMMITTED", "rank-00000.safetensors", ".metadata", "__0_0.distcp", "model.pt", "COMMITTED.tmp"],
)
def test_planted_pickles_are_never_executed(tmp_path, name, recommit, form):
    witness, root = tmp_path / "witness", tmp_path / "root"
    older, folder = save(root, 4), save(root, 5)
    path = folder / name
    if form == "pickle":
        data = pickle.dumps(Payload(witness))
    else:
        torch.save(Payload(witness), tmp_path / "payload.pt")
        data = (tmp_path / "payload.pt").read_bytes()
    if name == "rank-00000.safetensors":  # the right length, so that only the checksums stand in its way
        data = data.ljust(path.stat().st_size, b"\0")[: path.stat().st_size]
    path.write_bytes(data)
    if recommit:
        (folder / "COMMITTED").write_text(hashlib.sha256((folder / "index.json").read_bytes()).hexdigest())
    for read in (load, checkpoint.read_meta, checkpoint.read_index):
        try:
            read(folder)
        except UserError:
            assert name in ("index.json", "COMMITTED", "rank-00000.safetensors")
    assert checkpoint.latest(root) in (older, folder)
    checkpoint.prune(root, keep=1)
    assert not witness.exists()


def test_saving_and_loading_work_without_unpickling(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    load(save(tmp_path, 3))
    checkpoint.prune(tmp_path, keep=1)


def test_no_module_of_it_can_unpickle():
    for path in Path(checkpoint.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
        assert "torch.distributed.checkpoint" not in imported
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        forbidden = {"torch.load", "eval", "exec", "dist.broadcast_object_list", "dist.all_gather_object"}
        assert not called & (forbidden | {"dist.gather_object", "dist.scatter_object_list"})
