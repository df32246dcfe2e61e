"""Ranks: starting the local ones under torch's elastic agent, and being one."""

import logging
import os
import sys
from pathlib import Path

from moetrain import comm, signals
from moetrain import config as configs
from moetrain.checkpoint import SupersededError
from moetrain.config import UserError
from moetrain.job import Config, check, check_here
from moetrain.launchers import call_off, rank_info
from moetrain.resume import preflight
from moetrain.run import FailedError, StoppedError, run
from moetrain.steady import set_allocator
from moetrain.train import CorruptionError
from moetrain.watchdog import HUNG
from moetrain.world import World, die_with, join, leave

STOPPED, SUPERSEDED, CORRUPT = 3, 5, 7
"""Exit codes of a run that an alert ended, that another life took over, of which a rank computes or keeps something
else than it should; 4 is that of a run that was asked to leave, 6 a watchdog's."""
_FINAL = 2, STOPPED, signals.ASKED, SUPERSEDED, CORRUPT
"""Where starting again would lead to the same."""


def be_rank(cfg: Config, *, checked: bool) -> int:
    """Run this process's rank; only rank 0 says on the console what the user can mend.

    ``checked``: whether whoever started this rank has been through ``preflight``; under torchrun nobody has.
    """
    t, rank = cfg.train, 0
    try:
        here = rank_info()
        rank, size = here.rank, here.size
        if not checked:
            check(cfg, world=size)  # on every rank, before any of them waits for another
            check_here(cfg)
            if rank == 0:
                try:
                    preflight(cfg, world=size, log=lambda line: print(line, flush=True))
                except UserError:
                    call_off(cfg.run.folder)
                    raise
        set_allocator(t.allocator)
        world = join(
            device=t.device, communication=t.communication, timeout=t.timeout, threads=t.threads, folder=cfg.run.folder
        )
        code = _run(cfg, world)
    except UserError as e:
        if rank == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        return signals.code(SUPERSEDED) if isinstance(e, SupersededError) else 2
    except CorruptionError as e:
        if rank == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        return CORRUPT
    except FailedError as e:
        print(f"rank {rank}: {e}", file=sys.stderr, flush=True)
        return 1
    leave(world)
    return code


def _run(cfg: Config, world: World) -> int:
    try:
        run(cfg, world)
    except StoppedError as e:
        if world.main:
            print(e, file=sys.stderr, flush=True)
        comm.barrier(world.host_group)  # a rank that leaves first has the others ended
        if not e.asked:
            return STOPPED
        return signals.code(signals.ASKED)
    return 0


def start_ranks(folder: Path, *, ranks: int, restarts: int = 0, program: tuple[str, ...] = ()) -> int:
    """Start ``ranks`` processes that run ``folder/config.yaml``, or ``program``, up to ``restarts`` times again.

    Returns 0, or the exit code of the first rank to fail.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # our words are in the ranks' logs
    os.environ["MOETRAIN_PARENT"] = str(os.getpid())
    (folder / "logs").mkdir(exist_ok=True)
    signals.catch((folder / "stop").touch)  # the agent would give its ranks half a minute
    program = program or ("-m", "moetrain.cli.ranks", str(folder / "config.yaml"))
    for left in range(restarts, -1, -1):
        code = _start_once(folder, ranks=ranks, program=program)
        if code in (0, *_FINAL) or not left or signals.caught:
            return code
        print(f"the ranks are started again ({left - 1} more times at the most)", file=sys.stderr, flush=True)
    raise AssertionError("unreachable")


def _start_once(folder: Path, *, ranks: int, program: tuple[str, ...]) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    others = {rank: Std.ALL for rank in range(1, ranks)}
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=folder.name, rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", max_restarts=0, monitor_interval=0.1, local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=others),
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )  # fmt: skip
    try:
        elastic_launch(launch, sys.executable)(*program)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode in _FINAL:
            return failure.exitcode
        what = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"rank {rank} failed ({what}): see {folder}/logs/rank-{rank}.log", file=sys.stderr)
        return HUNG if failure.exitcode == HUNG else 1
    return 0


if __name__ == "__main__":
    die_with(int(os.environ["MOETRAIN_PARENT"]))  # a killed launcher takes its ranks along
    raise SystemExit(be_rank(configs.read(Path(sys.argv[1]), Config), checked=True))
