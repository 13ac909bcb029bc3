"""A plan as text."""

from collections.abc import Iterable, Mapping

from pi_rl.planning.memory import GB, LIVE
from pi_rl.planning.plan import Plan

_TERA = 1e12
_STORED = {
    "device": "on the device",
    "host": "in host memory",
    "disk": "on disk",
    "recompute": "nowhere, the update recomputes them from observations",
    LIVE: "observations instead, on the device",
}


def plan_text(plan: Plan) -> str:
    """The plan as tables for a terminal."""
    blocks = [_headline(plan), _device(plan), _host(plan), _flops(plan), _seconds(plan), _footnotes(plan)]
    return "\n\n".join(blocks)


def _headline(plan: Plan) -> str:
    machine, device = plan.question.machine, plan.memory.device
    verdict = "fits" if plan.memory.fits else "DOES NOT FIT"
    host = sum(plan.memory.host.values())
    shared = f"{machine.processes} GPUs, {'sharded (FSDP)' if machine.sharded else 'data parallel'}"
    kind = ("one GPU" if machine.processes == 1 else shared) if machine.gpu else "no GPU"
    lines = [
        f"{verdict}: {kind}; needs {device.reserved / GB:.1f} of {machine.device_memory / GB:g} GB on each device and "
        f"{host / GB:.1f} of {machine.host_memory / GB:g} GB of host memory for each process",
        plan.arithmetic,
    ]
    return "\n".join(lines)


def _device(plan: Plan) -> str:
    device, phases = plan.memory.device, plan.phases
    rows = {f"weights: {name}": nbytes for name, nbytes in device.weights.items()}
    rows |= {
        "gradients": device.gradients,
        "optimiser": device.optimizer,
        "gradient buckets": device.buckets,
        "gathered layers": device.gathered,
        "observations" if plan.memory.tier in (LIVE, "recompute") else "prefixes": device.store,
        "chains of the rollout": device.chains,
        "temporary: acting": device.acting,
        "temporary: update": device.updating,
        "temporary: evaluation": device.evaluating,
        "temporary: saving": device.saving,
    }
    peaks = {f"peak: {name}": nbytes for name, nbytes in device.peaks.items()}
    last = {"with context and allocator": device.reserved}
    trained = sum(part.trained for part in phases.weights.values()) / 1e6
    title = f"Memory of a device, GB ({trained:,.0f} M of {_parameters(plan):,.0f} M parameters trained)"
    largest = [
        f"    {name.removeprefix('policy.policy.model.')}  {size / GB:.2f}" for name, size in _largest(device.largest)
    ]
    return "\n".join([title, _table(rows | peaks | last, GB), "  largest at the update's peak:", *largest])


def _largest(largest: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    return sorted(largest.items(), key=lambda entry: -entry[1])


def _parameters(plan: Plan) -> float:
    return sum(part.parameters for part in plan.phases.weights.values()) / 1e6


def _host(plan: Plan) -> str:
    memory = plan.memory
    stored = f"Prefixes wait {_STORED[memory.tier]}" if memory.tier != LIVE else "The update reads observations"
    text = f"{stored}: {memory.store_bytes / GB:.1f} GB ({plan.phases.prefix_row / 1e6:.1f} MB an observation)"
    if memory.tier != memory.automatic:
        text += f"; prefix_storage=auto would take {memory.automatic}"
    return "\n".join(
        [text, "Host memory of a process, GB", _table(memory.host, GB), "Disk, GB", _table(memory.disk, GB)]
    )


def _flops(plan: Plan) -> str:
    flops = plan.flops
    return "\n".join(["FLOPs of an iteration and device, TFLOP", _table({**flops, "sum": sum(flops.values())}, _TERA)])


def _seconds(plan: Plan) -> str:
    time = plan.time
    return "\n".join(
        [
            "Seconds of an iteration, from assumed rates",
            _table({**time.phases, "iteration": time.seconds}, 1.0),
            f"  {time.samples_per_second:,.0f} samples/s, {time.env_steps_per_second:,.0f} environment steps/s, "
            f"efficiency {time.efficiency:.0%}",
        ]
    )


def _footnotes(plan: Plan) -> str:
    assumed = [
        f"  {entry['name']}={entry['value']:g}{' ' if entry['unit'] else ''}{entry['unit']}: {entry['source']}"
        for entry in plan.question.assumptions.described()
    ]
    notes = [f"  {note}" for note in plan.notes]
    return "\n".join(["Notes", *notes, "Assumptions (--assume name=value)", *assumed])


def _table(rows: Mapping[str, float], unit: float) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(
        f"  {name:<{width}}  {value / unit:>10,.2f}" for name, value in rows.items() if value or name == "sum"
    )
