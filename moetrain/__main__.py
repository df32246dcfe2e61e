"""``python -m moetrain`` is ``moetrain``; under torchrun and srun it is how a rank starts."""

import os
import sys

from moetrain import signals


def main() -> int:
    if sys.argv[1:2] == ["train"] or "RANK" in os.environ:
        signals.catch(hold=False)
    from moetrain.cli.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
