"""The same phases on real tensors, to compare a plan with what really happens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.planning.counting import Count
from pi_rl.planning.phases import Phases, run_phases
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.trainer.flow_config import FlowConfig

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)

MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""Environment of a measured CPU process: freed memory goes back to the system, so that its size is what is in use."""


class Gauge:
    """Memory in use on a device, in place of a :class:`~pi_rl.planning.counting.Meter`.

    On a GPU what PyTorch's allocator has handed out; on the CPU the resident memory of the process (Linux), which
    counts pages when they are first written.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._seen: set[int] = set()

    @property
    def live(self) -> int:
        """Bytes in use now."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        return _status("VmRSS")

    def register(self, tensors: Mapping[str, Tensor]) -> int:
        """Bytes of tensors that were not registered before."""
        new = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
        added = sum(nbytes for pointer, nbytes in new.items() if pointer not in self._seen)
        self._seen |= set(new)
        return added

    @contextmanager
    def phase(self) -> Iterator[Count]:
        """Measures the block: bytes before, at the peak and after; no FLOPs."""
        count = Count(before=self.live)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            _CLEAR.write_text(_RESET_PEAK)
        yield count
        count.after = self.live
        count.peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Nothing to mark."""
        yield


def measure_phases(model: FlowActorCritic, args: FlowConfig, spec: EnvSpec) -> Phases:
    """What :func:`~pi_rl.planning.phases.count_phases` predicts, measured.

    Args:
        model: With real weights; they change.
        args: Of one process.
        spec: The environment.
    """
    device = next(model.parameters()).device.type
    with torch.device(device):
        return run_phases(model, args, spec, Gauge(device))


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
