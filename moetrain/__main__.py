"""``python -m moetrain`` is ``moetrain``; under torchrun it is how a rank starts."""

from moetrain.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
