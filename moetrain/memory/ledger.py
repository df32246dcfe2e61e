"""Bytes of a rank, by what they are: every storage from when an operation makes it to when it is dropped.

It watches real and fake tensors alike (``dry.py``). What an operation allocates for itself and frees before it returns
is not seen, nor what a backend of torch.distributed copies, nor what an allocator rounds up.
"""

import contextlib
import gc
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moetrain.moe  # noqa: F401 (registers the dispatchers)
from moetrain import comm, deferred, rerun
from moetrain.config import OPTIONS
from moetrain.moe.travel import Replicas
from moetrain.parallel import data, pipeline


class Kind(Enum):
    parameters = "parameters"  # this rank's shards, and buffers
    gradients = "gradients"  # sharded, and unsharded ones that wait for their reduction
    optimizer = "optimizer"
    # made or received outside a backward and still there when the next begins; made again in one, for later in it;
    # left by one: factors of weight gradients that wait, what goes to the stage before
    activations = "activations"
    dispatch = "dispatch"  # made by a dispatcher, or by the backward of what it did
    fsdp = "FSDP"  # gathered weights, experts that travel among them, and what goes into a collective or comes out
    other = "other"  # temporaries


@dataclass(frozen=True)
class Usage:
    """Bytes at one moment; ``by_kind`` adds up to ``total``."""

    total: int
    by_kind: dict[Kind, int]
    when: str = ""


Change = tuple[int, int]
"""A storage's number, bytes more or less."""


class Ledger(TorchDispatchMode):
    """Inside it, every storage is written down that an operation makes or hands on; ``hold`` adds those made before."""

    def __init__(self) -> None:
        super().__init__()
        self._serials: dict[int, int] = {}  # storage -> its number, of those alive
        self._sizes: list[int] = []  # by number
        self._kinds: list[Kind] = []
        self._changes: list[Change] = []  # in order of time
        self._moments: list[tuple[int, str]] = [(0, "forward")]  # from which change on
        self._labels: list[Kind] = []  # innermost last
        self._young: list[int] = []  # made outside a backward since the last one
        self._born: list[int] = []  # made in this backward
        self._again = False  # whether backward runs a part of a forward
        self._dispatched: list[tuple[int, int]] = []  # half-open runs of autograd's sequence numbers
        self._params: list[Tensor] = []
        self._backwards = self._depth = self._blind = 0
        self._action = ""  # of a pipeline
        self._stack = contextlib.ExitStack()

    def hold(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """These are of a kind, whoever made them. The gradients of parameters are found at them after each backward."""
        for x in tensors:
            if kind is Kind.parameters:
                self._params.append(x)
            storage = _local(x).untyped_storage()
            if storage._cdata not in self._serials:
                self._add(storage, kind)
            self._kinds[self._serials[storage._cdata]] = kind

    def peak(self) -> Usage:
        """The moment with the most bytes, the first of several."""
        now = most = at = 0
        for i, (_, more) in enumerate(self._changes):
            now += more
            if now > most:
                most, at = now, i + 1
        return self._usage(at)

    def now(self) -> Usage:
        return self._usage(len(self._changes))

    def number(self, x: Tensor) -> int:
        """Of the storage of a tensor that was made in here."""
        return self._serials[_local(x).untyped_storage()._cdata]

    @property
    def time(self) -> int:
        return len(self._changes)

    def changes(self, since: int) -> list[Change]:
        return self._changes[since:]

    def size(self, number: int) -> int:
        return self._sizes[number]

    def repeat(self, number: int, more: int) -> None:
        """A change once more, as of another storage of the same kind."""
        self._changes.append((number, more))

    def forget(self, since: int) -> None:
        del self._changes[since:]

    def kind(self, number: int) -> Kind:
        return self._kinds[number]

    def label(self, x: Tensor, kind: Kind) -> None:
        self._kinds[self.number(x)] = kind

    def _usage(self, at: int) -> Usage:
        by_kind = dict.fromkeys(Kind, 0)
        for serial, more in self._changes[:at]:
            by_kind[self._kinds[serial]] += more
        moment = self._moments[bisect_right(self._moments, at - 1, key=lambda m: m[0]) - 1]
        update = moment is self._moments[-1] and self._backwards
        return Usage(sum(by_kind.values()), by_kind, "update" if update else moment[1])

    def __enter__(self):
        swap = lambda owner, name, new: self._stack.enter_context(swapped(owner, name, new))  # noqa: E731
        swap(torch.UntypedStorage, "resize_", self._resizing)
        swap(torch.autograd, "backward", self._in_backward)
        swap(deferred, "run", self._in_backward)
        swap(
            rerun,
            "checkpoint",
            lambda checkpoint: lambda fn, *args, **kw: checkpoint(self._made_again(fn), *args, **kw),
        )
        swap(rerun._Made, "unpack", self._made_again)
        swap(pipeline.Run, "do", self._doing)
        swap(data, "_add_up", self._adding)
        swap(comm, "reduce_scatter_into", self._unseen)  # gloo copies its input, NCCL does not
        for name in ("unshard", "wait_for_unshard"):
            swap(FSDPParamGroup, name, self._labelled(Kind.fsdp))
        swap(FSDPParamGroup, "post_backward", self._reducing)
        for name in ("start", "reduce", "finish", "add_up"):
            swap(Replicas, name, self._labelled(Kind.fsdp))
        swap(Replicas, "end_backward", self._leaving)
        for dispatcher in OPTIONS["dispatcher"].values():
            for name in ("dispatch", "combine"):
                swap(dispatcher, name, self._labelled(Kind.dispatch))
        return super().__enter__()

    def __exit__(self, *args) -> None:
        super().__exit__(*args)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._blind and out is not None:
            for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.device.type != "meta"):
                    storage = _local(x).untyped_storage()
                    if storage._cdata not in self._serials:
                        self._add(storage, self._kind())
        return out

    def _kind(self) -> Kind:
        if self._labels:
            return self._labels[-1]
        node = torch._C._current_autograd_node()
        if node is None or self._again:
            return Kind.other
        number = node._sequence_nr()
        run = bisect_right(self._dispatched, (number, torch.inf)) - 1
        return Kind.dispatch if run >= 0 and number < self._dispatched[run][1] else Kind.other

    def _add(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        serial, key = len(self._sizes), storage._cdata
        self._serials[key] = serial
        self._sizes.append(0)
        self._kinds.append(kind)
        if kind is Kind.other:
            (self._born if self._depth else self._young).append(serial)
        weakref.finalize(storage, self._drop, key)
        self._set(serial, storage.nbytes())

    def _set(self, serial: int, size: int) -> None:
        if size != self._sizes[serial]:
            self._changes.append((serial, size - self._sizes[serial]))
            self._sizes[serial] = size

    def _drop(self, key: int) -> None:
        self._set(self._serials.pop(key), 0)

    def _resizing(self, resize: Callable) -> Callable:
        def watched(storage: torch.UntypedStorage, size: int):
            resized = resize(storage, size)  # how FSDP2 frees gathered weights
            if storage._cdata in self._serials:
                self._set(self._serials[storage._cdata], size)
            else:
                self._add(storage, Kind.fsdp)
            return resized

        return watched

    def _in_backward(self, backward: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any):
            if self._depth:  # a product's, which was not put off
                return backward(*args, **kwargs)
            self.begin_backward()
            self._backwards += 1
            self._moments.append((len(self._changes), self._action or f"backward {self._backwards}"))
            self._depth = 1
            backward(*args, **kwargs)
            self._depth = 0
            self._moments.append((len(self._changes), self._action or f"forward {self._backwards + 1}"))
            self._mark(p.grad for p in self._params)
            self._keep(self._born)

        return watched

    def begin_backward(self) -> None:
        """What forwards made and is still there is an activation."""
        self._keep(self._young)

    def _keep(self, made: list[int], start: int = 0) -> None:
        """Of what was made, what is still there and nothing else is an activation."""
        for serial in made[start:]:
            if self._kinds[serial] is Kind.other and self._sizes[serial]:
                self._kinds[serial] = Kind.activations
        del made[start:]

    def _made_again(self, fn: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any):
            if not self._depth or self._again:
                return fn(*args, **kwargs)
            first, self._again = len(self._born), True
            try:
                return fn(*args, **kwargs)
            finally:
                self._again = False
                self._keep(self._born, first)

        return watched

    def _doing(self, do: Callable) -> Callable:
        def watched(run: Any, action: pipeline.Action):
            several = f" of stage {action.stage}" if len(run.left) > 1 else ""
            self._action = f"{action.kind.name.replace('_', ' ')} {action.micro_batch + 1}{several}"
            self._moments.append((len(self._changes), self._action))
            do(run, action)
            self._action = ""
            self._moments.append((len(self._changes), "end"))

        return watched

    def _adding(self, add_up: Callable) -> Callable:
        def watched(unit: Any) -> None:
            self._mark_unsharded(unit)
            add_up(unit)
            self._mark_unsharded(unit)

        return watched

    def _mark_unsharded(self, unit: Any) -> None:
        for group in data.param_groups(unit):
            params = [p for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            self._mark(g for p in params for g in (p._unsharded_param.grad, p.unsharded_accumulated_grad))

    def _reducing(self, post_backward: Callable) -> Callable:
        def watched(group: Any, *args: Any):
            params = [p for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            self._mark(p.unsharded_param.grad for p in params)
            with self._label(Kind.fsdp):
                post_backward(group, *args)
            self._mark(p.unsharded_accumulated_grad for p in params)
            self._mark(p.sharded_param.grad for p in params)

        return watched

    def _leaving(self, end_backward: Callable) -> Callable:
        def watched(replicas: Replicas) -> None:
            self._mark(leaf.grad for leaf in replicas.leaves)
            end_backward(replicas)
            self._mark(replicas.sums or ())

        return watched

    def _mark(self, grads: Iterable[Tensor | None]) -> None:
        for g in grads:
            if g is not None and (serial := self._serials.get(_local(g).untyped_storage()._cdata)) is not None:
                self._kinds[serial] = Kind.gradients

    def _labelled(self, kind: Kind) -> Callable[[Callable], Callable]:
        def wrap(method: Callable) -> Callable:
            def watched(*args: Any, **kwargs: Any):
                first = _sequence_number()
                with self._label(kind):
                    out = method(*args, **kwargs)
                if kind is Kind.dispatch:
                    self._dispatched.append((first, _sequence_number()))
                return out

            return watched

        return wrap

    @contextlib.contextmanager
    def _label(self, kind: Kind) -> Iterator[None]:
        self._labels.append(kind)
        try:
            yield
        finally:
            self._labels.pop()

    def _unseen(self, method: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any):
            self._blind += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._blind -= 1

        return watched


@contextlib.contextmanager
def swapped(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """``owner.name`` is ``wrap`` of what it was while the context is open."""
    own = name in vars(owner)
    before = vars(owner)[name] if own else getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:  # inherited
            delattr(owner, name)


def alive() -> int:
    """Bytes of every storage that a tensor of this process has, each counted once; those that torch.compile traced with
    have none."""
    gc.collect()
    sizes = {}
    for x in gc.get_objects():
        kind = type(x)  # isinstance would wake lazy objects
        if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor) and x.device.type != "meta":
            storage = _local(x).untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _local(x: Tensor) -> Tensor:
    """A DTensor's own storage claims the global size."""
    return x._local_tensor if isinstance(x, DTensor) else x


def _sequence_number() -> int:
    """Of the next node of autograd's graph on this thread."""
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
