"""The counters of GPUs: through nvidia-ml-py and a real shared library whose numbers are known (fake_nvml.c)."""

import json
import subprocess
import sys
from typing import Any

import fake_nvml
import pytest

from moetrain.cli.compose import compose
from moetrain.config import UserError
from moetrain.telemetry.nvml_sampler import summary


def run(program: str, env: dict[str, str] | None, *words: str) -> Any:
    """What ``program``, in a process of its own, prints last, as JSON."""
    start = """
import json, logging, sys, time
from types import SimpleNamespace
import torch
from moetrain.telemetry import nvml
UUIDS = ["22222222-aaaa-bbbb-cccc-000000000000", "11111111-aaaa-bbbb-cccc-000000000000"]
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=UUIDS[torch.device(device).index])
torch.cuda.device_count = lambda: 2  # as with CUDA_VISIBLE_DEVICES=1,0
"""
    done = subprocess.run(
        [sys.executable, "-c", start + program, *words], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fake_nvml.environment(tmp_path_factory.mktemp("nvml"))


def test_every_counter_of_a_card_and_none_where_it_has_none(env) -> None:
    program = "print(json.dumps([card.status() for card in nvml.cards()]))"
    whole, poor = run(program, env | {"FAKE_NVML_ILL": "3"})
    assert (whole["name"], whole["utilization"], whole["watts"], whole["celsius"]) == ("NVIDIA Fake 0", 0.1, 100.0, 61)
    assert (whole["memory_used"], whole["memory_total"]) == (1 << 30, 80 << 30)
    assert (whole["sm_mhz"], whole["memory_mhz"], whole["sm_mhz_most"]) == (1755, 2619, 1980)
    assert (whole["pcie_sent"], whole["pcie_received"]) == (1000 * 1024, 2000 * 1024)
    assert (whole["nvlinks_up"], whole["nvlinks_down"]) == (17, [7])
    assert whole["joules"] > 0
    assert whole["nvlink_sent"] == pytest.approx(3 * whole["nvlink_received"], rel=1e-6)
    assert (poor["joules"], poor["nvlink_sent"], poor["nvlinks_up"], poor["watts_limit"]) == (None,) * 4
    assert poor["throttled_by"] == ["hardware slowdown", "heat (hardware)"]
    assert (poor["celsius"], poor["celsius_slowdown"], poor["lost"]) == (89, 90, False)
    assert (poor["ecc_errors"]["uncorrected"], whole["ecc_errors"]["uncorrected"]) == (3, 0)


def test_a_torch_device_is_the_card_of_its_uuid(env) -> None:
    program = "print(json.dumps([nvml.card_of(torch.device('cuda', i)).name for i in range(2)]))"
    assert run(program, env) == ["NVIDIA Fake 1", "NVIDIA Fake 0"]
    gone = (
        "torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid='9')\n"
        + """
try: nvml.card_of(torch.device('cuda', 0))
except nvml.AbsentError as e: print(json.dumps(str(e)))
"""
    )
    assert run(gone, env) == "the driver knows no card of cuda:0's UUID 9"


SAMPLERS = """
from moetrain.telemetry.nvml_sampler import NvmlSampler
from moetrain.world import World
def sampler(rank, **more):
    world = World(rank, 2, rank, 2, torch.device("cuda", 1 - rank), "nccl")
    return NvmlSampler(world, log=logging.getLogger(), **{"every": 1000.0} | more)
def waited(s, n):
    while len(s._samples) < n: time.sleep(0.01)
    return s
"""


def test_joules_are_those_of_the_time_between_two_logging_steps(env) -> None:
    """Card 0 takes 250 W by its counter of energy, card 1 does not count it; rank 0 has card 0."""
    found = run(
        SAMPLERS
        + """
both = [waited(sampler(rank), 1) for rank in range(2)]
like = torch.zeros(1, dtype=torch.double)
for s in both: s.look()
sum(s.part(like) for s in both)
found, since = [], time.monotonic()
for i in range(4):
    if i == 2: both[0].look()
    time.sleep(0.2)
    of_all = sum(s.part(like) for s in both).tolist()
    both[0].read(of_all)
    found.append(both[0].record(tokens=1000)["energy"])
print(json.dumps([found, time.monotonic() - since]))
""",
        env,
    )
    records, seconds = found
    # rank 1 does not know: as much again is assumed, and said
    assert [(r["ranks"], r["estimated"]) for r in records] == [(1, True)] * 4
    assert sum(r["joules"] for r in records) == pytest.approx(2 * 250 * seconds, rel=0.05)
    assert all(r["joules_per_token"] == pytest.approx(r["joules"] / 1000) for r in records)


def test_a_thread_looks_by_itself_and_each_sample_is_told_once(env) -> None:
    found = run(
        SAMPLERS
        + """
s = waited(sampler(0, every=0.1), 3)
first = s.record(tokens=1)["gpu"]
again = "gpu" in s.record(tokens=1)
waited(s, 2)
s.close()
time.sleep(0.3)
n = s.record(tokens=1)["gpu"]["samples"]
time.sleep(0.3)
print(json.dumps([first, again, n, "gpu" in s.record(tokens=1)]))
""",
        env,
    )
    first, again, later, after = found
    n = first["samples"]  # the k-th look at card 0 finds 100 k W, 10 k %, idle and at its power cap in turn
    assert n >= 3
    assert not again
    assert later >= 2
    assert not after, "closed"
    assert first["watts"] == pytest.approx(50 * (n + 1))
    assert first["watts_most"] == 100 * n
    assert first["utilization"] == pytest.approx(0.05 * (n + 1))
    assert (first["celsius_most"], first["memory_used_most"]) == (61, 1 << 30)
    assert first["nvlink_sent"] == pytest.approx(3e6 * 1024, rel=0.1)
    assert first["throttled"]["power cap"] == pytest.approx((n // 2) / n)


def test_ranks_that_share_a_card_tell_their_part_of_it(env) -> None:
    found = run(
        SAMPLERS
        + """
like, found = torch.zeros(1, dtype=torch.double), []
for gpus in (2, 1):
    torch.cuda.device_count = lambda gpus=gpus: gpus
    s = waited(sampler(0), 1)
    first = s._told
    time.sleep(0.1)
    part = s.part(like)[0].item()
    found.append(part / (s._told - first))
print(json.dumps(found))
""",
        env,
    )
    assert found == pytest.approx([1, 0.5])


def test_a_run_writes_them(env, small_corpus, tmp_path) -> None:
    """The real command, whose rank is told that its device is card 0."""
    program = (
        SAMPLERS
        + """
from dataclasses import replace
from moetrain import loop
from moetrain.cli.main import main
gpu = lambda world, **more: NvmlSampler(replace(world, device=torch.device("cuda", 1)), **more)
loop.NvmlSampler = gpu
print(json.dumps(main(["train", *sys.argv[1:]])))
"""
    )
    words = [
        "experiment=quickstart", f"run.dir={tmp_path}", "run.name=run", "layout.ep=1", "layout.dp=1", "data=folder",
        f"data.corpora.text.path={small_corpus}", "model.vocab_size=512", "model.dim=32", "model.num_layers=2",
        "model.num_heads=4", "model.num_kv_heads=2", "model.moe.num_experts=4", "model.moe.hidden=32",
        "train.steps=12", "train.batch=4", "train.micro_batch=2", "train.seq_len=32", "train.validate_samples=4",
        "optim.warmup=1", "logging.every=4", "logging.nvml_every=0.05", "train.bigram=false", "checkpoint.every=0",
    ]  # fmt: skip
    assert run(program, env, *words) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [r for r in records if "energy" in r]
    assert len(told) >= 3
    assert {r["step"] for r in told} <= {1, 4, 8, 12}
    assert all(r["energy"]["ranks"] == 1 and "estimated" not in r["energy"] for r in told)
    assert any("gpu" in r for r in told)


def test_without_a_driver_or_a_gpu(tmp_path) -> None:
    """One line where a rank has a GPU and its counters are not there, nothing at all on a CPU."""
    found = run(
        SAMPLERS
        + """
lines = []
logging.getLogger().info = lines.append
none = sampler(0)
cpu = NvmlSampler(World(0, 1, 0, 1, torch.device("cpu"), ""), every=1.0, log=logging.getLogger())
off = sampler(0, every=0.0)
like = torch.zeros(1)
out = [len(s.part(like)) for s in (none, cpu, off)]
none.read([0.0, 0.0]), cpu.read([])
import threading
print(json.dumps([lines, out, none.record(tokens=1), cpu.record(tokens=1), threading.active_count()]))
""",
        None,
    )
    lines, sizes, *records, threads = found
    assert len(lines) == 1
    assert lines[0].startswith("no counters of this rank's GPU: n")
    assert (sizes, records, threads) == ([2, 0, 0], [{}, {}], 1)


def test_seconds_that_are_none() -> None:
    for value in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match=r"logging.nvml_every="):
            compose([f"logging.nvml_every={value}"])


def test_what_no_sample_has_is_left_out() -> None:
    empty = dict.fromkeys(("utilization", "memory_busy", "memory_used", "watts", "celsius", "sm_mhz", "memory_mhz",
                           "pcie_sent", "pcie_received", "nvlink_sent", "nvlink_received", "throttle"))  # fmt: skip
    assert summary([empty, empty]) == {"samples": 2}
