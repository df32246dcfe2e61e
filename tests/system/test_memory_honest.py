"""What the ledger counts in a step is what the process takes from the system, no more and no less."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import re, torch
from moetrain.config import load
from moetrain.job import Config, Data
from moetrain.memory.dry import Blank, hold
from moetrain.memory.ledger import Ledger
from moetrain.train import Trainer
from moetrain.world import World

torch.set_num_threads(1)
cfg = load({
    "model": {"vocab_size": 2048, "dim": 128, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4,
              "moe": {"num_experts": 8, "hidden": 256}},
    "train": {"batch": 4, "micro_batch": 2, "seq_len": 1024, "device": "cpu"},
}, Config)
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
trainer = Trainer(cfg, World(0, 1, 0, 1, torch.device("cpu"), ""), Data({}, Blank(cfg), {}))
trainer.step()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
trainer.step()
taken = status("VmHWM") - before
ledger = Ledger()
hold(ledger, trainer)
with ledger:
    trainer.step()
print(taken, ledger.peak().total - ledger.now().total)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark")
def test_as_much_as_the_process_takes(tmp_path: Path) -> None:
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEP], env=os.environ | mapped | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken, counted = map(int, done.stdout.split())
    assert counted > 64 << 20
    assert taken == pytest.approx(counted, rel=0.05)
