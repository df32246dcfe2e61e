"""``moetrain doctor``: is this machine, and are these ranks, fit to train?"""

import contextlib
import json
import os
import secrets
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moetrain import __version__, parallel, signals
from moetrain import config as configs
from moetrain.cli.compose import compose
from moetrain.cli.ranks import start_ranks
from moetrain.config import UserError, nearest
from moetrain.doctor import here
from moetrain.doctor.findings import Finding, Level, bad, verdict
from moetrain.doctor.rank import DoctorConfig, be_rank, end, failure
from moetrain.job import Config
from moetrain.launchers import rank_info
from moetrain.layouts import broken_rule
from moetrain.watchdog import told
from moetrain.world import die_with, launched, wanted_ranks

_USAGE = """\
usage: moetrain doctor [--quick] [--json] [key=value ...] [doctor.KEY=VALUE ...]

Software, libraries, kernels, GPUs, limits and room of this machine; then, on the ranks of the layout, started here or
by torchrun or srun, the collectives of every group, every pair of ranks, and shared storage.

    key=value   as for moetrain train; layout.* say which ranks and groups, train.timeout how long one waits for another
    --config F  or the config.yaml of a run, and overrides of its keys
    --quick     this process alone: no ranks, no memory of a GPU, for a container's health check
    --json      one JSON document
    doctor.megabytes=[...]  sizes of a rank's buffers [0.25,16]
    doctor.rounds=N         of which a rate is the median [5]
    doctor.slow=X           a pair is slow that is X times below the median [4]

Exit code 0: well, maybe with warnings; 1: something is bad; 2: something in the input to mend. docs/doctor.md
"""
_FLAGS = ("--config", "--quick", "--json", "--help")


@dataclass
class _Report:
    """What was found so far: printed as it comes, or all of it as JSON at the end."""

    as_json: bool
    found: list[Finding] = field(default_factory=list)

    def tell(self, finding: Finding) -> None:
        self.found.append(finding)
        if not self.as_json:
            print(finding, flush=True)

    def end(self) -> int:
        worst = max((f.level for f in self.found), key=list(Level).index)
        if self.as_json:
            findings = [f.encode() for f in self.found]
            print(json.dumps({"moetrain": __version__, "verdict": worst.value, "findings": findings}, indent=1))
        else:
            print(verdict(self.found), flush=True)
        return int(worst is Level.bad)


def main(argv: list[str]) -> int:
    """Runs ``moetrain doctor ARGV``; raises ``UserError`` for the caller to print."""
    if any(word in ("-h", "--help") for word in argv):
        print(_USAGE, end="")
        return 0
    flags, own, words = _parse(argv)
    cfg, report = compose(words), _Report("--json" in flags)
    if launched() and "--quick" not in flags:
        end(_launched(cfg, own, report))
    world = 0 if "--quick" in flags else _checked(cfg, wanted_ranks(cfg.layout, device=cfg.train.device))
    for finding in here.look(cfg):
        report.tell(finding)
    code = _ranks(cfg, own, report, world) if world else 0
    return 2 if code == 2 else report.end()


def _parse(argv: list[str]) -> tuple[set[str], DoctorConfig, list[str]]:
    """(flags, keys of ``doctor.``, the words for ``compose``)."""
    flags, words, own, rest = set(), [], {}, iter(argv)
    for word in rest:
        key, equals, text = word.partition("=")
        if word == "--config":
            words += [word, *([path] if (path := next(rest, None)) else [])]
        elif word in _FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}{nearest(key, _FLAGS)} (there are: {', '.join(_FLAGS)})")
        elif not key.startswith("doctor."):
            words.append(word)
        elif not equals:
            raise UserError(f"{word!r} is not key=value: write for example doctor.rounds=3")
        else:
            own[key.removeprefix("doctor.")] = _value(word, text)
    return flags, configs.load(own, DoctorConfig, "doctor"), words


def _value(word: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{word!r} cannot be parsed: write for example doctor.megabytes=[1,16]") from error


def _checked(cfg: Config, world: int) -> int:
    """The number of ranks; raises ``UserError`` where the layout or the model does not fit it."""
    shape = parallel.shape(cfg.model, cfg.context)
    if rule := broken_rule(cfg.layout.solve(world, shape), shape):
        raise UserError(rule)
    return world


def _launched(cfg: Config, own: DoctorConfig, report: _Report) -> int:
    """Be one of a launcher's ranks; rank 0 speaks, and its exit code says what was found."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())
    rank = 0
    try:
        rank, world = (ranks := rank_info()).rank, ranks.size
        _checked(cfg, world)
        if rank == 0:
            for finding in here.look(cfg):
                report.tell(finding)
        be_rank(cfg, own, report.tell, folder=None)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        if rank:
            print(f"rank {rank}: {failure(error)}", file=sys.stderr, flush=True)
            return 1
        report.tell(bad("ranks", f"rank 0: {failure(error)}"))
    return report.end() if rank == 0 else 0


def _ranks(cfg: Config, own: DoctorConfig, report: _Report, world: int) -> int:
    """Start them here, or be the only one; an exit code."""
    folder = Path(cfg.run.dir).expanduser() / f".doctor-{secrets.token_hex(4)}"
    made = [p for p in (folder, *folder.parents) if not p.exists()]

    def clean() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run may have come there
            for parent in made[1:]:
                parent.rmdir()

    def leave() -> None:
        """At a signal, at once: nothing is to be saved, and the ranks end with this process."""
        clean()
        os._exit(143)

    try:
        folder.mkdir(parents=True)
        configs.write(cfg, folder / "config.yaml")
        (folder / "doctor.json").write_text(json.dumps(configs.dump(own)))
    except OSError as error:
        report.tell(bad("ranks", f"not started: {folder} cannot be written ({error.strerror}): set run.dir"))
        return 1
    if world == 1:
        try:
            be_rank(cfg, own, report.tell, folder=folder)
        except (RuntimeError, OSError) as error:
            report.tell(bad("ranks", failure(error)))
        finally:
            clean()
        return 0
    signals.catch(leave)
    code = start_ranks(folder, ranks=world, program=("-m", "moetrain.doctor.rank", str(folder)))
    for finding in _read(folder / "found.json"):
        report.tell(finding)
    if code in (0, 2):
        clean()
        return code
    for line in told(folder / "hangs" / "life-00000001", world) if (folder / "hangs").exists() else ():
        report.tell(bad("ranks", line))
    report.tell(bad("ranks", f"they ended with exit code {code}; their logs are in {folder}/logs"))
    return code


def _read(path: Path) -> list[Finding]:
    return [Finding.decode(data) for data in json.loads(path.read_text())] if path.exists() else []
