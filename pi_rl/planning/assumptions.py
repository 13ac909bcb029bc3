"""What a plan cannot count: rates of cards and links, overheads of processes; each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pi_rl.policies.storage_budget import HOST_SHARE


def _assumed(default: float, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Assumptions:
    """Numbers that are assumed, not counted; ``--assume name=value`` replaces any of them."""

    peak_tflops: float = _assumed(989.0, "TFLOP/s", "NVIDIA's data sheet, H100 SXM, dense bfloat16")
    vlm_efficiency: float = _assumed(0.40, "", "share of the peak in the VLM's passes: this project's target")
    expert_efficiency: float = _assumed(0.15, "", "share of it in the action expert's: few tokens a sample; a guess")
    kernel_us: float = _assumed(5.0, "µs", "time to start an operation; decides small passes without CUDA graphs")
    device_gb_s: float = _assumed(3350.0, "GB/s", "NVIDIA's data sheet, H100 SXM, HBM3")
    host_copy_gb_s: float = _assumed(25.0, "GB/s", "pinned host memory to card over PCIe 4.0 x16, as usually measured")
    disk_gb_s: float = _assumed(3.0, "GB/s", "reads of one NVMe disk, usual data sheets")
    node_gb_s: float = _assumed(300.0, "GB/s", "NVLink 4 within a node: two thirds of 450 GB/s in each direction")
    network_gb_s: float = _assumed(40.0, "GB/s", "between nodes, per GPU: 400 Gbit/s InfiniBand at 80 %")
    gpus_per_node: float = _assumed(8.0, "", "usual layout of H100 nodes")
    cores_per_gpu: float = _assumed(16.0, "", "usual layout of H100 nodes: 128 cores")
    latency_us: float = _assumed(20.0, "µs", "of one collective call per doubling of the processes; a guess")
    straggler_spread: float = _assumed(0.05, "", "standard deviation of a process's rollout time, relative; a guess")
    step_ms: float = _assumed(0.0, "ms", "processor time of a simulator step; 0: as docs/performance.md has it")
    picture_ms: float = _assumed(0.0, "ms", "processor time of an observation's pictures; 0: as docs/performance.md")
    context_gb: float = _assumed(0.8, "GB", "CUDA context and cuBLAS workspace on a card; a usual value")
    fragmentation: float = _assumed(0.05, "", "memory that the caching allocator holds unused; a guess")
    process_gb: float = _assumed(3.0, "GB", "a Python process with torch, CUDA libraries and LeRobot; a usual value")
    host_share: float = _assumed(1 - HOST_SHARE, "", "part of the free host memory that a prefix store may take")

    def changed(self, values: Mapping[str, Any]) -> "Assumptions":
        """The same with some values replaced.

        Raises:
            ValueError: If a name is unknown or a value is no positive number.
        """
        names = [entry.name for entry in fields(self)]
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"{name!r} is not an assumption; there are {', '.join(names)}.")
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{name}={value!r} is not allowed: an assumption is a number from 0 up.")
        return replace(self, **{name: float(value) for name, value in values.items()})

    def described(self) -> list[dict[str, Any]]:
        """Name, value, unit and source of each."""
        return [{"name": entry.name, "value": getattr(self, entry.name), **entry.metadata} for entry in fields(self)]


SIMULATOR_COST = {"metaworld": (0.65, 90.0), "libero": (5.9, 188.0), "maniskill": (7.3, 31.0)}
"""Milliseconds of processor time for a step and for an observation's pictures, from docs/performance.md.

Its table is per step with pictures at every fifth, drawn in software and without ``fast_rendering``: an upper bound
where a GPU draws.
"""

SIMULATOR_MB = {"metaworld": 345, "libero": 1046, "maniskill": 1016}
"""Memory of a worker process, measured: docs/performance.md."""

OTHER_COST, OTHER_MB = (5.0, 5.0), 1000
"""The same for a simulator that was not measured."""
