"""The schedule benchmark's formulas and its count of a table agree where both are known, and the command runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from schedule_counts import (  # noqa: E402
    Times,
    counted,
    drawing,
    idle,
    idle_within,
    in_flight,
    textbook,
)  # fmt: skip

from moetrain.parallel.schedules import PipelineConfig, Schedule, table  # noqa: E402

KNOWN = {  # idle shares of four ranks, eight micro-batches, F = I = W
    Schedule.one_f_one_b: 3 / 11,
    Schedule.interleaved: 3 / 19,
    Schedule.interleaved_zero_bubble: 1 / 17,
    Schedule.zbv: 0.0,
    Schedule.dualpipev: 1 / 9,
}


def order(schedule: Schedule, *, pp: int = 4, micro_batches: int = 8):
    chunks = PipelineConfig(schedule=schedule.value).stages_a_rank
    return table(schedule, pp=pp, chunks=chunks, micro_batches=micro_batches), chunks


@pytest.mark.parametrize("schedule", Schedule)
def test_the_textbook_and_the_table_agree_where_all_parts_are_equal(schedule) -> None:
    actions, chunks = order(schedule)
    book = textbook(schedule, Times(), pp=4, chunks=chunks, micro_batches=8)
    assert book == pytest.approx(KNOWN[schedule])
    lines = counted(actions, Times().of)
    found = idle_within(lines) if schedule is Schedule.zbv else idle(lines)
    if schedule is Schedule.dualpipev:  # its formula has a forward wait for the backward beside it
        assert found == pytest.approx(1 / 17)
    else:
        assert found == pytest.approx(KNOWN[schedule], abs=1e-12)


def test_zbv_idles_as_long_as_the_ranks_start_apart() -> None:
    lines = counted(order(Schedule.zbv)[0], Times().of)
    assert idle(lines) == pytest.approx(3 / 51)
    assert textbook(Schedule.zbv, Times(1, 1.4, 0.6), pp=4, chunks=2, micro_batches=8) is None


def test_a_delay_of_messages_only_adds() -> None:
    for schedule in Schedule:
        actions, _ = order(schedule)
        assert idle(counted(actions, Times().of, delay=0.1)) > idle(counted(actions, Times().of))


def test_what_a_rank_holds() -> None:
    assert [in_flight(actions, chunks=1) for actions in order(Schedule.one_f_one_b)[0]] == [4, 3, 2, 1]
    assert [in_flight(actions, chunks=2) for actions in order(Schedule.zbv)[0]] == [4] * 4


def test_a_drawing_shows_who_did_what_when() -> None:
    lines = counted(order(Schedule.one_f_one_b, pp=2, micro_batches=2)[0], Times().of)
    assert drawing(lines, width=9) == ["ab..AA.BB", ".aAAbBB.."]


def test_the_command_runs() -> None:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "schedules.py"), "--pp", "2", "--repetitions", "2",
        "--milliseconds", "1", "1", "1", "--no-model", "--no-write", "--draw",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "% (" in line]
    assert [row[0] for row in rows] == [s.value for s in Schedule]
