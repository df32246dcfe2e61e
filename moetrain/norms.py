"""How large the parameters are and how many gradients are exactly zero: this rank's part of two sums over all ranks."""

import torch
from torch import Tensor

from moetrain.model.transformer import Transformer
from moetrain.optim import OptimConfig
from moetrain.parallel import state
from moetrain.parallel.plan import Plan


@torch.no_grad()
def part(model: Transformer, plan: Plan, grads: dict[str, Tensor], *, optim: OptimConfig) -> Tensor:
    """(2,) float64: the sum of squares of the parameters, all of them, and the number of zeros among the gradients that
    the gradient norm counts. Each element is on exactly one rank; a layout's padding is none.
    """
    own = {n: state.local(p) for n, p in model.named_parameters() if plan[n].counted}
    own = {n: p for n, p in own.items() if p.numel()}
    first = next(iter(grads.values()))
    squares = zeros = torch.zeros((), dtype=torch.float64, device=first.device)
    if own:
        wide = torch.promote_types(first.dtype, torch.float32)
        norms = torch._foreach_norm(list(own.values()), dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
        squares = torch.stack([n.double() for n in norms]).square().sum()
    for name in own:
        if not optim.frozen(name):
            g = state.unpadded(model, plan, name, grads[name])
            zeros = zeros + (g.numel() - torch.count_nonzero(g))
    return torch.stack([squares, zeros])
