"""The committed GPU results are whole, docs/gpu.md shows them, and the commands that make them run without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_results  # noqa: E402


def test_every_cell_has_a_status_and_what_belongs_to_it() -> None:
    assert gpu_results.files(), "a results file of some device is committed"
    for path in gpu_results.files():
        results = json.loads(path.read_text())
        assert path.stem == gpu_results.slug(results["device"])
        assert list(results["cells"]) == gpu_results.planned(), (
            f"{path.name}: benchmarks/gpu.sh --plan adds what is missing"
        )
        for name, cell in results["cells"].items():
            assert cell["status"] in gpu_results.STATUSES, name
            needed = {"value", "unit", "date", "commit"} if cell["status"] == "measured" else {"why"}
            assert needed <= cell.keys(), name


def test_the_page_shows_the_results() -> None:
    text = gpu_results.PAGE.read_text()
    assert gpu_results.page(text) == text, "benchmarks/gpu.sh --render brings docs/gpu.md up to date"


def test_cells_are_merged_one_by_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GPU_RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("GPU_COMMIT", "abc")
    first, second, *_ = (gpu_results.layer_cell(shape, "random") for shape in gpu_results.SHAPES)
    gpu_results.record("A GPU 9", {first: gpu_results.measured(1.5, "TFLOP/s")})
    gpu_results.record("A GPU 9", {second: gpu_results.failed("no"), first: gpu_results.not_measured("skipped")})
    cells = json.loads((tmp_path / "a-gpu-9.json").read_text())["cells"]
    assert (cells[first]["value"], cells[first]["commit"]) == (1.5, "abc"), "silence does not replace a figure"
    assert cells[second]["status"] == "failed"
    monkeypatch.setenv("GPU_RECORDED", str(tmp_path / "recorded"))
    gpu_results.record("A GPU 9", {first: gpu_results.measured(2.5, "TFLOP/s")})
    gpu_results.fail_rest("A GPU 9", "layer", "did not finish")
    cells = json.loads((tmp_path / "a-gpu-9.json").read_text())["cells"]
    assert (cells[first]["value"], cells[second]["why"]) == (2.5, "did not finish")
    assert cells["versions"]["status"] == "not measured"


@pytest.mark.parametrize("stage", ["layer", "dispatch", "model"])
def test_the_benchmarks_run_on_a_cpu(tmp_path, stage) -> None:
    env = os.environ | {"PYTHON": sys.executable, "GPU_RESULTS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--small", stage]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads((tmp_path / "cpu.json").read_text())["cells"]
    mine = {name: cell for name, cell in cells.items() if name.startswith(stage)}
    assert len(mine) == {"layer": 16, "dispatch": 10, "model": 9}[stage]
    for name, cell in mine.items():
        absent = "beside" in name and cell.get("why", "").startswith("not compared: ModuleNotFoundError")
        absent |= "routing fused" in name and "this is a CPU" in cell.get("why", "")
        assert cell["status"] == "measured" or absent, f"{name}: {cell}"


def test_a_gpu_is_missed_in_one_line(tmp_path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    env = os.environ | {"PYTHON": sys.executable, "GPU_RESULTS_DIR": str(tmp_path)}
    done = subprocess.run([str(ROOT / "benchmarks" / "gpu.sh"), "layer"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch sees no GPU here" in done.stderr


def test_only_a_gpu_backward_is_put_in_a_fixed_order_and_the_mode_is_given_back() -> None:
    import torch

    from moetrain.world import fixed_order

    for kind, on, expected in (("cuda", True, True), ("cuda", False, False), ("cpu", True, False)):
        with fixed_order(torch.device(kind), on=on):
            assert torch.are_deterministic_algorithms_enabled() == expected
        assert not torch.are_deterministic_algorithms_enabled()
