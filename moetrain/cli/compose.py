"""Hydra lives here and only here: configs/ + command line -> one checked Config, or one line on what is wrong."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import moetrain
from moetrain import config as configs
from moetrain.cli import sweep
from moetrain.config import OPTIONS, UserError, keys, nearest
from moetrain.data.loader import CorpusConfig
from moetrain.job import Config
from moetrain.report.points import short

PACKAGES = {
    "gate": "model.moe.gate",
    "router": "model.moe.router",
    "placement": "model.moe.placement",
    "dispatcher": "model.moe.dispatcher",
    "balance": "model.moe.balance.{name}",  # options of this group are combined, not exclusive
}
"""Where the options of a short group belong in the tree."""

HYDRA_FLAGS = (
    "-m",
    "--multirun",
    "-c",
    "--cfg",
    "-h",
    "--help",
    "--hydra-help",
    "-i",
    "--info",
    "-sc",
    "--shell-completion",
)


SWEEP = ("sweep=", "+sweep=")
"""How a word begins that names a sweep of configs/sweep/, which is many jobs."""


def folder() -> Path:
    """configs/: beside the package in a checkout, inside it where installed from a wheel."""
    package = Path(moetrain.__file__).parent
    for place in (package.parent / "configs", package / "configs"):
        if (place / "train.yaml").is_file():
            return place
    raise UserError(f"configs/train.yaml is neither beside nor inside {package}: install moetrain again")


def register() -> None:
    store = ConfigStore.instance().store
    schema = OmegaConf.structured(Config)
    for group in ("gate", "router", "placement", "dispatcher"):  # OmegaConf cannot replace a node by its sibling class
        OmegaConf.update(schema, PACKAGES[group], "???")
    store(name="schema", node=schema)
    for group, options in OPTIONS.items():
        for name, cls in options.items():
            store(group=group, name=name, node=cls, package=PACKAGES[group].format(name=name))


def split(argv: list[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """(what Hydra understands, (corpus, key, value) of ``data.corpora.NAME.key=value``).

    Hydra cannot add a typed node to a mapping, so corpora are added here. ``+experiment=x`` is ``experiment=x``, and
    ``+sweep=x`` is ``sweep=x``; Hydra takes no ``true`` for the name of a file: ``trace=true`` is ``trace=on``.
    """
    rest, corpora = [], []
    for word in argv:
        if found := re.fullmatch(r"\+*data\.corpora\.([\w-]+)\.(\w+)=(.*)", word, re.S):
            corpora.append(found.groups())
        else:
            rest.append(re.sub(r"^\+((?:experiment|sweep)=)", r"\1", "trace=on" if word == "trace=true" else word))
    return rest, corpora


def compose(argv: list[str]) -> Config:
    """Overrides, or ``--config FILE`` and overrides of its keys -> Config. Raises ``UserError`` in one line."""
    argv, corpora = split(argv)
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UserError("--config needs a file: moetrain train --config runs/NAME/config.yaml")
        return _from_file(Path(argv[at + 1]), argv[:at] + argv[at + 2 :], corpora)
    for word in argv:
        if word.startswith("-"):
            raise UserError(
                f"unknown option {word}{nearest(word, (*HYDRA_FLAGS, '--config'))} (keys are given as key=value)"
            )
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"{word!r} is not key=value: write for example optim.lr=3e-4")
        if word.startswith(SWEEP):
            raise UserError(f"{word} is many jobs, and this is one: moetrain train -m {word} ... runs them")
    register()
    GlobalHydra.instance().clear()
    with _one_line(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder())):
        return _finish(hydra.compose("train", overrides=argv), corpora)


def with_hydra(argv: list[str], run: Callable[[Config], str]) -> Path | None:
    """Hydra's own manners: --help, --cfg job, -m sweeps (each job in its own run folder), --info, completion.

    Returns the folder of a sweep.
    """
    register()
    argv, corpora = split(argv)
    for word in argv:
        if word.startswith(SWEEP) and "," in word:
            raise UserError(f"{word}: one sweep at a time, for example {word.partition(',')[0]}")

    def job(node) -> float:
        hc = HydraConfig.get()
        assert hc.mode == RunMode.MULTIRUN
        swept = [word for word in hc.overrides.task if word not in argv]

        def make() -> Config:
            with _one_line():
                cfg = _finish(node, corpora)
            name = f"{cfg.run.name}/{hc.job.num:03d}-{','.join(map(short, swept))}"[:200].rstrip("-").replace(" ", "")
            return configs.replace(cfg, run=configs.replace(cfg.run, name=name))

        return sweep.run_point(make, run, sweep=Path(hc.sweep.dir), number=hc.job.num, overrides=swept)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the error becomes one line here
    before, Watch.sweep = sys.argv, None
    flags_first = sorted(
        argv, key=lambda word: "=" in word and not word.startswith("-")
    )  # argparse wants one run of them
    sys.argv = ["moetrain train", *flags_first]
    try:
        with _one_line():
            hydra.main(version_base="1.3", config_path=str(folder()), config_name="train")(job)()
    finally:
        sys.argv = before
    return Watch.sweep


class Watch(Callback):
    """Hydra's word that a sweep begins, which only it knows the folder of."""

    sweep: Path | None = None

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        Watch.sweep = Path(config.hydra.sweep.dir)
        sweep.begin(Watch.sweep)


def _from_file(path: Path, overrides: list[str], corpora: list[tuple[str, str, str]]) -> Config:
    cfg = configs.read(path, Config)
    if not overrides and not corpora:
        return cfg
    with _one_line():
        node = OmegaConf.structured(cfg)
        node.merge_with_dotlist(overrides)
        return _finish(node, corpora)


def _finish(node: DictConfig, corpora: list[tuple[str, str, str]]) -> Config:
    """Add the corpora; composed tree -> live, checked objects."""
    for name, key, value in corpora:
        if name not in node.data.corpora:
            with open_dict(node):
                node.data.corpora[name] = OmegaConf.structured(CorpusConfig)
        OmegaConf.update(node, f"data.corpora.{name}.{key}", value if key == "path" else yaml.safe_load(value))
    return OmegaConf.to_object(node)  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def _one_line():
    """Turn what Hydra and OmegaConf say into a ``UserError`` that names the value, the rule and the fix."""
    try:
        yield
    except OverrideParseException as e:
        raise UserError(f"{e.override!r} cannot be parsed: {_first_line(str(e))}") from e
    except dataclasses.FrozenInstanceError as e:  # +key=value made a node of the tree larger than its class
        raise UserError(
            f"unknown key added with '+': {str(e).split(' is ')[0]}; moetrain train --cfg job prints every key"
        ) from e
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(_explain(e)) from e


def _explain(e: BaseException) -> str:
    chain, cause = [str(e)], e.__cause__
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    if found := re.search(r"Could not (?:find|load) '([\w./-]+)/([\w.-]+)'", text):
        group, option = found.groups()
        options = sorted(_options(group))
        return f"{group}={option}: no such option{nearest(option, options)} (there are: {', '.join(options)})"
    if found := re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in", text):
        key = found[1] or (re.search(r"full_key: (\S+)", text) or found)[1] or found[2]
        return f"unknown key '{key}'{nearest(key, _all_keys())}; moetrain train --cfg job prints every key"
    if found := re.search(r"[Mm]issing mandatory value:? (\S+)", text):
        key = (re.search(r"full_key: (\S+)", text) or found)[1]
        return f"{key} has no value: give one with {key}=..."
    if found := re.search(r"full_key: (\S+)", text):
        rule = next((line for line in reversed(text.splitlines()) if "Value" in line or "Invalid" in line), chain[-1])
        return f"{found[1]}: {_first_line(rule)}"
    return " ".join(_first_line(part) for part in chain[:1])


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _options(group: str) -> set[str]:
    return {p.stem for p in (folder() / group).glob("*.yaml")} | set(OPTIONS.get(group, {}))


def _all_keys() -> list[str]:
    groups = [p.name for p in folder().iterdir() if p.is_dir() and p.name != "cluster"] + list(OPTIONS)
    balance = [f"model.moe.balance.{n}.{k}" for n, cls in OPTIONS["balance"].items() for k in keys(cls())]
    return keys(Config()) + groups + balance
