"""The whole config system: ``@config`` makes a sealed, keyword-only dataclass; ``dump`` and ``load`` are its YAML.

A config node *is* the component: loading returns live objects, so there is no ``build()`` and no ``_target_``. Nodes
are sealed after ``__init__`` rather than ``dataclass(frozen=True)``, because OmegaConf makes frozen nodes read-only and
that would forbid command-line overrides. Hydra is not imported here: ``cli/compose.py`` reads ``OPTIONS``.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints, overload

import yaml

C = TypeVar("C", bound=type)

OPTIONS: dict[str, dict[str, type]] = {}
"""Group -> name -> class, filled by importing the modules that define components."""


class UserError(ValueError):
    """Something the user can mend: one line that names the value, the rule and the fix. Exit code 2, no traceback."""


@overload
def config(cls: C) -> C: ...


@overload
def config(*, group: str, name: str) -> Callable[[C], C]: ...


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: Any = None, *, group: str | None = None, name: str | None = None) -> Any:
    """``@config`` makes a node; ``@config(group=..., name=...)`` also offers it as an option of a group."""

    def wrap(cls: Any) -> Any:
        cls = dataclasses.dataclass(kw_only=True)(cls)
        cls.__init__ = _seal_after(cls, cls.__init__)
        cls.__setattr__ = _setattr_until_sealed
        if group is not None and name is not None:
            OPTIONS.setdefault(group, {})[name] = cls
            cls.kind = name
        return cls

    return wrap if cls is None else wrap(cls)


def option(cls: type) -> str | None:
    """The name of an option's class in its group; None for any other node, be it one with a key ``kind``."""
    own = any(f.name == "kind" for f in dataclasses.fields(cls))
    return None if own else vars(cls).get("kind")


def default(f: dataclasses.Field) -> Any:
    """Of a node's field."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def dump(node: Any) -> Any:
    """Node -> plain YAML data. Options carry their name under ``kind``, so the file stands on its own."""
    if dataclasses.is_dataclass(node):
        kind = {"kind": type(node).kind} if "kind" in vars(type(node)) else {}  # pyright: ignore
        return kind | {f.name: dump(getattr(node, f.name)) for f in dataclasses.fields(node)}
    if isinstance(node, dict):
        return {k: dump(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [dump(v) for v in node]
    return node.value if isinstance(node, Enum) else node


def load(data: Any, hint: Any, where: str = "") -> Any:
    """Inverse of ``dump``: plain data -> node of type ``hint``; an unknown key or kind, a wrong type: ``UserError``."""
    if get_origin(hint) in (Union, types.UnionType):
        return _load_union(data, get_args(hint), where)
    if dataclasses.is_dataclass(hint):
        return _load_node(data, hint, where)
    if get_origin(hint) is dict:
        _expect(isinstance(data, dict), where, data, "a mapping")
        return {k: load(v, get_args(hint)[1], f"{where}.{k}") for k, v in data.items()}
    if get_origin(hint) is list:
        _expect(isinstance(data, list | tuple), where, data, "a list")
        return [load(v, get_args(hint)[0], f"{where}[{i}]") for i, v in enumerate(data)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        names = [e.value for e in hint]
        _expect(data in names, where, data, f"one of {', '.join(names)}")
        return hint(data)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if hint is Any:
        return data
    _expect(isinstance(data, hint) and not (hint is int and isinstance(data, bool)), where, data, f"a {hint.__name__}")
    return data


def read(path: Path, root: type) -> Any:
    """The config that ``write`` left at ``path``; raises ``UserError`` if it is not there or not a config."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        why = e.strerror if isinstance(e, OSError) else " ".join(str(e).split())
        raise UserError(f"cannot read the config {path} ({why}): give a config.yaml of a run folder") from e
    return load(data, root)


def write(node: Any, path: Path) -> None:
    path.write_text(yaml.safe_dump(dump(node), sort_keys=False, width=120))


def replace(node: Any, **changes: Any) -> Any:
    """A copy of ``node`` with some fields changed."""
    return type(node)(**{f.name: getattr(node, f.name) for f in dataclasses.fields(node)} | changes)


def keys(node: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a node, for naming the nearest valid one."""
    found = []
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        found.append(prefix + f.name)
        for name, child in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(child):
                found += keys(child, f"{prefix}{f.name}." + (f"{name}." if name else ""))
    return found


def nearest(word: str, valid: Iterable[str]) -> str:
    """ "; did you mean 'x'?" or nothing: closest whole key first, then the closest last part of one."""
    valid = list(valid)
    close = [v for v in valid if len(word) > 2 and v.startswith(word)][:1]
    close = close or difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    if not close:
        leaves = {v.rpartition(".")[2]: v for v in reversed(valid)}
        close = [leaves[m] for m in difflib.get_close_matches(word.rpartition(".")[2], leaves, n=1, cutoff=0.6)]
    return f"; did you mean '{close[0]}'?" if close else ""


def _load_node(data: Any, hint: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, data, "a mapping")
    data = dict(data)
    own = any(f.name == "kind" for f in dataclasses.fields(hint))  # a key like any other, not the name of an option
    if not own and (kind := data.pop("kind", None)) is not None:
        kinds = {n: c for names in OPTIONS.values() for n, c in names.items() if issubclass(c, hint)}
        if kind not in kinds:
            raise UserError(f"{where}.kind={kind!r} is not one of {', '.join(sorted(kinds))}{nearest(kind, kinds)}")
        hint = kinds[kind]
    hints = {f.name: get_type_hints(hint)[f.name] for f in dataclasses.fields(hint)}
    for unknown in data.keys() - hints.keys():
        key = f"{where}.{unknown}".lstrip(".")
        raise UserError(f"unknown key '{key}'{nearest(unknown, hints)} (valid here: {', '.join(hints)})")
    return hint(**{k: load(v, hints[k], f"{where}.{k}".lstrip(".")) for k, v in data.items()})


def _load_union(data: Any, hints: tuple[Any, ...], where: str) -> Any:
    if data is None and type(None) in hints:
        return None
    hints = tuple(h for h in hints if h is not type(None))
    exact = [h for h in hints if h is type(data)]
    return load(data, exact[0] if exact else hints[0], where)


def _expect(ok: bool, where: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UserError(f"{where or 'config'}={value!r} is not {wanted}")


def _seal_after(cls, init):
    def __init__(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        if type(self) is cls:  # a subclass seals itself when its own __init__ is done
            self.__dict__["_sealed"] = True

    return __init__


def _setattr_until_sealed(self, name: str, value: object) -> None:
    if "_sealed" in self.__dict__:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name} is read-only; compose a new config")
    object.__setattr__(self, name, value)
