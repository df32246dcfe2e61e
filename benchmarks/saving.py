"""Where a benchmark's figures go."""

import json
import os
from pathlib import Path
from typing import Any


def save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {os.path.relpath(path)}")
