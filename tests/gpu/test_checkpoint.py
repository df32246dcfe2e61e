"""A checkpoint does not know the device: saved on one, loaded on the other and back, to the bit."""

import torch
from small import config, trainer

from moetrain import checkpoint
from moetrain.resume import Start
from moetrain.train import Trainer


def everything(run: Trainer) -> dict[str, torch.Tensor]:
    return {n: torch.cat([c.tensor.cpu().flatten() for c in box.chunks]) for n, box in run.tensors().items()}


def test_saved_on_the_device_loaded_on_the_cpu_and_back(device, small_corpus, tmp_path) -> None:
    cpu = torch.device("cpu")
    there, back = config(small_corpus, tmp_path / "there"), config(small_corpus, tmp_path / "back")
    first = trainer(there, device)
    for _ in range(3):
        first.step()
    saved = everything(first)
    second = trainer(back, cpu)
    second.load(Start(first.save()))
    third = trainer(there, device)
    third.load(Start(second.save()))
    assert (second.steps, third.consumed) == (3, first.consumed)
    for run in (second, third):
        found = everything(run)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[n], saved[n]) for n in saved)
    a, b = first.step(), third.step()
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.norm, b.norm)
    assert checkpoint.latest(tmp_path / "back" / "checkpoints") is not None
