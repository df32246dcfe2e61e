"""``cluster=NAME``: a file of configs/cluster/, and single keys of it."""

from pathlib import Path
from typing import Any

import yaml

from moetrain import config as configs
from moetrain.cli.compose import folder
from moetrain.config import UserError, nearest


def read_cluster(name: str, own: dict[str, Any], cls: type, *, slurm: bool) -> Any:
    """configs/cluster/NAME.yaml or a YAML file, with ``own`` keys, as ``cls``. Those of Slurm are called slurm_*."""
    here = folder() / "cluster"
    path = here / f"{name}.yaml"
    known = sorted(p.stem for p in here.glob("*.yaml") if p.stem.startswith("slurm_") == slurm)
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name not in known:
        raise UserError(
            f"cluster={name}: no such cluster{nearest(name, known)} (there are: {', '.join(known)}; or a YAML file)"
        )
    example = f"take configs/cluster/{known[0]}.yaml as an example"
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        why = e.strerror if isinstance(e, OSError) else "not YAML"
        raise UserError(f"cluster={name} cannot be read ({why}): {example}") from e
    if not isinstance(data, dict):
        raise UserError(f"cluster={name} is no mapping of keys: {example}")
    return configs.load(data | own, cls, "cluster")
