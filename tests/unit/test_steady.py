"""Garbage at chosen steps, the words of a logging step, what a record's numbers are called."""

import gc
import json
import os
import threading
import weakref

import pytest
import torch

from moetrain.cli.compose import compose
from moetrain.out_of_memory import hint, ran_out
from moetrain.steady import Garbage, set_allocator
from moetrain.telemetry.follow import follow, numbers
from moetrain.telemetry.health import Reading
from moetrain.telemetry.line import StepLine, duration
from moetrain.telemetry.sinks import Wandb
from moetrain.world import World


class Ring:
    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_at_the_steps_that_are_due_and_at_no_other() -> None:
    garbage = Garbage(4)
    try:
        garbage.after(3)
        assert not gc.isenabled()
        ring = weakref.ref(Ring())
        junk = [[{}] for _ in range(10_000)]  # more than Python's own limits
        del junk
        for step in (5, 6, 7):
            garbage.after(step)
            assert ring() is not None, step
        garbage.after(8)
        assert ring() is None
    finally:
        garbage.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_zero_leaves_it_to_python() -> None:
    garbage = Garbage(0)
    for step in range(1, 5):
        garbage.after(step)
    assert gc.isenabled()


def test_the_allocator_is_the_users_where_he_has_set_it(monkeypatch) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environ = {"PATH": "/bin"}
    monkeypatch.setattr(os, "environ", environ)
    set_allocator(None)
    assert environ.keys() == {"PATH"}
    set_allocator(compose([]).train.allocator)
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in names:
        monkeypatch.setattr(os, "environ", before := {name: "max_split_size_mb:64"})
        set_allocator("expandable_segments:True")
        assert before == {name: "max_split_size_mb:64"}


def test_the_words_of_a_step() -> None:
    def record(step: int) -> dict:
        return {"step": step, "loss": 2.5, "grad_norm": 1.25, "tokens_per_second": 1e4, "mfu": 0.4, "lr": 1e-3}

    layers = {3: {"max_violation": 0.2, "drop_rate": 0.0}, 7: {"max_violation": 0.5, "drop_rate": 0.01}}
    reading = Reading(layers, [], [], [], [])
    line = StepLine(total=110)
    first = line.words([record(10)], reading, now=100.0)
    assert first == (
        "loss 2.5000, grad norm 1.250, 10,000 tokens/s, MFU 40.0%, overload 1.50, dropped 0.50%, lr 1.00e-03"
    )
    assert line.words([record(n) for n in range(11, 21)], reading, now=110.0).endswith("ETA 1 min 30 s")
    more = record(60) | {"param_norm": 7.0, "zero_grads": 1234}
    words = line.words([record(n) for n in range(21, 60)] + [more], None, now=115.0)
    assert "param norm 7.00, 1,234 zero grads" in words
    assert "overload" not in words
    assert words.endswith("ETA 15 s")
    assert len(f"step 123456/200000: {words}") < 160


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min"), (90061, "1 d 01 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_numbers_of_a_record() -> None:
    record = {
        "step": 3, "loss": 1.5, "skipped": True, "gone": None, "slowest": {"rank": 1, "seconds": 0.5},
        "health": {"entropy": [0.5, 1.0], "load": [[1.0, 2.0]], "top_pair_experts": [[0, 1]]},
    }  # fmt: skip
    assert numbers(record) == {
        "loss": 1.5, "skipped": 1.0, "slowest/rank": 1.0, "slowest/seconds": 0.5, "health/entropy/min": 0.5,
        "health/entropy/mean": 0.75, "health/entropy/max": 1.0,
    }  # fmt: skip
    assert numbers({"step": 3, "validation": "text", "nats_per_token": 2.0}) == {"validation/text/nats_per_token": 2.0}


def test_a_file_is_followed_to_its_end_and_a_line_that_is_cut_is_waited_for(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": n / 2}) + "\n" for n in (1, 2)) + '{"step": 3, "lo')
    seen, caught = [], threading.Event()

    class Sink:
        def write(self, step: int, numbers: dict[str, float]) -> None:
            seen.append((step, numbers))

        def caught_up(self) -> None:
            caught.set()

        def close(self) -> None:
            pass

    ended, end = os.pipe()
    thread = threading.Thread(target=follow, args=(path, Sink(), ended), daemon=True)
    thread.start()
    assert caught.wait(10)
    assert [step for step, _ in seen] == [1, 2]
    with path.open("a") as file:
        file.write('ss": 4.0}\n')
    os.close(end)  # what a rank's end does
    thread.join(10)
    os.close(ended)
    assert not thread.is_alive()
    assert seen[2:] == [(3, {"loss": 4.0})]


def test_what_yaml_makes_of_off() -> None:
    assert Wandb(False) is Wandb.off  # pyright: ignore[reportArgumentType]
    assert compose(["logging.wandb=off"]).logging.wandb is Wandb.off


def test_running_out_of_memory_is_known_and_the_hint_names_what_is_left_to_lower() -> None:
    assert ran_out(MemoryError())
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    world = World(0, 1, 0, 1, torch.device("cpu"), "")
    said = hint(compose(["train.micro_batch=8", "train.batch=32"]), world)
    assert "recompute.mode=selective" in said
    assert "sharding.accumulate=sharded" in said
    assert "train.micro_batch=4" in said
    low = compose(
        [
            "train.micro_batch=1", "recompute.mode=full", "recompute.loss_rows=64", "optim.state_dtype=bfloat16",
            "optim.beta2=0.99", "sharding.dense=2", "sharding.accumulate=sharded",
        ]
    )  # fmt: skip
    said = hint(low, world)
    assert "sharding.dense=3" in said
    assert not any(key in said for key in ("micro_batch", "recompute", "state_dtype", "accumulate"))
