"""Tokens per second of the ``tiny`` preset on a CPU, beside the same model in Hugging Face transformers.

    python benchmarks/throughput.py                  # fp32 and bf16; prints a table, writes results/throughput-cpu.json
    python benchmarks/throughput.py --dtypes bfloat16 --pairs 10 --no-write

Both sides take whole training steps (batch, forward, loss, backward, clip, fused AdamW) on the same batches in the
same process on all cores, in blocks that alternate; the figure is the ratio of their medians, with a 95% interval from
a bootstrap over pairs of blocks. Ours is ``Trainer.step``, as ``moetrain train`` runs it; what that sets for the
process (glibc keeps freed memory) serves both. Both are at their own best. Ours: with and without ``train.compile``.
Theirs, Mixtral: every experts and attention implementation that runs here is tried, for bf16 both bf16 weights and fp32
weights under autocast, and the fastest ones also compiled; what failed is in the results. Autocast leaves
``grouped_mm`` in fp32, experts and all: that is not the same dtype, and has a row of its own, ``bfloat16-mixed``.

Before that it is shown that the two are the same model: the same number of parameters, and, from the same weights, the
same losses and gradient norms over eight fp32 steps (without balance losses, which Mixtral defines over all layers at
once), not compiled.
"""

import argparse
import gc
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import torch
from intervals import interval
from saving import save
from torch import Tensor

import moetrain
from moetrain.cli.compose import compose
from moetrain.job import open_data
from moetrain.train import Trainer
from moetrain.world import Communication, Device, join

try:
    import transformers
    from transformers import MixtralConfig, MixtralForCausalLM
except ImportError:
    sys.exit("benchmarks/throughput.py compares with transformers, which is missing: pip install 'moetrain[bench]'")

BATCH, SEQ_LEN, BLOCK = 4, 256, 3  # samples, tokens, steps of a timed block
COMPILE = 2  # of their variants, the fastest ones, are also compiled
EXPERTS, ATTENTION = ("grouped_mm", "eager", "batched_mm"), ("sdpa", "eager")
DTYPES = ["float32", "bfloat16", "bfloat16-mixed"]
RESULTS = Path(__file__).parent / "results" / "throughput-cpu.json"


def ours(dtype: str, *, balance: bool = True, compiled: bool = False) -> Trainer:
    overrides = [
        "model=tiny", "balance=[switch]", f"train.batch={BATCH}", f"train.micro_batch={BATCH}",
        f"train.seq_len={SEQ_LEN}", f"train.dtype={dtype}", "train.device=cpu",
        f"train.compile={str(compiled).lower()}",
    ]  # fmt: skip
    cfg = compose(overrides if balance else [*overrides, "model.moe.balance.switch.coef=0", "optim.warmup=0"])
    world = join(device=Device.cpu, communication=Communication.auto, timeout=60.0, threads=None)
    return Trainer(cfg, world, open_data(cfg, log=print))


class Theirs:
    """Mixtral with the shapes, weights, batches and optimizer of ``run``; ``autocast`` keeps its weights in fp32."""

    def __init__(
        self, run: Trainer, *, dtype: torch.dtype, autocast: bool, experts: str, attention: str, balance: bool = True,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        m, o = run.cfg.model, run.cfg.optim
        config = MixtralConfig(
            vocab_size=m.vocab_size, hidden_size=m.dim, intermediate_size=m.moe.hidden, num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads, num_local_experts=m.moe.num_experts,
            num_experts_per_tok=m.moe.router.top_k, max_position_embeddings=SEQ_LEN, rms_norm_eps=m.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope.theta}, router_aux_loss_coef=0.01,
            output_router_logits=balance, tie_word_embeddings=False, use_cache=False, attn_implementation=attention,
        )  # fmt: skip
        self.setting = {"dtype": dtype, "autocast": autocast, "experts": experts, "attention": attention}
        self.name = f"{'autocast' if autocast else str(dtype).removeprefix('torch.')}, experts {experts}, {attention}"
        self.name += ", compiled" * compiled
        self.run, self.steps, self.consumed, self.clip, self.norm = run, 0, 0, o.clip, torch.zeros(())
        self.model = MixtralForCausalLM(config)
        self.model.set_experts_implementation(experts)
        self.model.load_state_dict(renamed(run))
        self.model.train()
        if not autocast:
            self.model.to(dtype)
        self.called = torch.compile(self.model) if compiled else self.model
        self.context = torch.autocast("cpu", dtype) if autocast else nullcontext()
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in self.model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, o.lr, (o.beta1, o.beta2), o.eps, fused=True)

    def probe(self, tokens: int = 16) -> float:
        """Seconds a step would take, from one forward and backward of a few tokens, if every token costs the same."""
        ids = self.run.data.loader.batch(0, 1).tokens_BS[:, :tokens]
        start = time.perf_counter()
        with self.context:
            loss = self.model(ids, labels=ids).loss
        loss.backward()
        self.optimizer.zero_grad()
        return (time.perf_counter() - start) * BATCH * SEQ_LEN / tokens

    def step(self) -> Tensor:
        batch = self.run.data.loader.batch(self.consumed, BATCH)
        with self.context:
            loss = self.called(batch.tokens_BS, labels=batch.targets_BS, shift_labels=batch.targets_BS).loss
        loss.backward()
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.cfg.optim.lr_at(self.steps, steps=self.run.cfg.train.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps, self.consumed = self.steps + 1, self.consumed + BATCH
        return loss.detach()


def renamed(run: Trainer) -> dict[str, Tensor]:
    """Our weights under Mixtral's names."""
    names = {
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
        "moe.gate": "mlp.gate", "moe.experts.gate_up": "mlp.experts.gate_up_proj",
        "moe.experts.down": "mlp.experts.down_proj",
    }  # fmt: skip
    top = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    found = {}
    for name, p in run.model.named_parameters():
        tensor = p.detach()[: run.cfg.model.vocab_size] if name in ("embedding.weight", "head.weight") else p.detach()
        if name in top:
            found[top[name]] = tensor.clone()
            continue
        _, layer, rest = name.split(".", 2)
        part = rest.removesuffix(".weight")
        tail = ".weight" if rest != part else ""
        found[f"model.layers.{layer}.{names[part]}{tail}"] = (
            tensor.flatten(1, 2) if tensor.dim() == 4 else tensor.clone()
        )
    return found


def same_model() -> dict:
    """Parameter counts, and fp32 losses and gradient norms from the same weights."""
    a = ours("float32", balance=False)
    b = Theirs(a, dtype=torch.float32, autocast=False, experts="eager", attention="eager", balance=False)
    counts = [sum(p.numel() for p in m.parameters()) for m in (a.model, b.model)]
    assert counts[0] == counts[1], f"not the same model: {counts[0]:,} parameters here, {counts[1]:,} there"
    steps = [(a.step(), b.step(), b.norm) for _ in range(8)]
    losses = [(x.loss.item(), y.item()) for x, y, _ in steps]
    norms = [(x.norm.item(), norm.item()) for x, _, norm in steps]
    worst = max(abs(x - y) for x, y in losses)
    worst_norm = max(abs(x / y - 1) for x, y in norms)
    assert worst <= 1e-4, f"not the same model: losses {losses}"
    assert worst_norm <= 1e-3, f"not the same model: gradient norms {norms}"
    print(
        f"same model: {counts[0]:,} parameters each; over 8 fp32 steps from the same weights (loss "
        f"{losses[0][0]:.3f} to {losses[-1][0]:.3f}) losses differ by at most {worst:.1e}, "
        f"gradient norms by {worst_norm:.1e} of themselves"
    )
    return {"parameters": counts[0], "losses": losses, "norms": norms, "largest_difference": worst}


def candidates(run: Trainer, dtype: torch.dtype, *, mixed: bool) -> Iterator[Theirs]:
    """Every variant that computes in ``dtype``; ``mixed``: the ones whose experts autocast leaves in fp32."""
    for experts, attention in itertools.product(EXPERTS, ATTENTION):
        for autocast in (False, True) if dtype is torch.bfloat16 else (False,):
            if mixed == (autocast and experts == "grouped_mm"):
                yield Theirs(run, dtype=dtype, autocast=autocast, experts=experts, attention=attention)


def fastest(run: Trainer, dtype: torch.dtype, *, mixed: bool) -> tuple[Theirs, dict[str, float], dict[str, str]]:
    """Their best variant, every variant's seconds a step, and why others failed: one step of each, then more of those
    near the best, at last the fastest of them compiled.

    batched_mm copies the weights of its expert for every token, minutes a step: it is measured on a few tokens.
    """
    times, built = {}, {}
    for peer in candidates(run, dtype, mixed=mixed):
        if "batched_mm" in peer.name and (guess := peer.probe()) > 20 * min(times.values()):
            times[f"{peer.name} (from 16 tokens)"] = guess
            continue
        peer.step()
        times[peer.name] = seconds(peer.step, 1)
        if times[peer.name] <= 1.5 * min(times.values()):
            built[peer.name] = peer
    near = [peer for name, peer in built.items() if times[name] <= 1.5 * min(times.values())]
    times |= in_turns({peer.name: peer.step for peer in near})
    near.sort(key=lambda peer: times[peer.name])
    failed = {}
    for eager in near[:COMPILE]:
        peer = Theirs(run, compiled=True, **eager.setting)  # pyright: ignore[reportArgumentType]
        try:
            for _ in range(4):  # routing changes, and with it shapes
                peer.step()
        except Exception as error:
            failed[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        else:
            near.append(peer)
    times |= in_turns({peer.name: peer.step for peer in near})
    return min(near, key=lambda peer: times[peer.name]), times, failed


def in_turns(steps: dict[str, Callable]) -> dict[str, float]:
    """The median seconds of a step of each."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(4):
        for name, step in steps.items():
            samples[name].append(seconds(step, 2))
    return {name: statistics.median(found) for name, found in samples.items()}


def seconds(step: Callable, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def compare(name: str, pairs: int) -> dict:
    """``bfloat16-mixed``: ours in bf16, theirs with experts in fp32."""
    dtype_name, _, mixed = name.partition("-")
    dtype = getattr(torch, dtype_name)
    mine = {words: ours(dtype_name, compiled=words == "compiled") for words in ("not compiled", "compiled")}
    for run in mine.values():
        run.step()
        run.step()
    own = in_turns({words: run.step for words, run in mine.items()})
    fast = min(own, key=lambda words: own[words])
    run = mine[fast]
    print(f"\n{name}: ours {fast} ({', '.join(f'{words} {t * 1e3:.0f} ms' for words, t in own.items())})")
    peer, tried, failed = fastest(run, dtype, mixed=bool(mixed))
    print(f"theirs at its best: {peer.name}. Tried (ms a step):")
    for variant, t in sorted(tried.items(), key=lambda item: item[1]):
        print(f"    {t * 1e3:8.0f}  {variant}")
    for variant, why in failed.items():
        print(f"      failed  {variant}: {why}")
    del mine
    gc.collect()
    for _ in range(3):
        run.step()
        peer.step()
    before, found = os.getloadavg(), []
    for i in range(pairs):
        first, second = (run, peer) if i % 2 == 0 else (peer, run)
        a, b = seconds(first.step, BLOCK), seconds(second.step, BLOCK)
        found.append((a, b) if i % 2 == 0 else (b, a))
    low, high = interval(found)
    rate, their = (BATCH * SEQ_LEN / statistics.median(t[k] for t in found) for k in (0, 1))
    return {
        "ours_tokens_per_s": round(rate), "transformers_tokens_per_s": round(their), "ratio": round(rate / their, 3),
        "interval_95": [round(low, 3), round(high, 3)], "pairs": pairs, "steps_per_block": BLOCK, "peer": peer.name,
        "peer_variants_ms": {name: round(t * 1e3, 1) for name, t in tried.items()}, "peer_variants_failed": failed,
        "ours": fast, "our_variants_ms": {words: round(t * 1e3, 1) for words, t in own.items()},
        "load_average": {"before": before, "after": os.getloadavg()}, "seconds_per_step": found,
    }  # fmt: skip


def device() -> str:
    """The processor, its cores and what its arithmetic offers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
    known = {k.strip(): v.strip() for k, v in known.items()}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())}, {os.cpu_count()} cores, {' '.join(flags)}"


def commit() -> str:
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "../moetrain"], cwd=here, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    versions = {"moetrain": moetrain.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {
        "what": f"tiny preset, whole training steps of {BATCH} x {SEQ_LEN} tokens, one process",
        "device": device(), "date": date.today().isoformat(), "commit": commit(),
        "versions": versions | {"python": platform.python_version()},
    }  # fmt: skip
    print(*(f"{k}: {v}" for k, v in report.items()), f"load average: {os.getloadavg()}", sep="\n")
    report |= {"same_model": same_model(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        report["results"] = results = {name: compare(name, args.pairs) for name in args.dtypes}
    print(f"\n{'':14}{'ours':>9}{'transformers':>14}   ratio of medians (95%)     load average   [tokens/s]")
    for name, r in results.items():
        low, high = r["interval_95"]
        print(
            f"{name:14}{r['ours_tokens_per_s']:>9,}{r['transformers_tokens_per_s']:>14,}"
            f"{r['ratio']:>8.2f}x ({low:.2f} to {high:.2f}){'':11}{r['load_average']['after'][0]:.1f}"
        )
    if not args.no_write:
        save(report, RESULTS)


if __name__ == "__main__":
    main()
