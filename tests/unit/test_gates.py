"""Every gate against plain loops: logits, what it passes on, and all gradients, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

import moetrain.moe  # noqa: F401 (registers the options)
from moetrain import counter
from moetrain.config import OPTIONS, UserError, load
from moetrain.model.flops import size
from moetrain.model.transformer import ModelConfig, Transformer
from moetrain.moe.layer import MoEConfig

T, D, E, LAYERS = 5, 6, 4, 3
CASES = {
    "linear": [{}],
    "cosine": [{}, {"hidden": 3, "temperature": 0.5}],
    "mlp": [{"hidden": 7}],
    "recurrent": [{"hidden": 3}],
}
TRIALS = [(name, keys) for name in OPTIONS["gate"] for keys in CASES[name]]


def times(weight: Tensor, x: list[Tensor]) -> list[Tensor]:
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]  # pyright: ignore


def unit(x: list[Tensor]) -> list[Tensor]:
    length = sum(v * v for v in x) ** 0.5
    return [v / length for v in x]


class Truth:
    """Each gate in plain loops, of one token: numbers in, its logits and its state out."""

    @staticmethod
    def linear(x, state, p, cfg):
        return times(p["weight"], x), state

    @staticmethod
    def cosine(x, state, p, cfg):
        h = unit(times(p["project"], x) if cfg.hidden else x)
        logits = [sum(a * b for a, b in zip(unit(list(w)), h, strict=True)) for w in p["weight"]]
        return [p["norm.weight"][0] * v / cfg.temperature for v in logits], state

    @staticmethod
    def mlp(x, state, p, cfg):
        h = [v * 0.5 * (1 + torch.erf(v / math.sqrt(2))) for v in times(p["up"], x)]
        return times(p["weight"], h), state

    @staticmethod
    def recurrent(x, state, p, cfg):
        H, x = cfg.hidden, times(p["project"], x)
        before = state or [torch.zeros((), dtype=torch.float64)] * H
        a = [v + b for v, b in zip(times(p["input.weight"], x), p["input.bias"], strict=True)]
        c = [v + b for v, b in zip(times(p["state.weight"], before), p["state.bias"], strict=True)]
        after = []
        for i in range(H):
            reset, update = (a[i] + c[i]).sigmoid(), (a[H + i] + c[H + i]).sigmoid()
            new = (a[2 * H + i] + reset * c[2 * H + i]).tanh()
            after.append((1 - update) * new + update * before[i])
        return times(p["weight"], after), after


def filled(module: nn.Module, name: str) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for n, p in module.named_parameters():
            counter.fill_normal_(p, shape=p.shape, offsets=(0,) * p.dim(), key=counter.key(name, n), std=0.7)
    return module


def gates(name: str, keys: dict) -> list[nn.Module]:
    cfg = load({"kind": name} | keys, OPTIONS["gate"][name])
    return [filled(cfg.build(dim=D, num_experts=E), f"layer {i}") for i in range(LAYERS)]


def tokens() -> list[Tensor]:
    """(T, D) for each layer."""
    return list(torch.randn(LAYERS, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_every_gate_equals_plain_loops_through_layers(name, keys) -> None:
    cfg, modules = load({"kind": name} | keys, OPTIONS["gate"][name]), gates(name, keys)
    inputs = [x.requires_grad_() for x in tokens()]
    leaves = [*inputs, *(p for module in modules for p in module.parameters())]
    carry, got = {}, []
    for module, x_TD in zip(modules, inputs, strict=True):
        logits_TE, carry = module(x_TD, carry)
        got.append(logits_TE)
        assert {key: (T, width) for key, width in cfg.carries.items()} == {k: tuple(v.shape) for k, v in carry.items()}
    rows = []
    for t in range(T):
        state = None
        for i, module in enumerate(modules):
            p = dict(module.named_parameters())
            logits, state = getattr(Truth, name)(list(inputs[i][t]), state, p, cfg)
            rows.append((i, t, torch.stack(logits)))
    want = [torch.stack([row for i, _, row in rows if i == layer]) for layer in range(LAYERS)]
    weight_TE = torch.linspace(-1, 2, T * E, dtype=torch.float64).view(T, E)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(sum((x * weight_TE).sum() for x in found), leaves) for found in (got, want)]  # pyright: ignore
    for a, b in zip(*grads, strict=True):
        assert (a == 0).all() == (b == 0).all(), "only what the first layer does with no state is exactly 0"
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_in_bfloat16_only_inputs_and_weights_are_rounded(name, keys) -> None:
    module, x_TD = gates(name, keys)[0], tokens()[0].bfloat16()
    logits_TE, carry = module.float()(x_TD, {"seen": x_TD})
    assert logits_TE.dtype == torch.float32
    assert carry["seen"] is x_TD, "what other gates pass on passes through"
    assert all(x.dtype == torch.bfloat16 for x in carry.values()), "a stage receives what the model computes in"
    wide, _ = module.bfloat16().float()(x_TD.float(), {})
    torch.testing.assert_close(logits_TE, wide, rtol=1e-6, atol=1e-6)


def test_cosine_logits_do_not_depend_on_lengths() -> None:
    module, x_TD = gates("cosine", {})[0], tokens()[0]
    logits_TE, _ = module(x_TD, {})
    torch.testing.assert_close(module(7 * x_TD, {})[0], logits_TE)
    assert logits_TE.abs().max() <= module.norm.weight.abs().item() / 0.07  # pyright: ignore


@pytest.mark.parametrize(("name", "keys"), TRIALS, ids=str)
def test_parameters_are_counted(name, keys) -> None:
    gate = load({"kind": name} | keys, OPTIONS["gate"][name])
    cfg = ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=2, moe=MoEConfig(gate=gate), pad_vocab_to=1)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == size(cfg).total


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"kind": "cosine", "temperature": 0.0}, r"temperature=0\.0: has to be above 0"),
        ({"kind": "cosine", "hidden": -1}, r"hidden=-1: use 0 for no projection"),
        ({"kind": "mlp", "hidden": 0}, r"hidden=0: has to be at least 1 \(gate=linear has none\)"),
        ({"kind": "recurrent", "hidden": 0}, r"hidden=0: has to be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_in_one_line(gate, said) -> None:
    with pytest.raises(UserError, match=said):
        load(gate, OPTIONS["gate"][gate["kind"]])
