"""One shape of ``moe_layer.py``: who is timed, ours among them, what they are held against, and how each try went."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import peers
import torch
from gpu_results import KINDS
from gpu_timing import Clock, Timer, free, limited, one_line
from peers import Experts, Weights
from routings import Batch, draw, errors, truth
from torch import Tensor, nn

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import kernels
from moetrain.kernels import Kernel
from moetrain.moe.dispatchers.dropless import Dropless
from moetrain.moe.layer import MoE, MoEConfig
from moetrain.moe.routers.topk import TopK
from moetrain.moe.types import Context, Routing, Rows, Slots, Tokens

INPUTS = 3
WORST = 3e-2  # of a bf16 result's relative error: beyond it, it is another function
NEAR = 2.0  # variants so much slower than a peer's best are not compiled


class Own(Experts):
    """Ours with one backend: dispatch on one rank, experts, combine."""

    def __init__(self, weights: Weights, *, kernel: Kernel, compiled: bool = False) -> None:
        super().__init__()
        E, _, F, D = weights.gate_up_E2FD.shape
        self.backend, self.why = kernels.choose(
            kernel, device=weights.down_EDF.device, dtype=weights.down_EDF.dtype, dim=D, hidden=F
        )
        if compiled:
            self.backend = kernels.compiled(self.backend)
        self.gate_up, self.down = peers.parameter(weights.gate_up_E2FD), peers.parameter(weights.down_EDF)
        self.slots = Slots(torch.arange(E, device=weights.down_EDF.device)[:, None], E)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        T, E = x_TD.shape[0], self.down.shape[0]
        scores_TE = weights_TK.new_empty(()).expand(T, E)  # whose shape is looked at
        tokens = Tokens(1, torch.arange(T, device=x_TD.device))
        routing, dispatcher = Routing(scores_TE, scores_TE, ids_TK, weights_TK), Dropless()
        rows, ticket = dispatcher.dispatch(x_TD, routing, tokens=tokens, slots=self.slots)
        assert isinstance(rows, Rows)
        return dispatcher.combine(self.backend(rows, self.gate_up, self.down), ticket)

    def ours(self, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return of["gate_up"], of["down"]


class OwnLayer(nn.Module):
    """(T, D) -> (T, D), gate and top-k included."""

    def __init__(self, weights: Weights, gate_ED: Tensor) -> None:
        super().__init__()
        E, _, F, D = weights.gate_up_E2FD.shape
        K, device = weights.top_k, gate_ED.device
        with torch.device(device):
            self.moe = MoE(MoEConfig(num_experts=E, hidden=F, router=TopK(top_k=K, renormalize=K > 1)), dim=D, layer=0)
        self.moe.gate.weight = peers.parameter(gate_ED)
        self.moe.experts.gate_up = peers.parameter(weights.gate_up_E2FD)
        self.moe.experts.down = peers.parameter(weights.down_EDF)
        self.zero_B = torch.zeros(1, dtype=torch.int64)

    def forward(self, x_TD: Tensor) -> Tensor:
        position_S = torch.arange(x_TD.shape[0], device=x_TD.device)
        ctx = Context(step=0, micro_batch=0, sample_B=self.zero_B, position_S=position_S, routed_tokens=1.0)
        return self.moe(x_TD[None], {}, ctx)[0][0]


@dataclass
class Tried:
    """One variant of somebody, and how it went."""

    who: str
    variant: str
    compiled: bool
    first: float = 0.0  # seconds of the first forward and backward: kernels compiled, tuned
    seconds: float = float("inf")
    words: str = ""  # why not, where it is not compared
    errors: dict[str, float] = field(default_factory=dict)
    run: "Run | None" = None

    @property
    def name(self) -> str:
        return f"{self.variant}{', compiled' if self.compiled else ''}"

    def said(self) -> dict[str, Any]:
        how = {"why": self.words} if self.words else {"ms": self.seconds * 1e3, "errors": self.errors}
        return {"who": self.who, "variant": self.name, "first_s": round(self.first, 3)} | how


class Run:
    """A candidate on batches: one call is one forward and backward, timed apart."""

    def __init__(self, module: nn.Module, call: Callable[..., Tensor], timer: Timer, *, routed: bool) -> None:
        self.module, self.call, self.timer, self.routed = module, call, timer, routed
        self.kept = self.peak = 0  # bytes held between the two; at most, beyond what was there

    def __call__(self, batch: Batch) -> tuple[list[float], dict[str, Tensor]]:
        x, w = batch.leaves
        given = (x, batch.ids_TK, w) if self.routed else (x,)
        leaves, names = [x, w] if self.routed else [x], [n for n, _ in self.module.named_parameters()]
        self.timer.flush()
        before = self.timer.begin_peak()
        start = self.timer.mark()
        y = self.call(*given)
        middle = self.timer.mark()
        kept = self.timer.allocated() - before
        grads = torch.autograd.grad(y, [*leaves, *self.module.parameters()], batch.grad_TD)
        end = self.timer.mark()
        times = [self.timer.seconds(start, middle), self.timer.seconds(middle, end)]
        self.kept, self.peak = kept, self.timer.peak() - before
        found = {"y": y.detach(), "x": grads[0]}
        if self.routed:
            assert isinstance(self.module, Experts)
            found["weights"] = grads[1]
            found["gate_up"], found["down"] = self.module.ours(dict(zip(names, grads[2:], strict=True)))
        return times, found


class Bench:
    """One shape: its weights, batches, truth and everybody who was tried."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, *, small: bool) -> None:
        _, D, F, E, K = self.shape = shape
        self.device, self.small, self.timer = device, small, Timer(device)
        self.weights = Weights(
            torch.randn(E, 2, F, D, device=device, dtype=torch.bfloat16) / D**0.5,
            torch.randn(E, D, F, device=device, dtype=torch.bfloat16) / F**0.5, K,
        )  # fmt: skip
        self.gate_ED = torch.randn(E, D, device=device, dtype=torch.bfloat16) / D**0.5
        self.batches = {kind: self.drawn(kind) for kind in KINDS}
        self.tried: list[Tried] = []

    @cached_property
    def true(self) -> dict[str, Tensor]:
        return truth(self.batches["random"][0], self.weights.gate_up_E2FD, self.weights.down_EDF)

    def drawn(self, kind: str) -> list[Batch]:
        return [draw(kind, self.shape, self.device, gate_ED=self.gate_ED) for _ in range(INPUTS)]

    def attempt(self, who: str, variant: str, make: Callable[[], nn.Module], *, compiled: bool, limit: float) -> Tried:
        """Build it, hold it against the truth, time it three times; what goes wrong becomes words."""
        tried, batch = Tried(who, variant, compiled), self.batches["random"][0]
        try:
            with limited(limit):
                module = make()
                routed = isinstance(module, Experts)
                backend = "inductor" if self.device.type == "cuda" else "eager"
                call = torch.compile(module, dynamic=False, backend=backend) if compiled else module
                run = Run(module, call, self.timer, routed=routed)
                times, found = run(batch)
                tried.first = sum(times)
                if routed:
                    tried.errors = errors(found, self.true)
                    if not max(tried.errors.values()) <= WORST:
                        raise ValueError(f"wrong: errors {', '.join(f'{k} {v:.1e}' for k, v in tried.errors.items())}")
                del found
                tried.seconds = statistics.median(sum(run(batch)[0]) for _ in range(3))
                tried.run = run
        except Exception as error:
            tried.words = one_line(error)
        print(f"  {who}: {tried.name}: {tried.words or f'{tried.seconds * 1e3:.4g} ms'}", flush=True)
        self.tried.append(tried)
        free()
        return tried

    def best(self, who: str, variants: dict[str, Callable[[], nn.Module]], *, compile_too: bool, clock: Clock) -> Tried:
        """Of a peer's variants, each as it is, then those near the best compiled."""
        best = Tried(who, "", False, words="nothing was tried")
        plain: list[tuple[str, Tried]] = []

        def consider(variant: str, *, compiled: bool) -> Tried:
            nonlocal best
            limit = min(30.0 if compiled else 20.0, clock.left())
            if limit < 2:
                tried = Tried(who, variant, compiled, words="no time was left to try")
                self.tried.append(tried)
                return tried
            tried = self.attempt(who, variant, variants[variant], compiled=compiled, limit=limit)
            loser = best if tried.seconds < best.seconds else tried
            loser.run = None
            best = tried if tried.seconds < best.seconds else best
            if best.words:
                best = tried
            free()
            return tried

        for variant in variants:
            plain.append((variant, consider(variant, compiled=False)))
        for variant, tried in plain if compile_too else []:
            if not tried.words and tried.seconds <= NEAR * best.seconds:
                consider(variant, compiled=True)
        return best
