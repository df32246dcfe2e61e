"""Peak matmul rates of devices, for MFU. Dense, without sparsity, from the vendors' data sheets."""

import torch

_PEAK_TFLOPS: dict[str, dict[torch.dtype, float]] = {
    "B200": {torch.bfloat16: 2250.0, torch.float32: 80.0},
    "H200 NVL": {torch.bfloat16: 835.5, torch.float32: 60.0},
    "H200": {torch.bfloat16: 989.5, torch.float32: 67.0},
    "H100 NVL": {torch.bfloat16: 835.5, torch.float32: 60.0},
    "H100 PCIe": {torch.bfloat16: 756.0, torch.float32: 51.0},
    "H100": {torch.bfloat16: 989.5, torch.float32: 67.0},
    "A100": {torch.bfloat16: 312.0, torch.float32: 19.5},
    "L40S": {torch.bfloat16: 362.0, torch.float32: 91.6},
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Flop/s of one device, or None where it is not in the table (CPUs are not)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, rates in _PEAK_TFLOPS.items():
        if all(word in name for word in key.split()):
            return rates.get(dtype, 0.0) * 1e12 or None
    return None
