"""From counts to what must fit: memory of a device, of its process's host, and disk."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pi_rl.planning.assumptions import Assumptions
from pi_rl.planning.phases import Phases
from pi_rl.policies.storage_budget import DEVICE_SHARE, DISK_SHARE
from pi_rl.trainer.flow_config import FlowConfig

GB = 1e9
TIERS = ("device", "host", "disk", "recompute")
LIVE = "observations"
"""Where a live prefix leaves nothing to store: the update encodes the observations again."""


@dataclass
class Machine:
    """Where a process runs.

    Attributes:
        device_memory: Bytes of its accelerator.
        host_memory: Bytes of host memory for each process.
        disk: Free bytes on the disk for each process's prefixes.
        processes: Processes of the run, one per accelerator.
        sharded: Weights, gradients and optimiser are shared by the processes (FSDP); None: with train_vlm on several.
        gpu: Whether there are GPUs at all.
    """

    device_memory: float
    host_memory: float
    disk: float
    processes: int = 1
    sharded: bool | None = None
    gpu: bool = True


@dataclass
class DeviceMemory:
    """Bytes on one device.

    Attributes:
        weights: By part; with FSDP this process's share.
        gradients: Of trained weights.
        optimizer: Its state.
        buckets: Copies of the gradients that data parallelism sends.
        gathered: Whole weights of the layers that a sharded model works on.
        store: Prefixes (tier "device") or observations waiting for the update.
        chains: Denoising chains, log-probs, values and critic features of a rollout.
        acting, updating, evaluating, saving: Temporary bytes of the phases, activations included.
        peaks: Most bytes in each phase; what PyTorch reports as allocated.
        reserved: The largest peak with the context and the allocator's unused parts: what the card must have.
        largest: Largest temporary tensors at the peak of the update, by module.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    store: int
    chains: int
    acting: int
    updating: int
    evaluating: int
    saving: int
    peaks: dict[str, int] = field(default_factory=dict)
    reserved: int = 0
    largest: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Most bytes allocated in any phase."""
        return max(self.peaks.values())


@dataclass
class MemoryPlan:
    """Everything that must fit.

    Attributes:
        device: One accelerator.
        tier: Where prefixes wait for the update: one of ``TIERS``, or "observations" with a live prefix.
        automatic: The tier that ``prefix_storage=auto`` takes.
        store_bytes: Of one process's prefixes or observations, wherever they are.
        host: Bytes of host memory by purpose, of one process with its simulators.
        disk: Bytes on disk by purpose.
        fits: Whether device and host have room.
    """

    device: DeviceMemory
    tier: str
    automatic: str
    store_bytes: int
    host: dict[str, int]
    disk: dict[str, int]
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "device": {**asdict(self.device), "peak": self.device.peak}}


def chunks_of_process(args: FlowConfig) -> int:
    """Chunks that a process keeps in one iteration; ``args`` are those of one process."""
    return args.num_envs * args.rollout_chunks * args.rollout_epochs


def plan_memory(
    phases: Phases, args: FlowConfig, machine: Machine, assumptions: Assumptions, *, live: bool, simulators: float
) -> MemoryPlan:
    """Adds the phases up.

    Args:
        phases: Counts of one process.
        args: Of one process.
        machine: Where it runs.
        assumptions: Context, host and allocator overheads.
        live: Whether the update encodes observations anew.
        simulators: Bytes of the process's simulator processes.
    """
    chunks = chunks_of_process(args)
    device = _device(phases, machine, chunks, phases.observation_row * chunks if live else 0)
    _peaks(device, phases, machine, assumptions)
    host = _host(phases, machine, assumptions, simulators)
    store = chunks * (phases.observation_row if live else phases.prefix_row)
    tier = LIVE if live else args.prefix_storage
    free = min(
        machine.device_memory - device.reserved,
        (1 - DEVICE_SHARE) * machine.device_memory
        - sum(device.weights.values())
        - device.gradients
        - device.optimizer,
    )
    host_free = (machine.host_memory - sum(host.values())) * assumptions.host_share
    automatic = LIVE if live else choose_tier(store, free, host_free, (1 - DISK_SHARE) * machine.disk)
    tier = automatic if tier == "auto" else tier
    kept = tier
    if tier == "recompute":  # observations wait, and the VLM's passes are in the update, too
        store = chunks * phases.observation_row
        device.updating = max(device.updating, phases.encode.temporary * phases.update_rows // phases.rollout_rows)
        kept = "device" if store <= free else "host"
    if kept == "device":
        device.store = store
    _peaks(device, phases, machine, assumptions)
    if kept == "host":
        host["observations" if tier == "recompute" else "prefixes"] = store
    disk = _disk(phases, args, machine)
    if tier == "disk":
        disk["prefixes"] = store * machine.processes
    fits = device.reserved <= machine.device_memory and sum(host.values()) <= machine.host_memory
    return MemoryPlan(device, tier, automatic, store, host, disk, fits)


def choose_tier(store: float, device_free: float, host_free: float, disk_free: float) -> str:
    """The fastest place that has room for the prefixes.

    Args:
        store: Bytes of all prefixes of an iteration.
        device_free: Bytes left on the device at its peak.
        host_free: Bytes left in host memory.
        disk_free: Bytes left on disk.
    """
    rooms = zip(TIERS, (device_free, host_free, disk_free), strict=False)
    return next((tier for tier, room in rooms if store <= room), "recompute")


def _device(phases: Phases, machine: Machine, chunks: int, store: int) -> DeviceMemory:
    share = machine.processes if machine.sharded else 1
    data_parallel = machine.processes > 1 and not machine.sharded
    return DeviceMemory(
        weights={name: part.nbytes // share for name, part in phases.weights.items()},
        gradients=phases.trained_bytes // share,
        optimizer=phases.optimizer // share,
        buckets=phases.trained_bytes if data_parallel else 0,
        # the unit at work, the next one, and the weights of no unit
        gathered=2 * phases.unit_bytes + phases.root_bytes if machine.sharded else 0,
        store=store,
        chains=phases.chunk_row * chunks,
        acting=phases.acting,
        updating=phases.updating,
        evaluating=phases.evaluating,
        # a sharded model is gathered tensor by tensor; adapters are merged in host memory
        saving=phases.unit_bytes if machine.sharded else 0 if machine.gpu else phases.save.temporary,
    )


def _peaks(device: DeviceMemory, phases: Phases, machine: Machine, assumptions: Assumptions) -> None:
    always = sum(device.weights.values()) + device.optimizer + device.buckets + device.gathered
    rollout = always + device.store + device.chains
    # gradients of a gathered unit are whole before they are shared out
    whole = phases.unit_bytes if machine.sharded else 0
    device.peaks = {
        # the chains are joined at the end of a rollout, when no pass needs memory
        "rollout": rollout + max(device.acting, device.chains),
        "update": rollout + device.gradients + whole + device.updating,
        "optimizer step": rollout + device.gradients + max(0, phases.step.temporary - phases.optimizer),
        "evaluation": rollout + device.evaluating,
        "save": rollout + device.saving,
    }
    overhead = assumptions.context_gb * GB if machine.gpu else 0
    device.reserved = round(device.peak * (1 + assumptions.fragmentation) + overhead)
    largest = phases.forward.largest if phases.forward.peak >= phases.backward.peak else phases.backward.largest
    device.largest = {storage.label: storage.nbytes for storage in largest[:5]}


def _host(phases: Phases, machine: Machine, assumptions: Assumptions, simulators: float) -> dict[str, int]:
    trained_and_frozen = (
        phases.weight_bytes
        if machine.gpu
        else sum((phases.weight_bytes, phases.trained_bytes, phases.optimizer, phases.updating))
    )
    host = {
        "process": round(assumptions.process_gb * GB),
        "parked language heads": phases.parked,
        # while loading and while saving the weights pass through host memory
        "weights in passing" if machine.gpu else "training": trained_and_frozen,
        "adapters being merged": phases.save.temporary if machine.gpu and not machine.sharded else 0,
        # the first process has all of it while it saves
        "optimiser state in passing": phases.optimizer if machine.gpu and machine.sharded else 0,
        "simulators": round(simulators),
    }
    return {name: nbytes for name, nbytes in host.items() if nbytes}


def _disk(phases: Phases, args: FlowConfig, machine: Machine) -> dict[str, int]:
    disk = {"policy": phases.checkpoint}
    if args.save_every_iterations is not None:
        kept = (args.save_total_limit or args.num_iterations // args.save_every_iterations) + 1  # one is being written
        disk["checkpoints"] = kept * (phases.checkpoint + phases.optimizer)
    return disk
