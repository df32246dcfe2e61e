"""Which checkpoint a run goes on from, what of it, and whether its config may. Nothing here writes."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moetrain import changes, checkpoint
from moetrain.checkpoint import Life
from moetrain.checkpoint.reading import covers
from moetrain.config import UserError
from moetrain.job import Config, Data, RunConfig, check, checkpoints, open_data
from moetrain.model.transformer import Transformer
from moetrain.optim import check_saved
from moetrain.parallel import state
from moetrain.parallel.plan import whole
from moetrain.telemetry.sinks import check_sinks

_SAMPLES = ("data", "seed", "train.seq_len")
"""What decides which samples there are: where a change of it is allowed, other data is too."""


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin from, and what of it."""

    folder: Path
    own: bool = True  # of this run
    weights_only: bool = False
    reset: tuple[str, ...] = ()  # optim, data
    changes: tuple[dict[str, Any], ...] = ()  # of the config, since the run began, each with its step
    other_data: bool = False  # is allowed
    lines: tuple[str, ...] = field(default=(), compare=False)  # what is to be said


def candidates(cfg: Config, *, upto: int | None = None) -> list[Path]:
    """The checkpoints that the run may begin from, the best first, whole or not. None: it starts.

    ``upto``: only its own, of steps no later than that.

    Raises ``UserError`` where what is asked for is not there, or would lose what is.
    """
    run, own = cfg.run, list(checkpoint.marked(checkpoints(cfg)))
    if upto is not None:
        return [path for path in own if (checkpoint.step_of(path) or 0) <= upto]
    if run.resume == "never":
        if own:
            raise UserError(
                f"run.resume=never, but {run.folder} already holds {own[0].name}: choose another run.name, "
                f"or continue it with run.resume=auto"
            )
    elif run.resume != "auto":
        path = Path(run.resume).expanduser()
        if path.resolve().parent != checkpoints(cfg).resolve():
            raise UserError(
                f"run.resume={run.resume!r} is neither auto nor never nor a checkpoint in {checkpoints(cfg)}: to begin "
                f"a new run from another one's, use run.fork"
            )
        return own if own and _has_gone_on(run, own[0]) else [path]
    if own:
        return own
    return [_other(run, key, text) for key in ("fork", "warm_start") if (text := getattr(run, key))]


def _has_gone_on(run: RunConfig, newest: Path) -> bool:
    """Whether a life with the same ``run.resume`` has saved since: a command that is repeated continues."""
    try:
        return checkpoint.read_meta(newest).get("config", {}).get("run", {}).get("resume") == run.resume
    except checkpoint.DamagedError:
        return False


def _other(run: RunConfig, key: str, text: str) -> Path:
    """RUN or RUN@STEP -> a checkpoint of another run."""
    name, _, step = text.partition("@")
    if step and not step.isdigit():
        raise UserError(f"run.{key}={text!r}: {step!r} is not a step, use RUN or RUN@STEP")
    places = [Path(run.dir).expanduser() / name, Path(name).expanduser()]
    root = next((place / "checkpoints" for place in places if (place / "checkpoints").is_dir()), None)
    if root is None:
        raise UserError(f"run.{key}={text!r}: neither {places[0]} nor {places[1]} is the folder of a run")
    there = {checkpoint.step_of(path): path for path in checkpoint.committed(root)}
    if not there:
        raise UserError(f"run.{key}={text!r}: there is no committed checkpoint in {root}")
    if not step:
        return max(there.items())[1]  # pyright: ignore[reportArgumentType]
    if int(step) not in there:
        raise UserError(f"run.{key}={text!r}: {root} has steps {', '.join(map(str, sorted(there)))}")  # pyright: ignore
    return there[int(step)]


def start_from(cfg: Config, folder: Path) -> Start:
    """What ``folder`` is begun from with. Raises ``UserError`` where the config may not, ``DamagedError``."""
    own = folder.resolve().parent == checkpoints(cfg).resolve()
    meta, index = checkpoint.read_meta(folder), checkpoint.read_index(folder)
    _check_same_model(cfg, folder, index)
    if cfg.run.warm_start and not own:
        return Start(folder, own, weights_only=True)
    before, step = meta.get("config", {}), meta["step"]
    found = changes.changes(before, cfg)
    changes.check(found, allow=cfg.run.allow, where=str(folder))
    old = before.get("run", {}).get("reset", []) if own else []
    reset = tuple(name for name in cfg.run.reset if name not in old)
    if "optim" not in reset:
        check_saved(cfg.optim, index, folder)
    kept = [c for c in found if c.tag is changes.Tag.trajectory]
    history = [*meta.get("changes", []), *({"step": step, "key": c.key, "old": c.old, "new": c.new} for c in kept)]
    history += [{"step": step, "key": f"run.reset={name}", "old": None, "new": None} for name in reset]
    allowed = [*cfg.run.allow, *(c.key for c in kept)]
    other_data = any(key == k or key.startswith(k + ".") for key in allowed for k in _SAMPLES)
    return Start(folder, own, False, reset, tuple(history), other_data, tuple(map(str, found)))


def first(cfg: Config, life: Life | None, *, log: Callable[[str], None], upto: int | None = None) -> Start | None:
    """What to begin from now (see ``candidates``); None: nothing is there.

    By one process, which has taken over (``life``), or only asks. A damaged checkpoint is set aside for the next older
    one where that is what ``run.resume=auto`` means. Raises ``UserError`` where checkpoints are there, none whole.
    """
    passed = []
    for folder in candidates(cfg, upto=upto):
        try:
            return start_from(cfg, folder)
        except checkpoint.DamagedError as error:
            passed.append(pass_over(cfg, folder, error, life, log=log))
    if damaged := sorted({*passed, *checkpoints(cfg).glob("step-*.aside-*")}):
        raise UserError(
            f"no whole checkpoint is left in {checkpoints(cfg)}, damaged are {', '.join(x.name for x in damaged)}: "
            f"restore one of them, or remove them (or choose another run.name) to start anew"
        )
    return None


def pass_over(
    cfg: Config, folder: Path, error: checkpoint.DamagedError, life: Life | None, *, log: Callable[[str], None]
) -> Path:
    """Set a damaged checkpoint aside, and say where; raises ``error`` where another one is not what was asked for."""
    if cfg.run.resume != "auto" or folder.resolve().parent != checkpoints(cfg).resolve():
        raise error
    aside = checkpoint.set_aside(folder, life=life) if life else folder
    log(f"{error}; it is passed over{f' and lies in {aside} now' if life else ''}")
    return aside


def preflight(cfg: Config, *, world: int, log) -> None:
    """Everything that can be refused before a rank starts. Writes nothing but the run folder and the data cache."""
    check(cfg, world=world)
    check_sinks(cfg.logging)
    start = first(cfg, None, log=log)
    data = open_data(cfg, log=log)
    if start is not None:
        check_same_data(checkpoint.read_meta(start.folder), data, start)
    folder = cfg.run.folder
    if cfg.run.cache:
        try:
            cfg.run.caches.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"run.cache={cfg.run.cache} cannot be made ({e.strerror}): set it to a folder you can write"
            ) from e
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
        (folder / "stop").unlink(missing_ok=True)  # which was for the life before
    except OSError as e:
        raise UserError(
            f"run folder {folder} cannot be written ({e.strerror}): set run.dir or run.name to a folder you can write"
        ) from e


def to_json(start: Start | None) -> dict[str, Any] | None:
    return None if start is None else asdict(start) | {"folder": str(start.folder)}


def from_json(data: dict[str, Any] | None) -> Start | None:
    if data is None:
        return None
    more: dict[str, Any] = {name: tuple(data[name]) for name in ("reset", "changes", "lines")}
    more["folder"] = Path(data["folder"])
    return Start(**{**data, **more})


def check_same_data(meta: dict[str, Any], data: Data, start: Start) -> None:
    """A run's samples are fixed by its data's fingerprint; raises ``UserError`` where another one would go on."""
    if not start.other_data and not start.weights_only and meta.get("data") != data.loader.fingerprint:
        was, now = str(meta.get("data"))[:12], data.loader.fingerprint[:12]
        raise UserError(
            f"{start.folder} was trained on other data, mix, seq_len or seed (fingerprint {was}, now {now}): restore "
            f"them to continue it, say that it is meant by 'run.allow=[data]', or start anew with another run.name"
        )


def _check_same_model(cfg: Config, folder: Path, index: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    with torch.device("meta"):
        model = Transformer(cfg.model)
        wanted = state.parameters(model, whole(model))
    saved = {n.removeprefix("model."): shape for n, (shape, _) in index.items()}
    for name, logical in wanted.items():
        missing = name not in saved and any(covers(allowed, f"model.{name}") for allowed in cfg.run.allow_missing)
        if not missing and tuple(saved.get(name, ())) != logical.shape:
            have = f"is {tuple(saved[name])}" if name in saved else "is not"
            raise UserError(
                f"{folder} is a checkpoint of another model: {name} {have} in it, this config makes it "
                f"{logical.shape}: choose another run.name or the config it was made with"
            )
