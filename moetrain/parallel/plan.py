"""How one rank holds each parameter: one answer each to where it lies and over which ranks its gradient is summed.

A parameter that nobody has declared fails when the model is built (law 11).
"""

from dataclasses import dataclass

from torch import nn
from torch.distributed import ProcessGroup

from moetrain import comm


@dataclass(frozen=True)
class Held:
    """Before FSDP cuts it: ``shape`` is that of the whole parameter, ``start`` where this rank's begins on ``dim``.

    ``group`` is the ranks that hold the same elements and see different tokens: their gradients are summed after the
    last backward. ``fsdp`` names the axes that FSDP2 sums over.
    """

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    ids: tuple[int, ...] | None = None  # of experts: who each row of dim 0 is
    group: ProcessGroup | None = None
    over: str = ""  # the axes of ``group``, in words
    fsdp: str = ""
    replica: int = 0  # which of the copies that FSDP2 keeps (HSDP)

    @property
    def summed_over(self) -> str:
        """The axes that the gradient is summed over, in words."""
        return ", ".join(x for x in (self.fsdp, self.over) if x) or "nobody (each element's tokens all come here)"

    @property
    def counted(self) -> bool:
        """Whether the gradient norm counts this rank's copy: each element is counted on exactly one rank."""
        return self.replica == 0 and comm.rank(self.group) == 0


Plan = dict[str, Held]


def whole(model: nn.Module) -> Plan:
    """The plan of a rank that is alone."""
    return {name: Held(tuple(p.shape)) for name, p in model.named_parameters()}


def check_complete(model: nn.Module, plan: Plan) -> None:
    """Raises ``RuntimeError`` where a parameter has no declaration, or a declaration no parameter."""
    names = {name for name, _ in model.named_parameters()}
    if undeclared := sorted(names - plan.keys()):
        raise RuntimeError(
            f"{', '.join(undeclared)}: nobody declared which ranks hold it and over which its gradient is summed; "
            f"add a rule to moetrain/parallel/tensor.py"
        )
    if unknown := sorted(plan.keys() - names):
        raise RuntimeError(f"{', '.join(unknown)}: declared, but not in the model")
