"""How much memory and disk the stored inputs of an iteration may take."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

DEVICE_SHARE = 0.25  # of a GPU, left for the activations of the update
HOST_SHARE = 0.2  # of what is free, left for simulators and everything else
DISK_SHARE = 0.1  # of what is free, left for checkpoints
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Budget:
    """Bytes that one process may fill.

    Attributes:
        device: Of the compute device; on a CPU the same memory as ``host``.
        host: Of host memory.
        disk: Of the disk that ``prefix_storage_dir`` is on.
    """

    device: float
    host: float
    disk: float

    def of(self, tier: str) -> float:
        """Bytes of "device", "host" or "disk"."""
        return {"device": self.device, "host": self.host, "disk": self.disk}[tier]


def measure_budget(device: torch.device, folder: Path, *, processes: int = 1, reserve: int = 0) -> Budget:
    """What is free now, less what the update will need.

    Args:
        device: Compute device.
        folder: Where a file of stored rows would lie; it need not exist.
        processes: Processes of this machine, which share host memory and disk.
        reserve: Bytes that the update allocates on the device: gradients and the optimiser's state.
    """
    host = (1 - HOST_SHARE) * free_host_memory() / processes
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    disk = (1 - DISK_SHARE) * shutil.disk_usage(existing).free / processes
    if device.type != "cuda":
        left = max(0.0, host - reserve)
        return Budget(left, left, disk)
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, to be used again
    return Budget(max(0.0, free + unused - reserve - DEVICE_SHARE * total), host, disk)


def free_host_memory(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """Bytes of memory that are available to this process, within the limits of its control groups.

    Args:
        cgroups: Where control groups are mounted.
        own: The list of the groups that this process is in.
    """
    return min([float(psutil.virtual_memory().available), *_group_limits(cgroups, own)])


def _group_limits(cgroups: Path, own: Path) -> list[float]:
    """Free bytes of every memory control group around this process; empty where there is none."""
    if not own.is_file():
        return []
    limits = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            limits += _free_of(place, *names)
            if place == root:
                break
    return limits


def _free_of(group: Path, limit_name: str, used_name: str, cache_name: str) -> list[float]:
    """[limit − use + file cache that the system gives back], or [] without a limit."""
    limit, used = group / limit_name, group / used_name
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return []
    cache = 0
    statistics = group / "memory.stat"
    if statistics.is_file():
        cache = next(
            (
                int(line.split()[1])
                for line in statistics.read_text().splitlines()
                if line.startswith(f"{cache_name} ")
            ),
            0,
        )
    return [max(0.0, float(int(limit.read_text()) - int(used.read_text()) + cache))]
