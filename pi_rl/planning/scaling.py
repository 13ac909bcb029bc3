"""Seconds per phase and how they grow with GPUs: counted FLOPs and bytes over assumed rates.

Nothing here overlaps communication with computation, so several GPUs are rather better than this says.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.planning.assumptions import OTHER_COST, SIMULATOR_COST, Assumptions
from pi_rl.planning.counting import Count
from pi_rl.planning.memory import GB, Machine, chunks_of_process
from pi_rl.planning.phases import EXPERT, Phases
from pi_rl.trainer.flow_config import FlowConfig

_OPTIMIZER_TRAFFIC = 7  # tensors of the size of the weights that AdamW reads (4) and writes (3)
_MS, _US, _TERA = 1e-3, 1e-6, 1e12


@dataclass
class IterationTime:
    """Seconds of one iteration.

    Attributes:
        phases: By phase: simulation, the VLM, the denoising loop, what waiting for each other costs, …
        seconds: Of the iteration; with ``pipeline_stages=2`` less than the sum, as simulation and inference overlap.
        samples_per_second: Trained samples of all processes.
        env_steps_per_second: Simulator steps of all processes over the whole iteration.
        efficiency: Share of what the processes would do alone, without communication and without waiting.
    """

    phases: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    samples_per_second: float = 0.0
    env_steps_per_second: float = 0.0
    efficiency: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def plan_time(
    phases: Phases, args: FlowConfig, spec: EnvSpec, machine: Machine, assumptions: Assumptions, tier: str
) -> IterationTime:
    """Seconds of an iteration of rollout and update; evaluations and checkpoints come on top.

    Args:
        phases: Counts of one process.
        args: Of one process.
        spec: The environment.
        machine: Number of processes and whether the model is sharded.
        assumptions: Rates.
        tier: Where prefixes wait, as :func:`~pi_rl.planning.memory.plan_memory` chose.
    """
    model = _Times(phases, args, machine, assumptions)
    turns = args.rollout_chunks * args.rollout_epochs
    executed = args.n_action_steps or spec.max_episode_steps
    simulation = turns * model.simulation(spec, executed)
    acting = turns * (model.vlm(phases.encode) + model.expert(phases.act))
    last = args.rollout_epochs * (model.vlm(phases.encode) + model.expert(phases.value))
    time = IterationTime()
    time.phases = {
        "simulation": simulation,
        "rollout: VLM": (turns + args.rollout_epochs) * model.vlm(phases.encode),
        "rollout: denoising": turns * model.expert(phases.act) + args.rollout_epochs * model.expert(phases.value),
        **model.update(tier),
    }
    overlapping = getattr(args, "pipeline_stages", 1) > 1
    rollout = max(simulation, acting) + last if overlapping else simulation + acting + last
    update = sum(seconds for name, seconds in time.phases.items() if name.startswith("update"))
    alone = rollout + update
    processes = machine.processes
    time.phases["waiting for the slowest process"] = rollout * model.straggling()
    time.phases["gradients between processes"] = model.gradient_exchange()
    time.phases["weights between processes"] = model.weight_exchange(turns + args.rollout_epochs)
    between = ("waiting for the slowest process", "gradients between processes", "weights between processes")
    time.seconds = alone + sum(time.phases[name] for name in between)
    chunks = chunks_of_process(args)
    time.samples_per_second = processes * chunks * args.sampler().transitions / time.seconds
    time.env_steps_per_second = processes * chunks * executed / time.seconds
    time.efficiency = alone / time.seconds
    return time


def all_reduce_seconds(nbytes: float, processes: int, assumptions: Assumptions) -> float:
    """A ring within each node, then between the nodes for each GPU's share.

    Args:
        nbytes: Of the tensor that is summed.
        processes: One per GPU.
        assumptions: Links.
    """
    return 2 * all_gather_seconds(nbytes, processes, assumptions)


def all_gather_seconds(nbytes: float, processes: int, assumptions: Assumptions) -> float:
    """Collecting a tensor of which every process has a share; sharing sums out takes as long.

    Args:
        nbytes: Of the whole tensor.
        processes: One per GPU.
        assumptions: Links.
    """
    if processes == 1:
        return 0.0
    local = min(processes, int(assumptions.gpus_per_node))
    nodes = math.ceil(processes / local)
    within = (local - 1) / local * nbytes / (assumptions.node_gb_s * GB)
    between = (nodes - 1) / nodes * nbytes / local / (assumptions.network_gb_s * GB)
    return within + between + assumptions.latency_us * _US * math.ceil(math.log2(processes))


class _Times:
    """Counts over rates."""

    def __init__(self, phases: Phases, args: FlowConfig, machine: Machine, assumptions: Assumptions) -> None:
        self.phases, self.args, self.machine, self.rates = phases, args, machine, assumptions
        chunks = chunks_of_process(args)
        samples = chunks * args.sampler().transitions
        self.micro_batches = args.update_epochs * samples / phases.update_rows
        self.steps = self.micro_batches / args.gradient_accumulation_steps

    def simulation(self, spec: EnvSpec, executed: int) -> float:
        """Seconds in which all environments of a process simulate one chunk."""
        step, picture = SIMULATOR_COST.get(spec.name.partition(":")[0].partition("_")[0], OTHER_COST)
        step, picture = self.rates.step_ms or step, self.rates.picture_ms or picture
        cores = min(self.rates.cores_per_gpu, self.args.num_envs)
        return self.args.num_envs * (executed * step + picture) * _MS / cores

    def vlm(self, count: Count) -> float:
        return self._passes(count.flops, count.operations, self.rates.vlm_efficiency)

    def expert(self, count: Count) -> float:
        return self._passes(count.flops, count.operations, self.rates.expert_efficiency)

    def _passes(self, flops: float, operations: int, efficiency: float) -> float:
        return max(flops / (efficiency * self.rates.peak_tflops * _TERA), operations * self.rates.kernel_us * _US)

    def update(self, tier: str) -> dict[str, float]:
        """Seconds of all micro-batches and optimiser steps of an iteration, by part."""
        phases, rates = self.phases, self.rates
        both = phases.forward.flops + phases.backward.flops
        # a live VLM's share of the backward pass is that of the forward pass
        share = phases.encode_in_update / phases.forward.flops if phases.forward.flops else 0.0
        seconds = {
            "update: VLM": share * both / (rates.vlm_efficiency * rates.peak_tflops * _TERA),
            "update: expert and heads": self._passes(
                (1 - share) * both, phases.forward.operations + phases.backward.operations, rates.expert_efficiency
            ),
            "update: prefixes": self._prefixes(tier),
        }
        found = {name: value * self.micro_batches for name, value in seconds.items()}
        trained = phases.trained_bytes / (self.machine.processes if self.machine.sharded else 1)
        found["update: optimiser"] = self.steps * trained * _OPTIMIZER_TRAFFIC / (rates.device_gb_s * GB)
        return {name: value for name, value in found.items() if value}

    def _prefixes(self, tier: str) -> float:
        rates, nbytes = self.rates, self.phases.gathered
        if tier == "recompute":
            rows = self.phases.update_rows / self.phases.rollout_rows
            return self.phases.encode.flops * rows / (rates.vlm_efficiency * rates.peak_tflops * _TERA)
        speed = {"host": rates.host_copy_gb_s, "disk": rates.disk_gb_s}.get(tier, rates.device_gb_s)
        return nbytes / (speed * GB)

    def straggling(self) -> float:
        """Expected excess of the slowest process's rollout over the mean, for normally distributed times."""
        return self.rates.straggler_spread * math.sqrt(2 * math.log(self.machine.processes))

    def gradient_exchange(self) -> float:
        """Sums over processes: once per optimiser step, or per micro-batch where gradients are sharded."""
        trained, processes = self.phases.trained_bytes, self.machine.processes
        if self.machine.sharded:
            return self.micro_batches * all_gather_seconds(trained, processes, self.rates)
        return self.steps * all_reduce_seconds(trained, processes, self.rates)

    def weight_exchange(self, turns: int) -> float:
        """A sharded model gathers its weights for every pass."""
        if not self.machine.sharded:
            return 0.0
        expert = sum(part.nbytes for name, part in self.phases.weights.items() if name == EXPERT)
        vlm = self.phases.weight_bytes - expert
        live = self.phases.encode_in_update > 0
        per_turn = vlm + expert * self.args.denoising_steps
        per_micro_batch = 2 * (expert + (vlm if live else 0))  # forward and backward
        return sum(
            times * all_gather_seconds(nbytes, self.machine.processes, self.rates)
            for times, nbytes in ((turns, per_turn), (self.micro_batches, per_micro_batch))
        )
