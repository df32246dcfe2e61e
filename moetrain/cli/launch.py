"""``moetrain launch``: the words of ``moetrain train``, as a job of a Slurm cluster."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from moetrain import config as configs
from moetrain.cli.compose import compose
from moetrain.cli.preset import read_cluster
from moetrain.cluster.config import SlurmConfig
from moetrain.cluster.slurm import Job, last_job, state, submit
from moetrain.config import UserError, nearest
from moetrain.job import Config, check
from moetrain.layouts import Layout
from moetrain.model.flops import size
from moetrain.resume import first
from moetrain.telemetry.redact import environment, redact

_USAGE = """\
usage: moetrain launch [cluster=NAME] [cluster.KEY=VALUE ...] [words of moetrain train] [--dry-run]

Writes the run folder's launch/ (resolved config, batch file, git commit and difference, environment without secrets),
says what it will take, submits, prints the job's id. The job trains, saves before its time is over and requeues itself
until the run is done, starts ranks that fail again, leaves out nodes that are not well: docs/cluster.md.

  cluster=NAME         slurm_h100 [this], slurm_a100, slurm_gb200, slurm_cpu: configs/cluster/NAME.yaml; or a YAML file
    cluster.nodes      0: as many as the layout's ranks fill, one where layout.dp is -1
    cluster.ranks_per_node  .gpus=gpu:h100 or ""  .cpus_per_rank  .memory of a node  .python there  .check_nodes=false
    cluster.partition  .account  .qos  .constraint  .exclude  .reservation  .options=[--mail-type=END]
    cluster.time       minutes of a life      cluster.leave     minutes before its end at which it saves and leaves
    cluster.restarts   of failed ranks        cluster.requeues  lives after the first
    cluster.setup      lines of shell first   cluster.interface of the network
    cluster.container  none, pyxis, apptainer  .image  .mounts  cluster.price     of a GPU for an hour
  --dry-run            print all of it; write and submit nothing
  --folder             print the run folder of these words, and nothing else
"""
_FLAGS = ("--config", "--dry-run", "--folder", "--help")


def main(argv: list[str]) -> int:
    """Runs ``moetrain launch ARGV``; raises ``UserError`` for the caller to print."""
    if any(word in ("-h", "--help") for word in argv):
        print(_USAGE, end="")
        return 0
    flags, named, own, words = _parse(argv)
    cfg = compose(words)
    if "--folder" in flags:
        print(cfg.run.folder)
        return 0
    cluster = read_cluster(named, own, SlurmConfig, slurm=True)
    job = Job(cfg.run.name.replace("/", "-"), cfg.run.folder, _nodes(cfg.layout, cluster), cluster)
    layout = check(cfg, world=job.ranks)
    first(cfg, None, log=print)
    script, summary = job.script(), _summary(cfg, layout, job, named)
    if "--dry-run" in flags:
        print("\n".join([*summary, "", script, f"# its words: {' '.join(_words(job))}"]))
        return 0
    if (before := last_job(job.folder)) and (now := state(before)):
        raise UserError(
            f"job {before} of {job.folder} is {now}: scancel {before} first, wait for it, or give this one another "
            f"run.name"
        )
    launch = job.folder / "launch"
    made = [path for path in (launch, job.folder) if not path.exists()]
    _write(job, cfg, script, argv)
    try:
        number = submit(launch / "pretrain.sbatch", _words(job))
    except UserError:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        raise
    (launch / "job").write_text(number + "\n")
    says = f"what it says: {launch}/slurm-{number}.out, then {job.folder}/logs/rank-0.log"
    print("\n".join([*summary, f"job {number}; squeue -j {number}; {says}"]))
    return 0


def _parse(argv: list[str]) -> tuple[set[str], str, dict[str, Any], list[str]]:
    """(flags, the cluster's name, its own keys, the words for ``compose``)."""
    flags, named, own, words, rest = set(), "slurm_h100", {}, [], iter(argv)
    for word in rest:
        key, equals, text = word.partition("=")
        if word == "--config":
            words += [word, *([path] if (path := next(rest, None)) else [])]
        elif word in _FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}{nearest(key, _FLAGS)} (there are: {', '.join(_FLAGS)})")
        elif key == "cluster" and text:
            named = text
        elif key.startswith("cluster.") and equals:
            try:
                own[key.partition(".")[2]] = yaml.safe_load(text) if text else ""
            except yaml.YAMLError as e:
                raise UserError(f"{word!r} cannot be parsed: write for example cluster.nodes=4") from e
        elif key.partition(".")[0] == "cluster":
            raise UserError(f"{word!r} is not key=value: write for example cluster=slurm_h100 cluster.nodes=4")
        else:
            words.append(word)
    texts = {f.name for f in SlurmConfig.__dataclass_fields__.values() if f.type is str}
    return flags, named, {k: str(v) if k in texts and v is not None else v for k, v in own.items()}, words


def _nodes(layout: Layout, cluster: SlurmConfig) -> int:
    """As many as were asked for, or as the layout's ranks fill."""
    here, ranks = cluster.ranks_per_node, layout.world
    if cluster.nodes:
        return cluster.nodes
    if layout.dp != -1 and ranks % here:
        raise UserError(
            f"layout {layout.words()} is {ranks} ranks, not a multiple of cluster.ranks_per_node={here}: change one of "
            f"them"
        )
    return max(1, -(-ranks // here))


def _words(job: Job) -> list[str]:
    return ["--config", str((job.folder / "launch" / "config.yaml").absolute())]


def _summary(cfg: Config, layout: Layout, job: Job, named: str) -> list[str]:
    c = job.cluster
    absent = [corpus.path for corpus in cfg.data.corpora.values() if corpus.path and not Path(corpus.path).exists()]
    what = "GPU" if c.gpus else "rank"
    hours = job.ranks * c.time / 60
    cost = f", {hours * c.price:,.2f} at cluster.price={c.price:g}" if c.price else ""
    return [
        f"run {job.folder}: {size(cfg.model)}; {cfg.train.steps} steps",
        f"cluster {named}: {job.nodes} node(s) of {c.ranks_per_node} ranks, layout {layout.words()}",
        *(f"warning: the corpus {path} is not on this machine: it has to be on every node" for path in absent),
        f"a life of {c.time} minutes: {hours:,.1f} {what}-hours{cost}; at the most {c.requeues + 1} lives, the last "
        f"one ends when the run does",
    ]


def _write(job: Job, cfg: Config, script: str, argv: list[str]) -> None:
    folder = job.folder / "launch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        configs.write(cfg, folder / "config.yaml")
        (folder / "pretrain.sbatch").write_text(script)
        (folder / "command.txt").write_text(redact(shlex.join(["moetrain", "launch", *argv])) + "\n")
        (folder / "environment.txt").write_text(
            "".join(f"{name}={value}\n" for name, value in sorted(environment(os.environ).items()))
        )
        commit, difference = _git()
        (folder / "git.txt").write_text(commit)
        (folder / "git.diff").write_text(redact(difference))
    except OSError as e:
        raise UserError(
            f"{folder} cannot be written ({e.strerror}): set run.dir or run.name to a folder you can write"
        ) from e


def _git() -> tuple[str, str]:
    """The commit of the moetrain that is used here, and what is not committed of it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            found = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return found.stdout if found.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or f"not a git checkout: moetrain from {here}, {sys.version.split()[0]}\n"
    return commit + git("status", "--short"), git("diff", "HEAD")
