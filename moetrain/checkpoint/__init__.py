"""Checkpoints: boxes of named tensors and JSON in a folder, loadable under any layout. Read first: writing.

State on disk is keyed by global name and offsets, never by rank. Tensor bytes lie in safetensors files, one per rank
that had something to write; everything else is JSON; nothing on disk is ever unpickled. A folder is a checkpoint once
its marker ``COMMITTED`` holds the sha256 of its ``index.json`` (docs/checkpoint.md).

Why not torch.distributed.checkpoint: its metadata is a pickle, its planners tell boxes apart by offset alone, not by
size, and its plans are pickled dataclasses: planning 5,000 small chunks on two ranks took 1.3 s before a byte was
written, where a whole save here takes a third of a second. What is left of it, describe, plan, write, commit, is
``Wire.together`` twice, in JSON.
"""

from moetrain.checkpoint.folders import DamagedError, committed, latest, marked, step_folder, step_of
from moetrain.checkpoint.index import FORMAT_VERSION
from moetrain.checkpoint.life import Life, SupersededError, ending, last_word, prune, set_aside, take_over
from moetrain.checkpoint.reading import check_files, load, read, read_index, read_meta
from moetrain.checkpoint.types import Report
from moetrain.checkpoint.wire import Wire
from moetrain.checkpoint.writing import save
from moetrain.logical import Chunk, Logical

__all__ = [
    "FORMAT_VERSION",
    "Chunk",
    "DamagedError",
    "Life",
    "Logical",
    "Report",
    "SupersededError",
    "Wire",
    "check_files",
    "committed",
    "ending",
    "last_word",
    "latest",
    "load",
    "marked",
    "prune",
    "read",
    "read_index",
    "read_meta",
    "save",
    "set_aside",
    "step_folder",
    "step_of",
    "take_over",
]
