"""What a GPU's driver counts: utilization, power, energy, temperature, clocks, traffic, throttling, errors (NVML).

Read by nvidia-ml-py, the extra ``gpu``. What a card, its driver or an older nvidia-ml-py does not have is None.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

THROTTLES = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake",
}  # fmt: skip
"""Bits of the driver's reasons for lower clocks than there could be; idleness and clocks that somebody set are none."""
HARDWARE = {"hardware slowdown", "heat (hardware)", "power brake"}
"""Those by which a card protects itself."""

_ALL_LINKS = 2**32 - 1
_LOST = 15


class AbsentError(Exception):
    """Why there are no counters, in a line."""


class Card:
    """One GPU, or a slice of one (MIG)."""

    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.lost = False  # fallen off the bus
        self.name, self.uuid = self._ask("Name"), self._ask("UUID")

    def _ask(self, what: str, *args: Any) -> Any:
        """``nvmlDeviceGet<what>``, or None."""
        function = getattr(self._nvml, f"nvmlDeviceGet{what}", None)
        try:
            return None if function is None else function(self._handle, *args)
        except self._nvml.NVMLError as error:
            self.lost = self.lost or error.value == _LOST  # pyright: ignore
            return None

    def sample(self) -> dict[str, float | None]:
        """Numbers of this moment: shares, bytes and bytes/s, W, J since the driver was loaded, degrees C, MHz.

        Takes some 40 ms: the driver counts PCIe's traffic for 20 ms each way. NVLink's are bytes so far.
        """
        n, used, memory = self._nvml, self._ask("UtilizationRates"), self._ask("MemoryInfo")
        sent, received = (self._ask("PcieThroughput", way) for way in (0, 1))  # transmitted, received
        links = [
            self._field(field, _ALL_LINKS)
            for field in (n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
        ]
        return {
            "utilization": used and used.gpu / 100,
            "memory_busy": used and used.memory / 100,
            "memory_used": memory and memory.used,
            "watts": _times(self._ask("PowerUsage"), 1e-3),
            "joules": _times(self._ask("TotalEnergyConsumption"), 1e-3),
            "celsius": self._celsius(),
            "sm_mhz": self._ask("ClockInfo", n.NVML_CLOCK_SM),
            "memory_mhz": self._ask("ClockInfo", n.NVML_CLOCK_MEM),
            "pcie_sent": _times(sent, 1024),
            "pcie_received": _times(received, 1024),
            "nvlink_sent": _times(links[0], 1024),
            "nvlink_received": _times(links[1], 1024),
            "throttle": self._throttle(),
        }

    def status(self) -> dict[str, Any]:
        """A sample, and what a doctor asks besides: limits, errors, links."""
        n, memory, errors, rows = self._nvml, self._ask("MemoryInfo"), {}, self._ask("RemappedRows")
        for kind, code in (("corrected", 0), ("uncorrected", 1)):
            errors[kind] = self._ask("TotalEccErrors", code, 0)  # since the driver was loaded
            errors[f"{kind}_ever"] = self._ask("TotalEccErrors", code, 1)
        ecc = self._ask("EccMode")
        links = [self._ask("NvLinkState", link) for link in range(n.NVML_NVLINK_MAX_LINKS)]
        found = self.sample()
        bits = found.pop("throttle")
        return found | {
            "name": self.name,
            "uuid": self.uuid,
            "memory_total": memory and memory.total,
            "throttled_by": None if bits is None else reasons(int(bits)),
            "celsius_slowdown": self._ask("TemperatureThreshold", n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
            "memory_celsius": self._field(n.NVML_FI_DEV_MEMORY_TEMP),
            "watts_limit": _times(self._ask("EnforcedPowerLimit"), 1e-3),
            "sm_mhz_most": self._ask("MaxClockInfo", n.NVML_CLOCK_SM),
            "pcie_link": self._pcie(),
            "ecc": ecc and bool(ecc[0]),
            "ecc_errors": errors,
            "rows_pending": rows and bool(rows[2]),
            "rows_failed": rows and bool(rows[3]),
            "nvlinks_up": sum(x == 1 for x in links) if any(x is not None for x in links) else None,
            "nvlinks_down": [i for i, x in enumerate(links) if x == 0],
            "lost": self.lost,
        }

    def _celsius(self) -> float | None:
        new = self._ask("TemperatureV", self._nvml.NVML_TEMPERATURE_GPU)  # the older one leaves with CUDA 14
        return self._ask("Temperature", self._nvml.NVML_TEMPERATURE_GPU) if new is None else new

    def _throttle(self) -> int | None:
        """Bits; an older driver has them by the older name."""
        new = self._ask("CurrentClocksEventReasons")
        return self._ask("CurrentClocksThrottleReasons") if new is None else new

    def _field(self, field: int, scope: int = 0) -> float | None:
        """One of the numbers that have no function of their own."""
        values = self._ask("FieldValues", [(field, scope)])
        names = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
        if not values or values[0].nvmlReturn != 0 or values[0].valueType >= len(names):
            return None
        return getattr(values[0].value, names[values[0].valueType])

    def _pcie(self) -> dict[str, Any]:
        ask = self._ask
        return {
            "generation": ask("CurrPcieLinkGeneration"), "width": ask("CurrPcieLinkWidth"),
            "width_most": ask("MaxPcieLinkWidth"),
        }  # fmt: skip


def _times(x: float | None, factor: float) -> float | None:
    return None if x is None else x * factor


def reasons(bits: int) -> list[str]:
    """Why the clocks are lower than they could be, in words."""
    return [words for bit, words in THROTTLES.items() if bits & bit]


def library() -> ModuleType:
    """nvidia-ml-py with the driver's library loaded; raises ``AbsentError``."""
    try:
        import pynvml
    except ImportError as error:
        raise AbsentError("nvidia-ml-py is not installed (pip install 'moetrain[gpu]')") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:  # pyright: ignore[reportGeneralTypeIssues]
        raise AbsentError(f"no NVIDIA driver answers ({error})") from error
    return pynvml


def driver() -> str:
    """Its version; raises ``AbsentError``."""
    nvml = library()
    try:
        return nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError as error:
        raise AbsentError(f"the NVIDIA driver does not say its version ({error})") from error


def cards() -> Iterator[Card | AbsentError]:
    """Every card that the driver shows this process, whatever CUDA_VISIBLE_DEVICES says, or why it cannot be opened.

    Raises ``AbsentError``.
    """
    nvml = library()
    for i in range(nvml.nvmlDeviceGetCount()):
        try:
            yield Card(nvml, nvml.nvmlDeviceGetHandleByIndex(i))
        except nvml.NVMLError as error:
            yield AbsentError(f"cannot be opened ({error})")


def card_of(device: torch.device) -> Card:
    """The card of torch's ``device``, by its UUID: torch counts what CUDA_VISIBLE_DEVICES leaves, the driver all.

    Raises ``AbsentError``.
    """
    nvml = library()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    for name in (f"GPU-{uuid}", f"MIG-{uuid}"):
        try:
            return Card(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
        except nvml.NVMLError:
            continue
    raise AbsentError(f"the driver knows no card of {device}'s UUID {uuid}")
