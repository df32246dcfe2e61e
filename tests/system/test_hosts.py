"""Two hosts under torchrun, each a network namespace of its own with a cable between them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_command import losses, train, words

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root, and ip (iproute2)"
)
def test_two_hosts_are_the_same_run_as_one(small_corpus, tmp_path) -> None:
    """No interface is named: the ranks take the one by which the hosts reach each other."""
    from chaos import Network

    network, here = Network(), tmp_path / "here"
    argv = words(small_corpus, tmp_path / "hosts", "layout.dp=2", "train.exit_after=6")
    env = {k: v for k, v in os.environ.items() if not k.endswith("_SOCKET_IFNAME")}
    agents = []
    try:
        for i, host in enumerate(network.hosts):
            torchrun = [
                "ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=hosts",
                f"--rdzv-conf=is_host={int(i == 0)}", f"--local-addr=10.77.0.{i + 1}", "-m", "moetrain", "train",
            ]  # fmt: skip
            log = (tmp_path / f"{host}.log").open("w")
            agents.append(subprocess.Popen([*torchrun, *argv], stdout=log, stderr=log, env=env, cwd=ROOT))
        for agent, host in zip(agents, network.hosts, strict=True):
            assert agent.wait(timeout=200) == 0, (tmp_path / f"{host}.log").read_text()
    finally:
        for agent in agents:
            agent.kill()
        network.close()
    done = train(*words(small_corpus, here, "layout.dp=2", "train.exit_after=6"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "hosts") == losses(here)
