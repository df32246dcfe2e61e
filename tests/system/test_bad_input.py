"""Every documented wrong input: one line that names the value, the rule and the fix, exit code 2, nothing written."""

import shutil
from pathlib import Path

import pytest

from moetrain.cli.main import main

TINY = [
    "model.vocab_size=512", "model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2",
    "model.moe.num_experts=4", "model.moe.hidden=32", "train.steps=2", "train.batch=4", "train.micro_batch=2",
    "train.seq_len=32", "train.threads=1", "train.device=cpu", "train.validate_samples=4", "optim.warmup=1",
    "data=folder",
]  # fmt: skip

CASES = {
    "an unknown key": ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    "an unknown section": ("optm.lr=1", "did you mean 'optim.lr'?"),
    "an unknown group": ("rooter=topk", "did you mean 'router'?"),
    "an unknown option": ("router=tpk", "did you mean 'topk'?"),
    "an unknown member of a list of options": ("balance=[switch,zloss]", "did you mean 'z_loss'?"),
    "an unknown model": ("model=olmo", "did you mean 'olmoe_1b_7b'?"),
    "an unknown experiment": ("experiment=quikstart", "did you mean 'quickstart'?"),
    "a key added by +": ("+optim.foo=1", "OptimConfig.foo"),
    "an unknown corpus key": ("data.corpora.text.pth=1", "unknown key 'data.corpora.text.pth'"),
    "a word that is no override": ("optim.lr", "'optim.lr' is not key=value"),
    "a word that cannot be parsed": ("seed=[", "'seed=[' cannot be parsed"),
    "an unknown flag": ("--multirum", "did you mean '--multirun'?"),
    "a string for a number": ("optim.lr=abc", "optim.lr: Value 'abc' of type 'str' could not be converted to Float"),
    "a fraction for a count": ("train.steps=1.5", "train.steps: Value '1.5'"),
    "a value outside the list": ("train.dtype=float16", "expected one of [float32, bfloat16, float64]"),
    "an unknown optimizer": ("optim.kind=moun", "expected one of [adamw, muon]"),
    "an unknown file of optimizer choices": ("optim=muno", "did you mean 'muon'?"),
    "an unknown dtype of optimizer state": ("optim.state_dtype=float16", "expected one of [float32, bfloat16]"),
    "a cache that cannot be made": ("run.cache=/dev/null/cache", "run.cache=/dev/null/cache cannot be made (Not a"),
    "an API key in the config": (
        "logging.wandb=offline logging.wandb_project=" + "0123456789abcdef" * 2 + "f1234567",
        "logging.wandb_project looks like an API key, which has no place in a config",
    ),
    "no such way of W&B": ("logging.wandb=on-line", "expected one of [off, offline, online]"),
    "no time for a sink": ("logging.sink_timeout=0", "logging.sink_timeout=0.0: seconds have to be above 0"),
    "a trace that ends before it begins": ("trace.steps=[5,3]", "give the first and the last step to trace"),
    "a trace of a rank that there is not": ("trace.ranks=[2]", "there is no rank 2, use 0 to 0"),
    "garbage at negative steps": ("train.gc_every=-1", "train.gc_every=-1: steps cannot be negative"),
    "no Newton-Schulz step": ("optim=muon optim.muon.ns_steps=0", "optim.muon.ns_steps=0: has to be at least 1"),
    "a momentum that never fades": ("optim=muon optim.muon.momentum=1", "has to be at least 0 and below 1"),
    "weights kept in less than is computed in": (
        "optim.weight_dtype=bfloat16",
        "optim.weight_dtype=bfloat16 with train.dtype=float32: weights are kept in no less than what is computed in; "
        "set train.dtype=bfloat16",
    ),
    "an unknown dtype of weights": ("optim.weight_dtype=float16", "expected one of [float32, bfloat16]"),
    "no such kernel of the optimizer": ("optim.kernel=cuda", "expected one of [auto, torch, triton]"),
    "an average too slow for bfloat16": ("optim.state_dtype=bfloat16 optim.beta2=0.999", "use beta2 <= 0.996"),
    "routing kernels that add up three": (
        "router=group_limited model.moe.num_experts=32 model.moe.router.num_groups=4 model.moe.router.max_groups=2 "
        "model.moe.router.top_k=6 model.moe.router.fused=true",
        "the kernel adds up 2 at most; use fused=false",
    ),
    "a negative window": ("model.windows=[-1]", "model.windows=[-1]: use numbers of keys that a query sees, 0 for all"),
    "more windows than layers": (
        "model.windows=[4,4,4]",
        "model.windows=[4, 4, 4] has 3 numbers for model.num_layers=2: give at most one a layer, they repeat",
    ),
    "a window that is no list": ("model.windows=4096", "model.windows"),
    "a negative learning rate": ("optim.lr=-1", "has to be above 0"),
    "tiles that are none": ("model.moe.fp8_tile=12", "fp8_tile=12: use one of 8, 16, 32, 64, 128, or 0 for no float8"),
    "tiles that etp cuts apart": (
        "model.moe.fp8_tile=32 layout.tp=2 layout.etp=2",
        "does not divide the 16 of model.moe.hidden=32 that each of layout.etp=2 ranks has: tiles would lie otherwise "
        "than on one rank; use model.moe.fp8_tile=16 or model.moe.hidden=64",
    ),
    "float8 in a kernel that has none": (
        "model.moe.fp8_tile=32 model.moe.kernel=reference",
        "model.moe.kernel=reference has no float8: use model.moe.kernel=auto or fp8_tile=0",
    ),
    "a capacity factor of zero": ("dispatcher=capacity model.moe.dispatcher.factor=0", "has to be above 0"),
    "a negative capacity of evaluation": (
        "dispatcher=capacity model.moe.dispatcher.eval_factor=-1",
        "model.moe.dispatcher.eval_factor=-1.0: the capacity factor has to be above 0",
    ),
    "a negative least capacity": (
        "dispatcher=capacity model.moe.dispatcher.min_capacity=-1",
        "min_capacity=-1: an expert keeps so many assignments at the least, use 0 or more",
    ),
    "fewer null experts than none": (
        "model.moe.zero_computation.nulls=-1",
        "model.moe.zero_computation.nulls=-1: a number of experts, use 0 for none",
    ),
    "a drop policy that is none": (
        "dispatcher=capacity model.moe.dispatcher.drop=probs",
        "expected one of [position, probability, random]",
    ),
    "a memory budget too small for any replica": (
        "placement=fssdp model.moe.placement.memory=1e-6 layout.ep=2",
        "model.moe.placement.memory=1e-06: one replica in each of a rank's 2 MoE layers takes",
    ),
    "experts fewer than the ranks that own them": (
        "placement=fssdp layout.dp=16 layout.ep=4",
        "the 8 experts of a stage's 2 MoE layers are fewer than its edp*ep=16 ranks",
    ),
    "no load to plan from": ("placement=shadow model.moe.placement.window=0", "placement.window=0: replicas follow"),
    "a negative cost": (
        "placement=fssdp model.moe.placement.costs.row=-1",
        "costs.row=-1.0: microseconds have to be 0",
    ),
    "a negative number of travelling experts": (
        "placement=fssdp model.moe.placement.overlap=-1",
        "model.moe.placement.overlap=-1: so many experts of a layer travel at the most",
    ),
    "a gradient's dtype that there is not": (
        "placement=replicate_all model.moe.placement.wire=float16",
        "expected one of [bfloat16]",
    ),
    "a negative number of ranks on a node": (
        "dispatcher=hierarchical model.moe.dispatcher.ranks_per_node=-1",
        "ranks_per_node=-1: has to be at least 1, or 0",
    ),
    "nodes that expert groups do not fill": (
        "dispatcher=hierarchical model.moe.dispatcher.ranks_per_node=3 layout.dp=4 layout.ep=4",
        "ranks_per_node=3 and layout.ep * layout.etp = 4: one has to divide the other",
    ),
    "more experts per token than experts": (
        "model.moe.router.top_k=5",
        "more than model.moe.num_experts=4: use 1 to 4",
    ),
    "experts not divisible by ep": (
        "layout.ep=3",
        "layout.ep=3 does not divide model.moe.num_experts=4: use one of [1, 2, 4]",
    ),
    "a layout whose expert view does not fit": ("layout.dp=2 layout.ep=4", "does not divide the 2 ranks there are"),
    "a degree below one": ("layout.ep=0", "layout.ep=0: a degree is at least 1"),
    "more stages than layers": (
        "layout.pp=2 pipeline.schedule=zbv",
        "layout.pp=2 with 2 stages a rank (pipeline.schedule=zbv) makes 4 stages of model.num_layers=2 layers: each "
        "takes at least one, lower layout.pp",
    ),
    "stages that do not add up": (
        "layout.pp=2 pipeline.stages=[3,2]",
        "pipeline.stages=[3, 2] is 2 stages of 5 layers, layout.pp=2 under pipeline.schedule=1f1b needs 2 of "
        "model.num_layers=2: for example [1, 1]",
    ),
    "too few micro-batches for a schedule": (
        "layout.pp=2 model.num_layers=4 pipeline.schedule=dualpipev train.batch=6 train.micro_batch=2",
        "pipeline.schedule=dualpipev needs 2 * layout.pp = 4 micro-batches a step or more, there are 3: raise "
        "train.batch, lower layout.dp or train.micro_batch, or choose another schedule",
    ),
    "a schedule that there is not": (
        "layout.pp=2 pipeline.schedule=dualpipe",
        "pipeline.schedule=dualpipe: no such schedule; did you mean",
    ),
    "heads that tp does not divide": ("layout.tp=3", "layout.tp=3 does not divide model.num_heads="),
    "ulysses with too few heads": ("layout.cp=16 context.method=ulysses", "nearest legal: "),
    "one weight that is always 1": ("model.moe.router.top_k=1", "set model.moe.router.renormalize=false"),
    "a batch that does not divide": (
        "train.batch=5",
        "is not a multiple of dp * train.micro_batch = 1 * 2 = 2: use 4 or 6",
    ),
    "heads that do not divide": ("model.num_kv_heads=3", "does not divide model.num_heads=4: use one of [1, 2, 4]"),
    "a warm-up longer than the run": ("optim.warmup=9", "longer than train.steps=2"),
    "a sequence longer than the data": ("train.seq_len=99999999", "use a smaller seq_len"),
    "a vocabulary smaller than the corpus's": ("model.vocab_size=100", "set model.vocab_size=512"),
    "a missing corpus": ("data.corpora.text.path=/nowhere", "moetrain data tokenize"),
    "no corpus at all": ("~data.corpora.text", "data.corpora is empty"),
    "a run folder that cannot be written": ("run.dir=/dev/null/runs", "cannot be written (Not a directory)"),
    "a run name that leaves its folder": ("run.name=../x", "cannot name a folder"),
    "an unknown way to resume": ("run.resume=maybe", "is neither auto nor never nor a checkpoint in"),
    "a config file that is not there": ("--config /nowhere.yaml", "cannot read the config /nowhere.yaml"),
    "replayed choices that are not there": ("router=replay model.moe.router.path=/nowhere", "cannot be read"),
}


def refused(capsys, argv: list[str], *, says: str) -> None:
    """Exit code 2 and exactly one line that says it."""
    assert main(["train", *argv]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert "Traceback" not in out + err


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(case, capsys, small_corpus, tmp_path) -> None:
    value, says = CASES[case]
    where = [f"run.dir={tmp_path / 'runs'}", f"data.corpora.text.path={small_corpus}"]
    if value.startswith("~data.corpora"):
        where.pop()
    given = value.split()
    argv = given if "--config" in given else [*TINY, *where, *given]
    refused(capsys, argv, says=says)
    assert not list(tmp_path.rglob("*.safetensors"))
    if "replay" not in value:
        assert not (tmp_path / "runs").exists(), "refused before anything was made"


def test_a_world_that_the_layout_does_not_fit(capsys, small_corpus, tmp_path, monkeypatch) -> None:
    """As under torchrun: the launcher says three ranks, the layout wants two."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    argv = [*TINY, f"run.dir={tmp_path}", f"data.corpora.text.path={small_corpus}"]
    refused(
        capsys, [*argv, "layout.dp=2"], says="does not equal the 3 ranks there are: start 2 ranks or set layout.dp=-1"
    )
    refused(capsys, ["-m", *argv, "optim.lr=1,2"], says="-m inside torchrun")


@pytest.fixture
def finished(small_corpus, tmp_path) -> list[str]:
    """A small finished run; the words that made it."""
    argv = [*TINY, f"run.dir={tmp_path}", f"data.corpora.text.path={small_corpus}"]
    assert main(["train", *argv]) == 0
    return argv


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_checkpoint_of_another_model_or_of_other_data_is_kept(finished, capsys, tmp_path) -> None:
    before = contents(tmp_path / "default")
    capsys.readouterr()
    refused(capsys, [*finished, "model.dim=64"], says="is a checkpoint of another model")
    refused(capsys, [*finished, "model.moe.num_experts=8"], says="choose another run.name")
    refused(capsys, [*finished, "optim=muon"], says="optim.kind was adamw in")
    refused(capsys, [*finished, "optim.state_dtype=bfloat16"], says="optim.state_dtype was null in")
    refused(
        capsys,
        [*finished, "train.seq_len=16"],
        says="train.seq_len was 32, is 16. Restore what was, or say that it is meant",
    )
    refused(capsys, [*finished, "run.resume=never"], says="already holds step-00000002")
    assert contents(tmp_path / "default") == before


def test_a_corrupt_token_file_is_named(capsys, small_corpus, tmp_path) -> None:
    for n, (damage, says) in enumerate(
        (
            (lambda b: b[:-1], "train.bin"),
            (lambda b: b"\xff\xff" + b[2:], "train.bin"),
        )
    ):
        corpus = tmp_path / f"corpus{n}"
        shutil.copytree(small_corpus, corpus)
        file = corpus / "train.bin"
        file.write_bytes(damage(file.read_bytes()))
        refused(capsys, [*TINY, f"run.dir={tmp_path / 'runs'}", f"data.corpora.text.path={corpus}"], says=says)
    assert not (tmp_path / "runs").exists()


def test_a_damaged_checkpoint_is_named(finished, capsys, tmp_path) -> None:
    newest = tmp_path / "default/checkpoints/step-00000002"
    file = max(newest.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    refused(capsys, [*finished, f"run.resume={newest}"], says=file.name)
