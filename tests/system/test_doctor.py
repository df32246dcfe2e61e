"""The real ``moetrain doctor``: two ranks that are well, and faults: a stopped rank, unshared storage, a slow pair, a
GPU with errors, numbers that arrive wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_nvml
import pytest
import torch

from moetrain import comm
from moetrain.cli.main import main
from moetrain.doctor import groups, pairs
from moetrain.doctor.findings import Level
from moetrain.layouts import Layout
from moetrain.mesh import Mesh

COMMAND = [sys.executable, "-m", "moetrain", "doctor", "train.device=cpu", "train.threads=1", "doctor.slow=100"]
"""Two ranks and other tests on two cores: a pair is slow for a moment."""


def doctor(*words: str, env: dict[str, str] | None = None, timeout: float = 300) -> Any:
    return subprocess.run([*COMMAND, *words], env=env, capture_output=True, text=True, timeout=timeout)


def lines(out: str, what: str) -> list[str]:
    return [line for line in out.splitlines() if line.split(maxsplit=1)[1].startswith(what)]


def test_two_ranks_that_are_well(tmp_path) -> None:
    done = doctor("layout.ep=2", "doctor.megabytes=[0.1,2]", "--json", f"run.dir={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] != "bad"
    by = {f["what"]: f for f in found["findings"]}
    names = "all ranks = dp = dp*cp storage = ep*etp = ep"
    for operation in ("all-to-all", "all-gather", "reduce-scatter"):
        data = by[f"{operation}, {names}"]["data"]
        assert data["groups"] == [[0, 1]]
        assert list(data["rates"]) == ["100000", "2000000"]
        assert all(1e5 < rate < 1e12 for of in data["rates"].values() for rate in of)
    rates = by["pairs within a node"]["data"]["bytes_per_second"]
    assert [(a, b) for a, b, _ in rates] == [(0, 1), (1, 0)]
    assert all(1e5 < rate < 1e12 for _, _, rate in rates)
    assert len(by["shared storage"]["data"]["answers"]) == 2
    assert by["software"]["data"]["torch"] == torch.__version__
    assert "F.grouped_mm" in by["kernel, bfloat16"]["data"]["chosen"]
    assert not (tmp_path / "runs").exists(), "nothing is left"


def test_one_rank_and_quick(capsys, tmp_path) -> None:
    words = ["doctor", "train.device=cpu", f"run.dir={tmp_path / 'runs'}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "1 on cpu, alone: no groups and no pairs" in out
    assert "every rank's cpu computes what is known" in out
    assert main([*words, "--quick"]) == 0
    out = capsys.readouterr().out
    assert "ranks" not in out
    assert lines(out, "software")
    assert list(tmp_path.iterdir()) == []


def test_gpus_by_the_drivers_word(tmp_path) -> None:
    env = fake_nvml.environment(tmp_path)
    well = doctor("--quick", env=env)
    assert well.returncode == 0, well.stdout + well.stderr
    assert "driver 999.88.77" in well.stdout
    first, second = lines(well.stdout, "GPU")
    assert first.startswith("warning  GPU 0: NVIDIA Fake 0; NVLink 7 of 18 down; 61 C, 1755 of 1980 MHz, 100 W")
    assert second.startswith("warning  GPU 1: NVIDIA Fake 1; PCIe x8 of x16; 61 C")
    assert "sees none of the 2 GPUs" in well.stdout or torch.version.cuda
    ill = doctor("--quick", env=env | {"FAKE_NVML_ILL": "3"})
    assert ill.returncode == 1
    line = lines(ill.stdout, "GPU 1")[0]
    assert line.startswith("bad")
    assert "3 uncorrected ECC errors since the driver was loaded: reset or replace it" in line
    assert "slowed down by hardware slowdown, heat (hardware)" in line
    assert "at 89 C, 1 below where it slows down" in line
    assert ill.stdout.splitlines()[-1].endswith("findings: 1 bad, 2 warning")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def launch(rank: int, *words: str, cwd: Path, prefix: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
    """A rank of two, as a launcher starts it."""
    mine = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} | env
    paths = os.pathsep.join(p for p in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [*prefix, *COMMAND, *words], cwd=cwd, env=os.environ | {"PYTHONPATH": paths} | mine, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_storage_that_is_not_shared(tmp_path) -> None:
    """Each rank takes ``runs`` for a folder of its own working folder, as on two hosts without a shared disk."""
    port, both = str(free_port()), []
    for rank in range(2):
        (tmp_path / f"host-{rank}").mkdir()
        words = ["layout.dp=2", "run.dir=runs", "train.timeout=40", "doctor.megabytes=[0.1]"]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        both.append(launch(rank, *words, cwd=tmp_path / f"host-{rank}", **env))
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [1, 0], said
    line = lines(said[0][0], "shared storage")[0]
    assert line.startswith("bad      shared storage: rank 1 does not see ")
    assert "host-1/runs/.doctor-" in line
    assert line.endswith("set run.dir to a folder that all nodes share and all ranks can write to")
    assert said[1][0] == "", "rank 0 speaks"
    assert not list(tmp_path.rglob(".doctor-*"))


def test_a_rank_that_does_not_answer(tmp_path) -> None:
    words = ["layout.dp=2", f"run.dir={tmp_path}", "train.timeout=6", "doctor.megabytes=[64]", "doctor.rounds=1000"]
    life = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until, stopped = time.monotonic() + 200, None
    while stopped is None and time.monotonic() < until and life.poll() is None:
        time.sleep(0.2)
        if list(tmp_path.glob(".doctor-*/found.json")):  # the ranks have met
            stopped = _rank_one(life.pid)
    assert stopped is not None, life.communicate()
    os.kill(stopped, signal.SIGSTOP)
    try:
        out, _ = life.communicate(timeout=120)
    finally:
        if life.poll() is None:
            life.kill()
    assert life.returncode == 1
    assert "hang: rank 1 said nothing: stopped, cut off or gone; the others wait for it" in out
    assert lines(out, "ranks: they ended with exit code 6; their logs are in ")
    assert lines(out, "software"), "what was found before is told"
    assert lines(out, "ranks: 2 on cpu over gloo")


def _rank_one(parent: int) -> int | None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = int((process / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if mine and b"\0RANK=1\0" in (process / "environ").read_bytes():
                return int(process.name)
        except (OSError, ValueError):
            continue
    return None


@pytest.fixture
def hosts():
    """Two network namespaces, from the first of which to the second 20 Mbit/s pass, back what there is."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root, ip and tc")
    names = [f"moedoc{os.getpid()}{x}" for x in "ab"]

    def do(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, capture_output=True, text=True)

    try:
        steps = [["ip", "netns", "add", name] for name in names]
        steps.append(
            ["ip", "-n", names[0], "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", names[1]]
        )
        for i, name in enumerate(names):
            steps.append(["ip", "-n", name, "addr", "add", f"10.213.7.{i + 1}/24", "dev", f"v{i}"])
            steps += [["ip", "-n", name, "link", "set", dev, "up"] for dev in ("lo", f"v{i}")]
        steps.append(["ip", "netns", "exec", names[0], "tc", "qdisc", "add", "dev", "v0", "root", "tbf", "rate",
                      "20mbit", "burst", "32kbit", "latency", "400ms"])  # fmt: skip
        for step in steps:
            done = do(*step)
            if done.returncode:
                pytest.skip(f"{' '.join(step)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            do("ip", "netns", "del", name)


def test_a_slow_pair_is_named(hosts, tmp_path) -> None:
    """A real link that is slow one way."""
    both = []
    for rank, name in enumerate(hosts):
        words = ["layout.dp=2", f"run.dir={tmp_path}", "doctor.slow=8", "doctor.megabytes=[1]", "doctor.rounds=3"]
        prefix = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname node{rank}; exec "$@"', "-")
        env = {"MASTER_ADDR": "10.213.7.1", "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": f"v{rank}"}
        both.append(launch(rank, *words, cwd=tmp_path, prefix=prefix, **env))
    said = [p.communicate(timeout=300) for p in both]
    assert both[0].returncode == 1, said
    assert "on 2 host(s): node0 (1), node1 (1)" in said[0][0]
    line = lines(said[0][0], "pairs across nodes")[0]
    assert line.startswith("bad      pairs across nodes: slow: rank 0 to 1 (node0 to node1) ")
    assert "rank 1 to 0" not in line
    assert "2 ranks across nodes" in lines(said[0][0], "all-gather")[0]


def measured(rank: int, world: int, fault: str | None) -> dict[str, Any]:
    """On a rank; rank 1's last number is wrong where there is a ``fault``."""
    mesh = Mesh.build(Layout(dp=world), rank=rank, world=world, device=torch.device("cpu"))
    name = {"all-gather": "all_gather_into", "reduce-scatter": "reduce_scatter_into"}.get(fault or "", "size")
    right = getattr(comm, name)

    def wrong(out: torch.Tensor, *args: Any, **more: Any) -> None:
        right(out, *args, **more)
        out[-1] += rank

    setattr(comm, name, wrong if fault else right)
    try:
        return groups.measure(
            groups.of_layout(mesh.layout)[0], mesh, bytes=[4096], rounds=1, device=torch.device("cpu")
        )
    finally:
        setattr(comm, name, right)


@pytest.mark.parametrize("fault", [None, "all-gather", "reduce-scatter"])
def test_numbers_that_arrive_wrong(ranks, fault) -> None:
    of_ranks = ranks(2).run(measured, fault)
    kind = groups.of_layout(Layout(dp=2))[0]
    found = {f.what.split(",")[0]: f for f in groups.judged(kind, of_ranks, ["a", "b"])}
    assert {name for name, f in found.items() if f.level is Level.bad} == ({fault} if fault else set())
    if fault:
        assert "wrong on rank 1 (b): 1 of " in found[fault].words


def test_pairs_of_many_ranks() -> None:
    """Every rank is in each turn once at the most, and reaches those of its groups at 1, 2, 4, ... places."""
    turns = pairs.chosen(groups.of_layout(Layout(dp=4, tp=8, ep=32)), world=32)
    for turn in turns:
        busy = [r for pair in turn for r in pair]
        assert len(busy) == len(set(busy))
    flat = [pair for turn in turns for pair in turn]
    assert len(flat) == len(set(flat))
    assert {b for a, b in flat if a == 0} == {1, 2, 4, 8, 16}
    assert len(turns) < 32, "side by side"
    assert pairs.chosen([], world=3) == [[(0, 1)], [(0, 2)], [(1, 0)], [(1, 2)], [(2, 0)], [(2, 1)]]


def test_a_slow_rank_is_what_slow_pairs_have_in_common() -> None:
    hosts = ["n1", "n1", "n2", "n2"]
    rates = {(a, b): 1e9 if 3 in (a, b) else 1e10 for a in range(4) for b in range(4) if a != b}
    within, across = pairs.judged(rates, hosts, slow=4)
    assert across.level is Level.bad
    assert across.words.endswith("; all of them with rank 3")
    assert across.data["slow"] == [(0, 3), (1, 3), (3, 0), (3, 1)]
    assert within.words.startswith("slow: rank 2 to 3 1 GB/s, rank 3 to 2 1 GB/s; the median of 4 is 10 GB/s")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("doctor.rounds=0", "doctor.rounds=0: has to be at least 1"),
        ("doctor.slow=1", "doctor.slow=1.0: has to be above 1"),
        ("doctor.megabytes=[0]", "doctor.megabytes=[0.0]: a list of sizes above 0"),
        ("doctor.megabytes=[", "cannot be parsed: write for example doctor.megabytes=[1,16]"),
        ("doctor.megabytes=big", "doctor.megabytes='big' is not a list"),
        ("doctor.round=1", "unknown key 'doctor.round'; did you mean 'rounds'?"),
        ("doctor.rounds", "is not key=value"),
        ("--quik", "unknown option --quik; did you mean '--quick'?"),
        ("layout.ep=3", "layout.ep=3 does not divide model.moe.num_experts="),
        ("optim.lrr=1", "did you mean 'optim.lr'?"),
    ],
)
def test_words_that_are_wrong(words, says, capsys, tmp_path) -> None:
    assert main(["doctor", "train.device=cpu", f"run.dir={tmp_path / 'runs'}", words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written(capsys) -> None:
    assert main(["doctor", "train.device=cpu", "run.dir=/dev/null/runs"]) == 1
    out = capsys.readouterr().out
    assert lines(out, "run.dir: /dev/null/runs cannot be written")[0].startswith("bad")
    assert "not started: " in out
