"""What the MoE layer is compared with: the experts of other libraries behind one signature. Read this file first.

Shape letters: T tokens, D width, F expert width, E experts, K experts a token, N = T * K.

Each peer is one file here with a ``PEER``. It only calls its library, which is imported at its top: where that fails,
the peer is not compared. ``PEERS=folder`` puts the checkouts in a folder on the path, for libraries that are in no
package index: ``git clone https://github.com/shawntan/scattermoe`` and ``.../Dao-AILab/sonic-moe`` in it.
"""

import importlib
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

FILES = {
    "F.grouped_mm": "grouped_mm", "transformers": "transformers_moe", "torchtitan": "torchtitan_moe",
    "ScatterMoE": "scattermoe_mlp", "Megatron-Core": "megatron_local", "SonicMoE": "sonicmoe_layer",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The experts of one layer, from which every peer makes its own."""

    gate_up_E2FD: Tensor
    down_EDF: Tensor
    top_k: int


class Experts(nn.Module, ABC):
    """The experts of one layer with the weights it was given, in the peer's own layout."""

    @abstractmethod
    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, D), (T, K) int64, (T, K) float32 -> (T, D): each token's weighted sum over its experts."""

    @abstractmethod
    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(E, 2, F, D), (E, D, F) of what is given by the names of its parameters: their gradients, say."""


@dataclass(frozen=True)
class Peer:
    """``variants``: name -> what makes its experts; ``layers``: the same of whole layers, gate and top-k included."""

    name: str
    package: str
    variants: dict[str, Callable[[Weights], Experts]]
    layers: dict[str, Callable[[Weights, Tensor], nn.Module]]  # (weights, gate (E, D)) -> module: (T, D) -> (T, D)

    @property
    def version(self) -> str:
        """Of the package, or the commit of its checkout."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            at = importlib.import_module(self.package).__file__
        assert at is not None
        checkout = Path(at).parent.parent
        if not (checkout / ".git").exists():
            return "unknown"
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
        return f"commit {asked.stdout.strip()}" if asked.returncode == 0 else "unknown"


def load() -> tuple[list[Peer], dict[str, str]]:
    """The peers that are here, and why the others are not: name -> words."""
    if folder := os.environ.get("PEERS"):
        sys.path += [str(path) for path in sorted(Path(folder).resolve().iterdir()) if path.is_dir()]
    found, missing = [], {}
    for name, file in FILES.items():
        try:
            found.append(importlib.import_module(f"peers.{file}").PEER)
        except Exception as error:  # a library that is here may fail at its own import, in whatever way
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def split(gate_up_E2FD: Tensor) -> tuple[Tensor, Tensor]:
    """The two projections, contiguous."""
    return gate_up_E2FD[:, 0].contiguous(), gate_up_E2FD[:, 1].contiguous()


def parameter(x: Tensor) -> nn.Parameter:
    """A copy that is trained."""
    return nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format))
