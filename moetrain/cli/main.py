"""The command line: ``moetrain train ...``, ``moetrain data ...``. What a user can mend is one line and exit code 2."""

import importlib
import sys

from moetrain import __version__, caches
from moetrain.config import UserError, nearest

COMMANDS = {
    "train": "train a model, or resume it",
    "launch": "submit a training run to a Slurm cluster",
    "data": "tokenize text, inspect a corpus",
    "verify": "prove that a layout is the same run as one rank",
    "memory": "foretell the bytes of a rank, for any layout, without a GPU",
    "fssdp-sim": "price placement policies on a cluster that is not here",
    "layout": "print who sits where in a layout, list the legal ones",
    "doctor": "say whether this machine and these ranks are fit to train",
    "inspect": "list what a checkpoint holds, and check that it is whole",
    "replay": "run a bad step again, and say where it first goes wrong",
    "report": "make a page of a run's loss, balance and drops",
    "status": "say how far runs are, and what they took",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 something in the input to mend, those of a run in
    docs/exit-codes.md."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"moetrain {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: moetrain COMMAND ...\n")
        print("\n".join(f"  {name:9} {words}" for name, words in COMMANDS.items()))
        print("\nmoetrain COMMAND --help says more.")
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise UserError(
                f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)} (there are: {', '.join(COMMANDS)})"
            )
        with caches.unused():
            command = importlib.import_module(f"moetrain.cli.{argv[0].replace('-', '_')}")
        return command.main(argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
