"""Signals that ask a run to save and leave. Without torch, whose import takes seconds in which one may come."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ASKED = 4
"""Exit code of a run that was asked to leave before it was done."""
caught: list[str] = []
"""Their names, as they came."""

_told: list[Callable[[], None]] = []
_before: dict[signal.Signals, Any] = {}
_held = False


def catch(tell: Callable[[], None] | None = None, *, hold: bool = True) -> None:
    """From now on they are noted, not obeyed, and ``tell`` is called at each. Where threads are, by the main one.

    Without ``hold``, where there is nothing yet to be saved, the process leaves at once, with ``code(ASKED)``.
    """
    global _held
    _held = hold
    if tell is not None:
        _told.append(tell)
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            before = signal.signal(number, _note)
            if before is not _note:
                _before[number] = before


def release() -> None:
    """As it was before ``catch``; what was noted is forgotten."""
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()
    _told.clear()
    caught.clear()


def code(code: int) -> int:
    """That exit code, of a rank that is not to be started again: under a torchrun that would do so, 0."""
    restarts = "MOETRAIN_PARENT" not in os.environ and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return 0 if restarts else code


def _note(number: int, frame: FrameType | None) -> None:
    caught.append(signal.Signals(number).name)
    if not _held:
        os._exit(code(ASKED))
    for tell in _told:
        tell()
