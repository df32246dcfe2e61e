"""Weight gradients that wait: what zero-bubble schedules do between two micro-batches (arXiv 2401.10241).

A product with a weight has two gradients. That of its input is needed at once by the stage before; that of the weight
by nobody before the step's end. Under ``splittable`` products are recorded so that a backward inside ``into(queue)``
computes the first and leaves the second in the queue, for ``run`` to do later. Every node of the graph runs once, so
no collective is repeated, nothing is counted twice, and only a product's two factors are kept, not the graph.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Queue = list[tuple[Tensor, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]]
"""What a weight was used as (a view or cast of it), how to make the gradient of that, and from which two factors."""

_recording = False
_queue: Queue | None = None


@contextlib.contextmanager
def splittable(on: bool = True) -> Iterator[None]:
    """Products of forwards inside can have their weight gradients put off."""
    global _recording
    before, _recording = _recording, on
    try:
        yield
    finally:
        _recording = before


@contextlib.contextmanager
def into(queue: Queue | None) -> Iterator[None]:
    """Backwards inside leave weight gradients of recorded products in ``queue``; None computes them at once."""
    global _queue
    before, _queue = _queue, queue
    try:
        yield
    finally:
        _queue = before


def run(queue: Queue) -> None:
    """Add what was put off to the weights' gradients."""
    for used, d_w, g, x in queue:
        torch.autograd.backward(used, d_w(g, x))
    queue.clear()


def recording() -> bool:
    """Whether weight gradients of now may be put off: those of ``product``, ``linear`` and who calls ``leave``."""
    return _recording and torch.is_grad_enabled()


def leave(used: Tensor, d_w: Callable[[Tensor, Tensor], Tensor], g: Tensor, x: Tensor) -> None:
    """In a backward of what autograd has not seen use ``used``: its gradient is d_w(g, x), in the queue or at once."""
    queue: Queue = [] if _queue is None else _queue
    queue.append((used, d_w, g, x.detach()))  # without the graph that made it
    if _queue is None:
        run(queue)


def product(
    x: Tensor,
    w: Tensor,
    *,
    y: Callable[[Tensor, Tensor], Tensor],
    d_x: Callable[[Tensor, Tensor], Tensor],
    d_w: Callable[[Tensor, Tensor], Tensor],
    own: bool = False,
) -> Tensor:
    """``y(x, w)``, whose gradients are ``d_x(g, w)`` and ``d_w(g, x)``. ``w`` may be a view or cast of a parameter.

    ``own``: autograd would not find these gradients by itself.
    """
    if not (recording() and x.requires_grad and w.requires_grad):
        return _Seen.apply(x, w, y, d_x, d_w) if own else y(x, w)  # pyright: ignore[reportReturnType]
    return _Product.apply(x, (w,), y, d_x, d_w)  # pyright: ignore[reportReturnType]


def linear(x: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(..., I), (O, I), (O,) -> (..., O)."""
    if not _recording:
        return F.linear(x, w_OI, bias_O)
    y = product(x, w_OI, y=F.linear, d_x=torch.matmul, d_w=_outer)
    return y if bias_O is None else y + bias_O


def _outer(g: Tensor, x: Tensor) -> Tensor:
    return g.flatten(0, -2).t() @ x.flatten(0, -2)


class _Product(torch.autograd.Function):
    """The weight comes in a tuple, which autograd does not look into: its gradient goes its own way."""

    @staticmethod
    def forward(ctx, x: Tensor, used: tuple[Tensor], y, d_x, d_w) -> Tensor:
        ctx.save_for_backward(x, used[0].detach())
        ctx.used, ctx.d_x, ctx.d_w = used, d_x, d_w
        return y(x, used[0].detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        d_x = ctx.d_x(g, w)
        leave(ctx.used[0], ctx.d_w, g, x)
        return d_x, None, None, None, None


class _Seen(torch.autograd.Function):
    """A product whose weight autograd sees."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, y, d_x, d_w) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.d_x, ctx.d_w = d_x, d_w
        return y(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return ctx.d_x(g, w) if needs[0] else None, ctx.d_w(g, x) if needs[1] else None, None, None, None
